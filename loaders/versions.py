"""The files that a volume is read from, and what tells that they have changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from loaders.readers import BrokenVolume, describe, is_store, split_series


def files_of(path: Path) -> list[Path]:
    """Return the files a volume is read from: a DICOM folder's, or a header's and its voxels'."""
    path, _ = split_series(path)
    if path.is_dir():
        return sorted(child for child in path.iterdir() if child.is_file())
    if path.suffix.lower() in (".hdr", ".mhd", ".nhdr"):
        stem = path.name[: -len(path.suffix)] + "."
        return sorted(child for child in path.parent.iterdir() if child.name.startswith(stem))
    return [path]


def stamp(path: Path) -> list:
    """Size and time of the files of a volume: a changed file is noticed by it."""
    try:
        statuses = [os.stat(file) for file in files_of(path)]
    except OSError as error:
        raise BrokenVolume(path, error.strerror or str(error)) from error
    return [[status.st_size, status.st_mtime_ns] for status in statuses]


def version_of(path: Path) -> list:
    """What tells that a volume has changed: a store's metadata, or its files' sizes and times."""
    return [describe(path).version] if is_store(path) else stamp(path)


def digest(path: Path) -> str:
    """Hash of the bytes of all files of a volume."""
    hasher = hashlib.sha256()  # twice as fast as blake2b where the processor knows it
    for file in files_of(path):
        with open(file, "rb") as stream:
            while chunk := stream.read(2**20):
                hasher.update(chunk)
    return hasher.hexdigest()
