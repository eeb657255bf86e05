"""Who trains, validates and tests: persons are dealt to splits."""

from __future__ import annotations

import hashlib
from collections import Counter

from loaders.subjects import Subject

SPLITS = ("train", "val", "test")


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
