"""Which volumes there are: a folder is walked, a glob or a manifest is read."""

from __future__ import annotations

import glob
import os
from collections import Counter
from pathlib import Path

from loaders.manifest import SUFFIXES, manifest_subjects
from loaders.readers import READERS, READING, SLICES, Reading, is_dicom, volume_suffix
from loaders.subjects import Subject, names_of


def find_subjects(root: str | Path, reading: Reading = READING) -> list[Subject]:
    """List the volumes under a folder (recursive), of a glob, or of a CSV or JSON manifest.

    A manifest has the column `path` (relative to the manifest; several files separated by `;`
    become channels) and, where wanted, `id`, `subject` (whose volume it is), `split`, `label_map`
    (a file with labels, for the sampler) and any further columns, for example a class or a group to
    balance by. It may be separated by `,`, `;` or tabs, in any encoding that Excel writes.

    Args:
        root: The folder, glob or manifest.
        reading: Its `stacks` says whether a folder of slices is one volume.

    Returns:
        Volumes sorted by id, or in the manifest's order.

    Example:
        >>> find_subjects("data/**/*_T1.nii.gz")
    """
    root = Path(root).expanduser()
    if root.suffix.lower() in SUFFIXES and root.is_file():
        return manifest_subjects(root)
    if root.is_dir():
        paths, base = sorted(volumes_below(root)), root
    elif root.is_file() or root.is_symlink():  # even where its name holds a [
        paths, base = [root], root.parent
    elif glob.has_magic(str(root)):
        paths = [
            path
            for path in map(Path, sorted(glob.glob(str(root), recursive=True)))
            if volume_suffix(path) or path.is_dir()
        ]
        base = Path(str(root).split("*")[0].split("?")[0].split("[")[0] + "x").parent
    else:
        raise ValueError(f"{root}: no such folder, glob or manifest (data.root)")
    if reading.stacks == "folder":
        paths = in_stacks(paths)
    if not paths:
        formats = " ".join(READERS)
        raise ValueError(f"{root}: holds no volumes (data.root); formats are {formats}")
    return [Subject(id, (path,)) for id, path in zip(names_of(paths, base), paths, strict=True)]


def in_stacks(paths: list[Path]) -> list[Path]:
    """Put a folder in the place of the slices that lie in it; other files stay."""
    slices = Counter(path.parent for path in paths if volume_suffix(path) in SLICES)
    stacks = {folder for folder, count in slices.items() if count > 1}
    return list({
        path.parent if path.parent in stacks and volume_suffix(path) in SLICES else path: None
        for path in paths
    })  # fmt: skip


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
