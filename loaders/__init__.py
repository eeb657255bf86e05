"""Volumes on disk -> patches in memory; usable alone.

    from loaders import VolumeStore, PatchLoader, PatchGrid, read_volume

Names are imported when first used, so that `from loaders import DataConfig` costs nothing.
"""

from importlib import import_module

_HOME = {
    "Volume": "readers",
    "BrokenVolume": "readers",
    "READERS": "readers",
    "read_volume": "readers",
    "write_volume": "readers",
    "Subject": "splits",
    "find_subjects": "splits",
    "split_subjects": "splits",
    "Preprocess": "preprocess",
    "VolumeStore": "store",
    "SliceStore": "slices",
    "DataConfig": "config",
    "open_data": "config",
    "PatchGrid": "patches",
    "Sampler": "patches",
    "UniformCorners": "patches",
    "ForegroundCorners": "patches",
    "LabelCorners": "patches",
    "PatchLoader": "loader",
    "PatchDataset": "loader",
    "Batch": "loader",
    "broken_files": "check",
    "Augment": "preprocess",
    "write_demo": "demo",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    return getattr(import_module(f"loaders.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
