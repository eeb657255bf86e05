"""Volumes on disk -> patches in memory; usable alone.

    from loaders import VolumeStore, PatchLoader, PatchGrid, read_volume

Names are imported when first used, so that `from loaders import DataConfig` costs nothing.
"""

# ruff: noqa: F401
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for those who read types and run no __getattr__
    from loaders.config import DataConfig, open_data, survey_data
    from loaders.consistency import Facts, Survey, facts_of
    from loaders.demo import write_demo
    from loaders.find import find_subjects
    from loaders.fingerprint import Fingerprint, measure
    from loaders.loader import Batch, PatchDataset, PatchLoader
    from loaders.patches import ForegroundCorners, LabelCorners, PatchGrid, Sampler, UniformCorners
    from loaders.persons import find_persons
    from loaders.preprocess import Augment, Preprocess
    from loaders.readers import (
        READERS,
        BrokenVolume,
        Dicom,
        Reading,
        Volume,
        read_volume,
        write_volume,
    )
    from loaders.slices import SliceStore
    from loaders.splits import split_subjects
    from loaders.store import VolumeStore
    from loaders.subjects import Subject

_NAMES = {
    "readers": (
        *("Volume", "BrokenVolume", "Reading", "Dicom"),
        *("READERS", "read_volume", "write_volume"),
    ),
    "subjects": ("Subject",),
    "find": ("find_subjects",),
    "fingerprint": ("Fingerprint", "measure"),
    "splits": ("split_subjects",),
    "preprocess": ("Preprocess", "Augment"),
    "store": ("VolumeStore",),
    "slices": ("SliceStore",),
    "persons": ("find_persons",),
    "config": ("DataConfig", "open_data", "survey_data"),
    "consistency": ("Facts", "Survey", "facts_of"),
    "patches": ("PatchGrid", "Sampler", "UniformCorners", "ForegroundCorners", "LabelCorners"),
    "loader": ("PatchLoader", "PatchDataset", "Batch"),
    "demo": ("write_demo",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    return getattr(import_module(f"loaders.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
