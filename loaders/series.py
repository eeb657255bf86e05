"""4D files (fMRI, cine, time-lapse) as series: each time point is a volume, all of one person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from loaders.readers import BrokenVolume, Reading, Volume, is_there, num_time_points
from loaders.subjects import Subject, TimePoint


def time_points(subjects: Iterable[Subject], reading: Reading) -> Iterator[Subject]:
    """Yield a subject for each time point of 4D files, `<id>__t000`; others as they are.

    Only with `volumes_4d: samples`. Files are asked for their headers; one that is broken is told
    when it is read, and one that is not there has as many time points as the others.
    """
    for subject in subjects:
        there = [path for path in subject.paths if is_there(path) or path.is_symlink()]
        try:
            counts = [num_time_points(path, reading) for path in there]
        except BrokenVolume:
            counts = []
        count = max(counts, default=1)
        if count == 1:
            yield subject
            continue
        for path, other in zip(there, counts, strict=True):
            if other != count:
                raise BrokenVolume(path, f"has {other} time points, another of its files {count}")
        width = max(3, len(str(count - 1)))
        for number in range(count):
            time = TimePoint(subject.id, number, count)
            yield replace(subject, id=f"{subject.id}__t{number:0{width}d}", time=time)


def by_file(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """Group subjects that are time points of the same files, so that these are read once."""
    groups: dict[object, list[Subject]] = {}
    for subject in subjects:
        own = subject.paths if subject.time else subject.id
        groups.setdefault(own, []).append(subject)
    return list(groups.values())


def at_time(volume: Volume, time: TimePoint | None) -> Volume:
    """Return a view of one time point of a volume that was read with `volumes_4d: samples`."""
    if time is None:
        return volume
    weights = volume.weights
    if weights is not None and len(weights) > 1:
        weights = weights[time.number : time.number + 1]
    missing = tuple(channel // time.count for channel in volume.missing)
    data = volume.data[time.number :: time.count]
    return replace(volume, data=data, weights=weights, missing=missing)
