"""A subject: one volume to load, its name and what is known about it."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from loaders.readers import ZARR, volume_suffix

# `sub-<label>` of BIDS. A label with a digit is a person's whatever follows. One of letters alone
# may be any word, so the name has to be one of BIDS to its end: `sub-sampled_000` is no person.
BIDS = re.compile(
    r"sub-(?:[A-Za-z]*\d[A-Za-z0-9]*|[A-Za-z]+(?=(?:_[a-z]+-[A-Za-z0-9]+)*_[A-Za-z][A-Za-z0-9]*$))"
)


@dataclass(frozen=True)
class TimePoint:
    """Which volume of a 4D file.

    Args:
        series: Id that the whole file would have.
        number: Of the time point, from 0.
        count: Time points of the file.
    """

    series: str
    number: int
    count: int


@dataclass(frozen=True)
class Subject:
    """One volume to load and what is known about it.

    Args:
        id: Unique name, safe as a file name; from the path relative to the root.
        paths: One file or DICOM folder; several are stacked as channels.
        split: train, val or test where the manifest says so.
        labels: Further manifest columns, for example group or site.
        owner: Whose volume it is, where `find_persons` has found out; None where nobody asked.
        mask: File that says which voxels count; None for all alike.
        time: Which volume of the files, where these are 4D and each time point is a sample.
    """

    id: str
    paths: tuple[Path, ...]
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    owner: str | None = None
    mask: Path | None = None
    time: TimePoint | None = None

    @property
    def person(self) -> str:
        """Whose volume it is: all volumes of a person share a split.

        The owner, else the manifest's `subject` column, else BIDS' `sub-...` in the name, else the
        volume's id, for a time point that of its file.
        """
        own = self.time.series if self.time else self.id
        return self.owner or self.labels.get("subject") or bids_person(self.id) or own

    @property
    def label_map(self) -> Path | None:
        """The file of its label map, from the manifest; None where there is none."""
        name = self.labels.get("label_map")
        return Path(name) if name else None


def bids_person(name: str) -> str | None:
    """Return the `sub-<label>` of a name or path that BIDS gave; None where it gave none."""
    found = BIDS.search(name)
    return found.group() if found else None


def names_of(paths: list[Path], base: Path, known: Collection[str] = ()) -> list[str]:
    """Return unique ids: path relative to `base` without suffix, `/` as `__`.

    Args:
        paths: The files.
        base: Folder that holds them all.
        known: Ids of an earlier run, which had kept the `.ome` of `cells.ome.tif`.
    """

    def name(path: Path, keep_suffix: bool) -> str:
        relative = os.path.relpath(path, base)
        relative = path.name if relative == "." else relative
        relative = relative.replace(":/", "/")  # of a dataset in HDF5
        suffix = "" if keep_suffix else (volume_suffix(path) or "")
        if not keep_suffix and relative.lower().endswith(ZARR):
            relative = relative[: -len(ZARR)]
        if suffix and not path.is_dir():
            relative = relative[: -len(suffix)]
        name = relative.replace("..", "").strip("/\\").replace(os.sep, "__")
        return name if keep_suffix or name in known else name.removesuffix(".ome")

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
