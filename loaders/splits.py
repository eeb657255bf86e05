"""Who trains, validates and tests: persons are dealt to splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from loaders.subjects import Subject

SPLITS = ("train", "val", "test")
Split = dict[str, list[str]]  # train, val and test -> the ids of their volumes


def split_subjects(
    subjects: Sequence[Subject],
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    folds: int | None = None,
    fold: int = 0,
    stratify_by: str | None = None,
) -> Split:
    """Deal persons to train, val and test; adding one moves no other.

    Each person's name is hashed to a number in [0, 1) that falls into one of three ranges. A range
    that would stay empty takes the person that lies nearest to it (small sets only), train first.
    A split that the manifest gives wins. Folds and strata are dealt in equal shares instead, so
    there a new person may move others.

    Args:
        subjects: The volumes.
        fractions: Parts for train, val and test; they sum to 1.
        folds: Cut what does not test into so many folds: one validates, the others train.
        fold: Which of them validates, from 0.
        stratify_by: Manifest column whose values come in equal shares in every part.

    Returns:
        Volume ids of each split, {"train": [...], "val": [...], "test": [...]}.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"data.fractions are {tuple(fractions)}: three parts that sum to 1")
    split_of = given_splits(subjects)
    strata = strata_of(subjects, stratify_by)
    free = {person: stratum for person, stratum in strata.items() if person not in split_of}
    if stratify_by is None:
        fill = SPLITS if not split_of else ("train",) if "train" not in split_of.values() else ()
        split_of |= by_hash(list(free), fractions, fill)
    else:
        split_of |= deal(free, dict(zip(SPLITS, fractions, strict=True)))
    if folds is not None:
        kept = {person: strata[person] for person, name in split_of.items() if name != "test"}
        check_folds(subjects, folds, fold, len(kept))
        numbers = deal(kept, {str(number): 1 / folds for number in range(folds)})
        split_of |= {p: "val" if number == str(fold) else "train" for p, number in numbers.items()}
    return {name: [s.id for s in subjects if split_of[s.person] == name] for name in SPLITS}


def given_splits(subjects: Sequence[Subject]) -> dict[str, str]:
    """Return the split of each person that the manifest gives one."""
    given: dict[str, Subject] = {}
    for subject in subjects:
        if subject.split:
            first = given.setdefault(subject.person, subject)
            if first.split != subject.split:
                raise ValueError(
                    f"subject {subject.person!r} is in {first.split} and in {subject.split} "
                    f"({first.id}, {subject.id}): all volumes of a subject belong in one split"
                )
    return {person: subject.split for person, subject in given.items() if subject.split}


def strata_of(subjects: Sequence[Subject], stratify_by: str | None) -> dict[str, str]:
    """Return each person's value of a manifest column, all of them where volumes differ."""
    values: dict[str, set[str]] = defaultdict(set)
    for subject in subjects:
        values[subject.person].add(subject.labels.get(stratify_by, "") if stratify_by else "")
        if stratify_by and not subject.labels.get(stratify_by):
            raise ValueError(
                f"data.stratify_by: the manifest has no {stratify_by!r} for {subject.id}"
            )
    return {person: ", ".join(sorted(found)) for person, found in values.items()}


def check_folds(subjects: Sequence[Subject], folds: int, fold: int, persons: int) -> None:
    """Refuse folds that cannot be made."""
    if not 2 <= folds <= persons:
        raise ValueError(f"data.folds is {folds}: use 2 to {persons}, the persons that do not test")
    if not 0 <= fold < folds:
        raise ValueError(f"data.fold is {fold}: of {folds} folds use 0 to {folds - 1}")
    fixed = next((s for s in subjects if s.split in ("train", "val")), None)
    if fixed is not None:
        raise ValueError(
            f"data.folds is {folds}, but the manifest puts {fixed.id} into {fixed.split}: with "
            f"folds, leave the column split empty for all that do not test"
        )


def by_hash(
    people: list[str], fractions: tuple[float, float, float], fill: tuple[str, ...]
) -> dict[str, str]:
    """Deal by hashed names alone.

    Args:
        people: Persons.
        fractions: Parts for train, val and test.
        fill: Splits that must not stay empty where they have a share.
    """
    place = {person: stable_fraction(person) for person in people}
    edges = {"train": (0.0, fractions[0]), "val": (fractions[0], sum(fractions[:2])),
             "test": (sum(fractions[:2]), 1.0)}  # fmt: skip
    split_of = {
        person: next((name for name, (low, high) in edges.items() if low <= at < high), "test")
        for person, at in place.items()
    }
    for name in fill:
        low, high = edges[name]
        if low < high and name not in split_of.values():
            count = Counter(split_of.values())
            # Nobody trains: that takes even the last one of another split.
            spare = [p for p in people if count[split_of[p]] > 1 or name == "train"]
            if spare:
                nearest = min(spare, key=lambda p: max(low - place[p], place[p] - high))
                split_of[nearest] = name
    return split_of


def deal(strata: dict[str, str], shares: dict[str, float]) -> dict[str, str]:
    """Deal persons in equal shares, in all and within each stratum.

    Strata one after the other, in each by hashed names; a person goes to the part that lacks most.

    Args:
        strata: Person -> stratum.
        shares: Part -> its share; they sum to 1.
    """
    order = sorted(strata, key=lambda person: (strata[person], stable_fraction(person)))
    dealt: Counter[str] = Counter()
    dealt_within: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    part_of: dict[str, str] = {}
    for number, person in enumerate(order, start=1):
        stratum = strata[person]
        seen[stratum] += 1

        def lack(part: str, number: int = number, stratum: str = stratum) -> float:
            in_all = shares[part] * number - dealt[part]
            return in_all + shares[part] * seen[stratum] - dealt_within[stratum, part]

        part = max((part for part in shares if shares[part] > 0), key=lack)
        dealt[part] += 1
        dealt_within[stratum, part] += 1
        part_of[person] = part
    return part_of


def changes_since(
    today: Mapping[str, str | None], split: Split, force: bool = False, root: str = "data.root"
) -> tuple[Split, list[str]]:
    """Hold the split of a run that goes on against today's data.

    Args:
        today: The volumes of today, and the part that a manifest puts them in.
        split: That of the run's split.json.
        force: Go on without volumes that are gone, and although the manifest's parts have changed.
        root: Where the volumes lie, for messages.

    Returns:
        The run's split, less what is gone, and what to tell.
    """
    part_of = {id: name for name, ids in split.items() for id in ids}
    gone = sorted(part_of.keys() - today.keys())
    moved = [
        f"{id} ({part_of[id]} -> {part})"
        for id, part in today.items()
        if part and part_of.get(id, part) != part
    ]
    new = [id for id in today if id not in part_of]
    found = {"gone": gone, "in another split": moved, "new and not used": new}
    changes = [f"{len(ids)} {what}: {some(ids)}" for what, ids in found.items() if ids]
    if not changes:
        return split, []
    line = f"{root} has changed since this run began: {'; '.join(changes)}"
    if (gone or moved) and not force:
        raise ValueError(
            f"{line}. Put it back, go on by --force with the run's own split of what is left, or"
            " begin anew with --fresh"
        )
    lacking = set(gone)
    kept = {name: [id for id in ids if id not in lacking] for name, ids in split.items()}
    return kept, [f"{line}. The run keeps its own split; --fresh begins anew"]


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names, and how many there are besides."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def stable_fraction(name: str) -> float:
    """Hash a name to [0, 1), the same on every machine and for ever."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
