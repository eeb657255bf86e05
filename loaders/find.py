"""Which volumes there are: a folder is walked, a glob or a manifest is read."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from loaders.manifest import SUFFIXES, manifest_subjects
from loaders.masks import with_masks
from loaders.readers import (
    DICOM_SUFFIXES,
    HDF5,
    READERS,
    READING,
    SLICES,
    TIFF,
    ZARR,
    BrokenVolume,
    Dicom,
    Reading,
    holds_dicom,
    is_dicom,
    is_store,
    is_tiff,
    object_name,
    split_dataset,
    split_series,
    stores_at,
    url_of,
    volume_suffix,
    volumes_of,
)
from loaders.series import time_points
from loaders.subjects import Subject, names_of

# What of ours may lie below a folder of volumes, and the file that tells.
OURS = {"CACHEDIR.TAG": "cache", "metrics.jsonl": "run"}
PASSED = (".n5",)  # folders that are files of a kind which no reader takes
DETACHED = (".hdr", ".mhd", ".nhdr")  # headers whose voxels lie beside them
# Names that say what a file is: a map of labels, not an image.
LABEL_FILE = re.compile(r"seg|(?<!un)label", re.IGNORECASE)
LABEL_FOLDER = re.compile(r"(labels?|seg|segs|segmentations?)(tr|ts|va|train|val|test)?", re.I)

Say = Callable[[str], None]


def tell(line: str) -> None:
    """Say it on stderr."""
    print(line, file=sys.stderr)


def find_subjects(
    root: str | Path, reading: Reading = READING, named: Collection[str] = (), say: Say = tell
) -> list[Subject]:
    """List the volumes under a folder (recursive), of a glob, or of a CSV or JSON manifest.

    A manifest has the column `path` (relative to the manifest; several files separated by `;`
    become channels) and, where wanted, `id`, `subject` (whose volume it is), `split`, `label_map`
    (a file with labels, for the sampler) and any further columns, for example a class or a group to
    balance by. It may be separated by `,`, `;` or tabs, in any encoding that Excel writes. Files
    that are called like label maps are left out where a folder or a glob only happens to hold them.

    Args:
        root: The folder, glob or manifest.
        reading: How files are read; with `dicom.series` at `all` each series is a volume, with
            `stacks` at `folder` each folder of slices, with `volumes_4d` at `samples` each time
            point of a 4D file; with a mask, that of each is looked for.
        named: Ids that are taken whatever they are called, for example those of an earlier run.
        say: Takes a line on what was left out or passed over.

    Returns:
        Volumes sorted by id, or in the manifest's order.

    Example:
        >>> find_subjects("data/**/*_T1.nii.gz")
    """
    root = Path(root).expanduser()
    return list(
        time_points(with_masks(listed(root, reading, named, say), reading.mask, root), reading)
    )


def listed(root: Path, reading: Reading, named: Collection[str], say: Say) -> list[Subject]:
    """List the files, one subject each."""
    if root.suffix.lower() in SUFFIXES and root.is_file():
        return manifest_subjects(root)
    passed: list[str] = []
    if (url := url_of(root)) and not any(part.endswith(ZARR) for part in fixed_parts(root)):
        paths, base = in_bucket(url), Path(*fixed_parts(root))
        if paths == [root]:
            base = (split_dataset(root) or (root, ""))[0].parent
    elif is_store(root) and (url or root.is_dir() or not glob.has_magic(str(root))):
        paths, base = [root], root.parent
    elif split_dataset(root):
        paths, base = datasets(root), Path(str(root).split("*")[0].split("?")[0] + "x").parent
    elif root.is_dir():
        paths, base = sorted(volumes_below(root, passed.append)), root
    elif root.is_file() or root.is_symlink() or split_series(root)[1]:  # also with a [ in its name
        paths, base = [root], root.parent
    elif glob.has_magic(str(root)):
        paths = [
            path
            for path in map(Path, sorted(glob.glob(str(root), recursive=True)))
            if volume_suffix(path) or path.is_dir() or asked_is_dicom(path)
        ]
        base = Path(str(root).split("*")[0].split("?")[0].split("[")[0] + "x").parent
    else:
        raise ValueError(f"{root}: no such folder, glob or manifest (data.root)")
    if reading.stacks == "folder":
        paths = in_stacks(paths)
    if not paths:
        formats = " ".join(READERS)
        line = f"{root}: holds no volumes (data.root); formats are {formats}"
        raise ValueError("; ".join([line, *(over.removeprefix(f"{root}: ") for over in passed)]))
    for line in passed:
        say(line)
    names = names_of(paths, base, named)
    subjects = [Subject(id, (path,)) for id, path in zip(names, paths, strict=True)]
    if paths != [root] and not is_label_map(relative_to(root, base)):  # not named themselves
        subjects = without_label_maps(subjects, root, base, named, say)
    return each_series(subjects, reading.dicom) if reading.dicom.series == "all" else subjects


def fixed_parts(root: Path) -> list[str]:
    """Parts of a path before the first that is a pattern."""
    return list(itertools.takewhile(lambda part: not set(part) & set("*["), root.parts))


def in_bucket(url: str) -> list[Path]:
    """Return the stores of a folder or glob behind a URL; other files have to be fetched first."""
    file, dataset = split_dataset(url) or (None, "")
    if file is None and is_tiff(url) and not glob.has_magic(url):
        paths = [Path(url)]
    elif file is None:
        paths = [*map(Path, stores_at(url, TIFF))]
    elif glob.has_magic(str(file)):
        found = stores_at(url_of(file) or str(file), HDF5)
        paths = [Path(f"{name}:/{dataset}") for name in found if name.lower().endswith(HDF5)]
    else:
        paths = [Path(url)]
    if not paths:
        there = "holds no zarr and no TIFF (data.root); other files are read on disk"
        raise ValueError(f"{url}: {there}")
    return paths


def datasets(pattern: Path) -> list[Path]:
    """Return a dataset of each HDF5 file that a glob finds, `data/*.h5:/raw`."""
    file, name = split_dataset(pattern) or (pattern, "")
    return [Path(f"{found}:/{name}") for found in sorted(glob.glob(str(file), recursive=True))]


def in_stacks(paths: list[Path]) -> list[Path]:
    """Put a folder in the place of the slices that lie in it; other files stay."""
    slices = Counter(path.parent for path in paths if volume_suffix(path) in SLICES)
    stacks = {folder for folder, count in slices.items() if count > 1}
    return list({
        path.parent if path.parent in stacks and volume_suffix(path) in SLICES else path: None
        for path in paths
    })  # fmt: skip


def without_label_maps(
    subjects: list[Subject], root: Path, base: Path, named: Collection[str], say: Say
) -> list[Subject]:
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


def volumes_below(root: Path, say: Say = tell) -> list[Path]:
    """Walk a folder: files that a reader takes, and folders that hold DICOM slices.

    DICOM is known by its first bytes, whatever a file is called. What is passed over is told in one
    line, caches and runs of ours among it. Dot-files are skipped, links are followed, a loop of
    links is walked once.
    """
    found, passed, seen, todo = [], Passed(), set(), [root]
    while todo:
        folder = todo.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        names = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
        if folder != root and (ours := OURS.keys() & names):
            passed.objects[OURS[min(ours)]] += 1
            continue
        headers = {name.rpartition(".")[0] for name in names if name.endswith(DETACHED)}
        slices = False
        for path in (folder / name for name in names):
            suffix = volume_suffix(path)
            if path.is_dir():
                if path.suffix.lower() in PASSED:
                    passed.files[path.suffix.lower()] += 1
                elif is_store(path):
                    found.append(path)
                else:
                    todo.append(path)
            elif suffix not in (None, *DICOM_SUFFIXES):
                found.append(path)
            elif asked_is_dicom(path):
                name = object_name(path)
                slices = slices or name is None
                passed.objects.update([name] if name else [])
            elif path.suffix.lower() in DICOM_SUFFIXES:
                slices = True  # or broken, which is told when it is read
            elif not any(path.name.startswith(f"{header}.") for header in headers):
                passed.files[path.suffix.lower() or "without suffix"] += 1
        if slices:
            found.append(folder)
    passed.tell(root, say)
    return found


def asked_is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM; not one that cannot be opened, or would block."""
    try:
        return path.is_file() and is_dicom(path)
    except OSError:  # not ours to read: it is counted with those that are passed over
        return False


