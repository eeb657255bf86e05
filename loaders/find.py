"""Which volumes there are: a folder is walked, a glob or a manifest is read."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from loaders.manifest import manifest_subjects
from loaders.masks import with_masks
from loaders.readers import READERS, READING, Reading, is_dicom, volume_suffix
from loaders.series import time_points
from loaders.subjects import Subject, names_of


def find_subjects(root: str | Path, reading: Reading = READING) -> list[Subject]:
    """List the volumes under a folder (recursive), of a glob, or of a CSV or JSON manifest.

    A manifest has the column `path` (relative to the manifest; several files separated by `;`
    become channels) and, where wanted, `id`, `subject` (whose volume it is), `split`, `label` (a
    label map for the sampler) and any further columns, for example a group to balance by.

    Args:
        root: The folder, glob or manifest.
        reading: How the files are read; with `volumes_4d: samples` each time point of a 4D file is
            a subject; with a mask, that of each is looked for.

    Returns:
        Volumes sorted by id, or in the manifest's order.

    Example:
        >>> find_subjects("data/**/*_T1.nii.gz")
    """
    root = Path(root).expanduser()
    return list(time_points(with_masks(listed(root), reading.mask, root), reading))


def listed(root: Path) -> list[Subject]:
    """List the files, one subject each."""
    if root.suffix.lower() in (".csv", ".json") and root.is_file():
        return manifest_subjects(root)
    if root.is_dir():
        paths, base = sorted(volumes_below(root)), root
    elif glob.has_magic(str(root)):
        paths = [
            path
            for path in map(Path, sorted(glob.glob(str(root), recursive=True)))
            if volume_suffix(path) or path.is_dir()
        ]
        base = Path(str(root).split("*")[0].split("?")[0].split("[")[0] + "x").parent
    elif root.is_file() or root.is_symlink():
        paths, base = [root], root.parent
    else:
        raise ValueError(f"{root}: no such folder, glob or manifest (data.root)")
    if not paths:
        formats = " ".join(READERS)
        raise ValueError(f"{root}: holds no volumes (data.root); formats are {formats}")
    return [Subject(id, (path,)) for id, path in zip(names_of(paths, base), paths, strict=True)]


def volumes_below(root: Path) -> list[Path]:
    """Walk a folder: files that a reader takes, and folders that hold DICOM slices.

    Dot-files are skipped, links are followed, a loop of links is walked once.
    """
    found, seen, todo = [], set(), [root]
    while todo:
        folder = todo.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        names = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
        slices = False
        for path in (folder / name for name in names):
            suffix = volume_suffix(path)
            if path.is_dir():
                todo.append(path)
            elif suffix == ".dcm":
                slices = True
            elif suffix is not None:
                found.append(path)
            elif not path.suffix and not slices and path.is_file():
                slices = is_dicom(path)
        if slices:
            found.append(folder)
    return found
