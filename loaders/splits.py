"""Which volumes there are, whose they are, and who trains, validates and tests."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from loaders.readers import READERS, is_dicom, volume_suffix

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Subject:
    """One volume to load and what is known about it.

    Args:
        id: Unique name, safe as a file name; from the path relative to the root.
        paths: One file or DICOM folder; several are stacked as channels.
        split: train, val or test where the manifest says so.
        labels: Further manifest columns, for example group or site.
    """

    id: str
    paths: tuple[Path, ...]
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def person(self) -> str:
        """Whose volume it is: all volumes of a person share a split.

        The manifest's `subject` column, else BIDS' `sub-...` in the path, else the volume's id.
        """
        bids = re.search(r"sub-[A-Za-z0-9]+", self.id)
        return self.labels.get("subject") or (bids.group() if bids else self.id)


def find_subjects(root: str | Path) -> list[Subject]:
    """List the volumes under a folder (recursive), of a glob, or of a CSV or JSON manifest.

    A manifest has the column `path` (relative to the manifest; several files separated by `;`
    become channels) and, where wanted, `id`, `subject` (whose volume it is), `split`, `label` (a
    label map for the sampler) and any further columns, for example a group to balance by.

    Args:
        root: The folder, glob or manifest.

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


def names_of(paths: list[Path], base: Path) -> list[str]:
    """Return unique ids: path relative to `base` without suffix, `/` as `__`."""

    def name(path: Path, keep_suffix: bool) -> str:
        relative = os.path.relpath(path, base)
        relative = path.name if relative == "." else relative
        suffix = "" if keep_suffix else (volume_suffix(path) or "")
        if suffix and not path.is_dir():
            relative = relative[: -len(suffix)]
        return relative.replace("..", "").strip("/\\").replace(os.sep, "__")

    short = [name(path, False) for path in paths]
    # Names are compared as a case-folding disk would, where a.nii and A.nii are one output file.
    count = Counter(id.casefold() for id in short)
    long = [
        id if count[id.casefold()] == 1 else name(path, True)
        for id, path in zip(short, paths, strict=True)
    ]
    count = Counter(id.casefold() for id in long)
    return [
        id if count[id.casefold()] == 1
        else f"{id}-{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
        for id, path in zip(long, paths, strict=True)
    ]  # fmt: skip


def manifest_subjects(manifest: Path) -> list[Subject]:
    """Read a CSV with a header line, or a JSON list of objects."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
        if manifest.suffix.lower() == ".json":
            rows = json.loads(text)
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except (ValueError, RecursionError) as error:  # RecursionError: nested without end
        raise ValueError(f"{manifest}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{manifest}: must be a list of objects with the key 'path'")
    if not rows:
        raise ValueError(f"{manifest}: holds no volumes (data.root)")
    all_paths, labels = [], []
    for number, row in enumerate(rows, start=1):
        row = {str(key).strip(): value for key, value in row.items() if key is not None}
        entry = row.pop("path", None)
        if not entry:
            raise ValueError(f"{manifest}: row {number} has no 'path'")
        parts = entry if isinstance(entry, list) else str(entry).split(";")
        all_paths.append(tuple(manifest.parent / part.strip() for part in parts))
        labels.append({k: str(v).strip() for k, v in row.items() if v not in (None, "")})
        if "label" in labels[-1]:
            labels[-1]["label"] = str(manifest.parent / labels[-1]["label"])
    # Ids come from the paths, relative to the folder that holds them all.
    firsts = [paths[0] for paths in all_paths]
    common = Path(os.path.commonpath([os.path.abspath(path.parent) for path in firsts]))
    ids = names_of([Path(os.path.abspath(path)) for path in firsts], common)
    ids = [row.pop("id", id) for id, row in zip(ids, labels, strict=True)]
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{manifest}: id {twice[0]!r} is given twice")
    splits = [row.pop("split", None) for row in labels]
    for id, split in zip(ids, splits, strict=True):
        if split is not None and split not in SPLITS:
            raise ValueError(f"{manifest}: {id} has the split {split!r}: use train, val or test")
    return [
        Subject(*values) for values in zip(ids, all_paths, splits, labels, strict=True)
    ]  # fmt: skip


def split_subjects(
    subjects: list[Subject], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> dict[str, list[str]]:
    """Deal persons to train, val and test; adding one moves no other.

    Each person's name is hashed to a number in [0, 1) that falls into one of three ranges. A range
    that would stay empty takes the person that lies nearest to it (small sets only). A split that
    the manifest gives wins.

    Args:
        subjects: The volumes.
        fractions: Parts for train, val and test; they sum to 1.

    Returns:
        Volume ids of each split, {"train": [...], "val": [...], "test": [...]}.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"data.fractions are {tuple(fractions)}: three parts that sum to 1")
    given: dict[str, str] = {}
    for subject in subjects:
        if subject.split and given.setdefault(subject.person, subject.split) != subject.split:
            raise ValueError(
                f"subject {subject.person!r} is in {given[subject.person]} and in {subject.split}: "
                f"all volumes of a subject belong in one split"
            )
    place = {s.person: stable_fraction(s.person) for s in subjects if s.person not in given}
    edges = {"train": (0.0, fractions[0]), "val": (fractions[0], sum(fractions[:2])),
             "test": (sum(fractions[:2]), 1.0)}  # fmt: skip
    split_of = dict(given)
    for person, at in place.items():
        split_of[person] = next(
            (name for name, (low, high) in edges.items() if low <= at < high), "test"
        )
    if not given:
        fill_empty(split_of, place, edges)
    return {name: [s.id for s in subjects if split_of[s.person] == name] for name in SPLITS}


def fill_empty(split_of: dict[str, str], place: dict[str, float], edges: dict) -> None:
    """Give each empty split with a share the person nearest to it, from a split that has two."""
    for name in ("train", "val", "test"):
        low, high = edges[name]
        if low < high and name not in split_of.values():
            count = Counter(split_of.values())
            spare = [person for person in place if count[split_of[person]] > 1]
            if spare:
                nearest = min(spare, key=lambda p: max(low - place[p], place[p] - high))
                split_of[nearest] = name


def stable_fraction(name: str) -> float:
    """Hash a name to [0, 1), the same on every machine and for ever."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
