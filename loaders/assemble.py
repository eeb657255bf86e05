"""A subject's voxels: its files become channels of one volume, with its mask and without NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from loaders.in_place import needs_copy
from loaders.masks import hide, read_weights
from loaders.readers import (
    SLICES,
    BrokenVolume,
    MissingFile,
    Reading,
    Volume,
    check_one_grid,
    is_there,
    read_volume,
    url_of,
    volume_suffix,
)
from loaders.series import at_time
from loaders.subjects import Subject

Used = TypeVar("Used")


def sources(subject: Subject) -> list[Path]:
    """Return the files that a volume is made of."""
    return [*subject.paths, subject.mask] if subject.mask else list(subject.paths)


def other_channels(given: int, taken: int | None) -> str:
    """Say that a volume has other channels than the model takes, and what can be done."""
    return (
        f"gives {given} channels, the model takes {taken}: give it other volumes, or train one with"
        f" --model.in_channels {given}"
    )


def color_hint(subject: Subject, channels: set[int | None]) -> str:
    """What makes gray and colored pictures alike, to be said where these are such."""
    pictures = channels == {1, 3} and volume_suffix(subject.paths[0]) in SLICES
    return "; --data.color gray or rgb makes pictures alike" if pictures else ""


def missing_files(subject: Subject) -> list[Path]:
    """Files that a subject lacks while others are there; a link that leads nowhere is broken."""
    lacking = [path for path in subject.paths if not (is_there(path) or path.is_symlink())]
    return lacking if len(lacking) < len(subject.paths) else []


def read_subject(subject: Subject, reading: Reading) -> Volume:
    """Read the files of a subject, all time points of them, and its mask."""
    volume = read_channels(subject, reading)
    if subject.mask is None:
        return volume
    times = subject.time.count if subject.time else 1
    return replace(volume, weights=read_weights(subject.mask, volume, times, reading))


def read_channels(subject: Subject, reading: Reading) -> Volume:
    """Read the files of a subject; several become channels and must share one grid."""
    missing = missing_files(subject)
    if missing and reading.missing != "zero":
        raise lacks(subject, missing[0])
    present = [path for path in subject.paths if path not in missing]
    read = dict(zip(present, (read_volume(path, reading) for path in present), strict=True))
    check_one_grid(read)
    first = read[present[0]]
    if len(subject.paths) == 1:
        return first
    times = subject.time.count if subject.time else 1
    nothing = replace(first, data=np.zeros_like(first.data[:times]), notes=())
    return stacked([read.get(path, nothing) for path in subject.paths], nothing)


def require_files(subject: Subject, reading: Reading) -> None:
    """Refuse a volume that stays where it is and lacks one of its files."""
    missing = missing_files(subject)
    if missing and reading.missing == "zero":
        raise BrokenVolume(missing[0], f"is missing; its volume {needs_copy('data.missing zero')}")
    if missing:
        raise lacks(subject, missing[0])


def with_remedy(error: BrokenVolume, count: int) -> BrokenVolume:
    """Name the option that leaves a broken volume out, where it is one of several."""
    if count < 2 or isinstance(error, MissingFile):  # that names its own
        return error
    reason = f"{error.reason}; --data.on_error skip leaves such volumes out"
    return BrokenVolume(error.path, reason)


def lacks(subject: Subject, path: Path) -> MissingFile:
    """Say that a subject lacks one of its files, and what can be done."""
    number = subject.paths.index(path) + 1
    return MissingFile(
        path,
        f"{subject.id} lacks this file, its {number}. of {len(subject.paths)}: --data.missing skip "
        f"leaves such subjects out, zero gives a channel of zeros",
    )


def stacked(volumes: list[Volume], nothing: Volume) -> Volume:
    """Stack volumes of one grid as channels; `nothing` stands for a missing one."""
    first, missing, channels = volumes[0], [], 0
    named = tuple(channel for volume in volumes for channel in volume.look.channels)
    look = replace(first.look, channels=named)
    for volume in volumes:
        missing += [channels] if volume is nothing else []
        channels += len(volume.data)
    kinds = {(volume.data.dtype, volume.scale, volume.offset) for volume in volumes}
    notes = tuple({note: None for volume in volumes for note in volume.notes})
    if len(kinds) > 1:  # one array needs one dtype and scale
        data = np.concatenate([volume.intensities() for volume in volumes])
        one = replace(first, data=data, scale=1.0, offset=0.0)
        return replace(one, missing=tuple(missing), notes=notes, look=look)
    data = np.concatenate([volume.data for volume in volumes])
    return replace(first, data=data, missing=tuple(missing), notes=notes, look=look)


def read_each(
    group: Sequence[Subject], reading: Reading, use: Callable[[Subject, Volume], Used]
) -> list[Used | BrokenVolume]:
    """Read the files of subjects that share them, once, and use the volume of each in turn.

    Returns:
        What `use` returned for each subject, or the error that it, or reading, ended with.
    """
    try:
        whole = read_subject(group[0], reading)
    except BrokenVolume as error:
        return [error] * len(group)
    return each(group, lambda subject: use(subject, at_time(whole, subject.time)))


def each(group: Sequence[Subject], use: Callable[[Subject], Used]) -> list[Used | BrokenVolume]:
    """Return what came of each subject, or the error that it ended with."""
    found: list[Used | BrokenVolume] = []
    for subject in group:
        try:
            found.append(use(subject))
        except BrokenVolume as error:
            if subject.time:
                reason = f"time point {subject.time.number}: {error.reason}"
                error = BrokenVolume(error.path, reason)
            found.append(error)
    return found


def storable(volume: Volume, path: Path, nan: str) -> Volume:
    """Return at most 4 bytes a voxel; NaN, infinity and what does not count as the policy says."""
    data, weights = volume.data, volume.weights
    kind, size = data.dtype.kind, data.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # what overflows float32 is told below
            data = data.astype(np.float32, copy=False)
    if nan == "mask":
        sound = np.isfinite(data).all(0, keepdims=True)
        weights = sound.astype(np.uint8) if weights is None else weights * sound
    if weights is not None:
        data = hide(data, weights, volume.scale > 0, path)
    if kind == "f":
        finite = np.isfinite(data)
        if not finite.all():
            bad = data.size - int(finite.sum())
            if bad == data.size:  # as float32; those of the file are not all, see `read_volume`
                raise BrokenVolume(path, "all voxels are beyond the range of float32")
            if nan == "error":
                raise BrokenVolume(
                    path,
                    f"{bad} voxels are NaN or infinite: set data.nan to fill or to mask",
                )
            data = np.where(finite, data, data[finite].min())
    elif kind == "b":
        data = data.view(np.uint8)
    elif size == 8 or (kind == "u" and size == 4):
        low, high = int(data.min()), int(data.max())
        fits = low >= -(2**31) and high < 2**31
        data = data.astype(np.int32 if fits else np.float32)
    return replace(volume, data=data, weights=weights)


def note_lines(notes: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """Return what readers had to assume, once for all volumes of which it is true.

    Args:
        notes: File and notes of each volume.
    """
    paths: dict[str, list[Path]] = {}
    for path, note in ((path, note) for path, of_volume in notes for note in of_volume):
        paths.setdefault(note, []).append(path)
    return [
        f"{url_of(of[0]) or of[0]}: {note} ({len(of)} of {len(notes)} volumes)"
        for note, of in paths.items()
    ]
