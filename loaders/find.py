"""Which volumes there are: a folder is walked, a glob or a manifest is read."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path, PurePath

from loaders.manifest import manifest_subjects
from loaders.readers import READERS, is_dicom, volume_suffix
from loaders.subjects import Subject, names_of

# Names that say what a file is: a map of labels, not an image.
LABEL_FILE = re.compile(r"seg|(?<!un)label", re.IGNORECASE)
LABEL_FOLDER = re.compile(r"(labels?|seg|segs|segmentations?)(tr|ts|va|train|val|test)?", re.I)

tell = partial(print, file=sys.stderr)


def find_subjects(
    root: str | Path, named: Collection[str] = (), say: Callable[[str], None] = tell
) -> list[Subject]:
    """List the volumes under a folder (recursive), of a glob, or of a CSV or JSON manifest.

    A manifest has the column `path` (relative to the manifest; several files separated by `;`
    become channels) and, where wanted, `id`, `subject` (whose volume it is), `split`, `label` (a
    label map for the sampler) and any further columns, for example a group to balance by. Files
    that are called like label maps are left out where a folder or a glob only happens to hold them.

    Args:
        root: The folder, glob or manifest.
        named: Ids that are taken whatever they are called, for example those of an earlier run.
        say: Takes a line on what was left out.

    Returns:
        Volumes sorted by id, or in the manifest's order.

    Example:
        >>> find_subjects("data/**/*_T1.nii.gz")
    """
    root = Path(root).expanduser()
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
    subjects = [Subject(id, (path,)) for id, path in zip(names_of(paths, base), paths, strict=True)]
    if paths == [root] or is_label_map(relative_to(root, base)):  # named themselves
        return subjects
    return without_label_maps(subjects, root, base, named, say)


def without_label_maps(
    subjects: list[Subject], root: Path, base: Path, named: Collection[str],
    say: Callable[[str], None],
) -> list[Subject]:  # fmt: skip
    """Leave out what is called like a label map, and say so."""
    others = [s for s in subjects if s.id not in named]
    maps = [s for s in others if is_label_map(relative_to(s.paths[0], base))]
    if not maps:
        return subjects
    line = f"{len(maps)} files are called like label maps, first {maps[0].paths[0]}"
    how = "name them in a glob or a manifest where they are images"
    if len(maps) == len(subjects):
        raise ValueError(f"{root}: {line}, and there are no others (data.root); {how}")
    say(f"left out: {line}; {how}")
    left_out = {s.id for s in maps}
    return [s for s in subjects if s.id not in left_out]


def is_label_map(relative: PurePath) -> bool:
    """Whether a path is called like a label map: `*seg*`, `*label*`, in `labelsTr` and such."""
    *folders, name = relative.parts or ("",)
    return bool(LABEL_FILE.search(name)) or any(map(LABEL_FOLDER.fullmatch, folders))


def relative_to(path: Path, base: Path) -> PurePath:
    """Return a path below a folder as its own parts."""
    return PurePath(os.path.relpath(path, base))


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