@dataclass
class Passed:
    """What a walk passes over: files that no reader takes, and DICOM objects without an image.

    Args:
        files: How many of which suffix.
        objects: How many of which kind.
    """

    files: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)

    def tell(self, root: Path, say: Say) -> None:
        """Say it in one line; nothing if nothing was passed over."""
        count = self.files.total() + self.objects.total()
        if count:
            kinds = [
                (kind, counted[kind])
                for counted in (self.files, self.objects)
                for kind in sorted(counted, key=lambda kind: (-counted[kind], kind))
            ]
            parts = [f"{number} {kind}" for kind, number in kinds[:8]] + ["..."] * (len(kinds) > 8)
            files = "file" if count == 1 else "files"
            say(f"{root}: passed over {count} {files}: {', '.join(parts)}")


def each_series(subjects: list[Subject], options: Dicom) -> list[Subject]:
    """Make each series of a DICOM folder that holds several a subject, named by its description."""
    found, taken = [], {subject.id.casefold() for subject in subjects}
    for subject in subjects:
        (path,) = subject.paths
        try:
            series = volumes_of(path, options) if path.is_dir() and holds_dicom(path) else {}
        except BrokenVolume:
            series = {}  # a broken folder stays one volume, which is told when it is read
        if len(series) < 2:
            found.append(subject)
            continue
        for path, name in series.items():
            id = stem = f"{subject.id}__{name}"
            for number in itertools.count(2):
                if id.casefold() not in taken:
                    break
                id = f"{stem}_{number}"
            taken.add(id.casefold())
            found.append(replace(subject, id=id, paths=(path,)))
    return found
