"""Whose volumes they are: one person's must not lie on two sides of a split.

Asked in this order, volume by volume: what the user says (`data.group_by`, or the manifest's column
`subject`), the PatientID of DICOM, the `sub-...` of BIDS, a folder that holds one person's volumes,
the case of nnU-Net's `case_0000`, `case_0001`, and last the volume itself. A PatientID is hashed as
soon as it is read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from loaders.readers import is_store, patient_of, split_series, volume_suffix
from loaders.series import by_file
from loaders.subjects import Subject, bids_person
from loaders.versions import digest, files_of

Owner = tuple[str, str]  # a person, and how it was found
SIBLINGS = 3  # a folder is a person's only where so many lie side by side and look the same,
FEW = 12  # with not more names of files than this among them
SAMPLE = 2**14  # bytes compared before whole files are: first, middle and last
NO_PERSONS = re.compile(r"(train|val|valid|validation|test|images|labels).{0,4}", re.IGNORECASE)


def find_persons(
    subjects: Sequence[Subject], base: Path, group_by: str | None = None
) -> tuple[list[Subject], list[str]]:
    """Say of each volume whose it is.

    Args:
        subjects: The volumes.
        base: Folder that names of paths begin below.
        group_by: A manifest column, or a regular expression that is searched in each path below
            `base`: its groups, or all that it matches, name the person. None to find out.

    Returns:
        The subjects with their owners, and what to tell: how persons were found, in one line, and
        what speaks against it.

    Example:
        >>> find_persons(subjects, Path("BraTS-GLI"), r"BraTS-GLI-(\\d+)")
    """
    series = by_file(subjects)  # time points of one file are of one person
    heads = [group[0] for group in series]
    below = {
        s.id: path_below(next(filter(os.path.lexists, s.paths), s.paths[0]), base) for s in heads
    }
    if group_by is not None:
        owners = grouped(heads, below, group_by)
        notes: list[str] = []
    else:
        owners, notes = sought(heads, below)
    itself = [s.time.series if s.time else s.id for s in heads]
    owned = [
        owners.get(s.id, (own, "the volume itself")) for s, own in zip(heads, itself, strict=True)
    ]
    how: Counter[str] = Counter()
    for group, (_, way) in zip(series, owned, strict=True):
        how[way] += len(group)
    found = [replace(s, owner=name) for s, (name, _) in zip(heads, owned, strict=True)]
    found, copies = keep_copies_together(found)
    owner_of = {s.id: head.owner for head, group in zip(found, series, strict=True) for s in group}
    found = [replace(s, owner=owner_of[s.id]) for s in subjects]
    ways = ", ".join(f"{count} by {way}" for way, count in how.most_common())
    persons = len({s.person for s in found})
    return found, [f"persons: {persons} in {len(found)} volumes ({ways})", *notes, *copies]


def sought(
    subjects: Sequence[Subject], below: dict[str, PurePosixPath]
) -> tuple[dict[str, Owner], list[str]]:
    """Find persons where nobody says how; volumes that nothing groups are left out."""
    owners: dict[str, Owner] = {
        s.id: (s.labels["subject"], "the manifest's column subject")
        for s in subjects
        if "subject" in s.labels
    }
    patients, notes = patients_of([s for s in subjects if s.id not in owners])
    owners |= {id: (name, "PatientID") for id, name in patients.items()}
    for s in subjects:
        path = below[s.id]
        bids = bids_person(s.id) or bids_person(str(path.with_name(stem(path))))
        if bids and s.id not in owners:
            owners[s.id] = bids, "BIDS names (sub-...)"
    rest = {id: path for id, path in below.items() if id not in owners}
    owners |= {id: (name, "folder") for id, name in persons_by_folder(rest).items()}
    rest = {id: path for id, path in rest.items() if id not in owners}
    owners |= {id: (name, "nnU-Net names (..._0000)") for id, name in persons_by_case(rest).items()}
    return owners, notes


def grouped(
    subjects: Sequence[Subject], below: dict[str, PurePosixPath], group_by: str
) -> dict[str, Owner]:
    """Name persons by a manifest column or by a pattern; a volume without one is an error."""
    if any(group_by in s.labels for s in subjects):
        lacking = [s.id for s in subjects if group_by not in s.labels]
        if lacking:
            raise ValueError(f"data.group_by: the manifest has no {group_by!r} for {lacking[0]}")
        return {s.id: (s.labels[group_by], f"the column {group_by}") for s in subjects}
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ValueError(f"data.group_by {group_by!r} is no regular expression ({error})") from None
    owners = {}
    for s in subjects:
        match = pattern.search(str(below[s.id]))
        name = match and ("-".join(group or "" for group in match.groups()) or match.group())
        if not name:
            raise ValueError(
                f"data.group_by {group_by!r} is no column of a manifest and matches nothing in "
                f"{below[s.id]}"
            )
        owners[s.id] = name, "data.group_by"
    return owners


def patients_of(subjects: Sequence[Subject]) -> tuple[dict[str, str], list[str]]:
    """Return hashed PatientIDs of DICOM volumes, and what is wrong with those left out."""
    raw: dict[str, str] = {}
    for s in subjects:
        path = s.paths[0]
        dicom = path.is_dir() or volume_suffix(path) in (None, ".dcm")
        if dicom and not is_store(path):
            patient = patient_of(path)
            if patient is not None:
                raw[s.id] = patient
    count = Counter(raw.values())
    common = {patient for patient, n in count.items() if patient and 2 * n > len(subjects)}
    notes = []
    if count[""]:
        notes.append(f"PatientID: empty in {count['']} of {len(raw)} volumes; they are told apart "
                     f"by their names (data.group_by decides otherwise)")  # fmt: skip
    if common and len(subjects) > 1:
        notes.append(f"PatientID: the same in {max(count[p] for p in common)} of {len(subjects)} "
                     f"volumes, so it is not used for them; they are told apart by their names "
                     f"(data.group_by decides otherwise)")  # fmt: skip
    kept = {id: patient for id, patient in raw.items() if patient and patient not in common}
    shown = sum(
        re.search(rf"(?<!\w){re.escape(patient)}(?!\w)", id.replace("__", "/")) is not None
        for id, patient in raw.items()
        if patient
    )
    if shown:
        notes.append(f"PatientID: the names of {shown} volumes show it, and so will split.json and "
                     f"reports; a manifest with the column id gives other names")  # fmt: skip
    return {id: f"patient-{hashed(patient)}" for id, patient in kept.items()}, notes


def hashed(patient: str) -> str:
    """Hash a PatientID: equal ones stay equal, and none is read off."""
    return hashlib.blake2b(patient.encode(), digest_size=12, person=b"vae3d patient").hexdigest()


def persons_by_folder(paths: dict[str, PurePosixPath]) -> dict[str, str]:
    """Return the folders that are persons: several of them side by side hold the same few names.

    So do `P01/P01_t1c`, `P01/P01_t2w`, `P02/...`; `siteA/001`, `siteB/001` do not, since numbers
    are no names, nor do folders of many files. The uppermost such folder is the person's.
    """
    persons: dict[str, str] = {}
    for depth in range(1, max((len(path.parts) for path in paths.values()), default=0)):
        children: dict[PurePosixPath, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for id, path in paths.items():
            if id not in persons and len(path.parts) > depth:
                folder = PurePosixPath(*path.parts[:depth])
                children[folder.parent][folder.name].append(id)
        for parent, folders in children.items():
            roles = {
                name: roles_of([paths[id] for id in ids], depth, name)
                for name, ids in folders.items()
                if not NO_PERSONS.fullmatch(name)
            }
            for name in that_look_alike(roles):
                persons |= dict.fromkeys(folders[name], str(parent / name))
    return persons


def persons_by_case(paths: dict[str, PurePosixPath]) -> dict[str, str]:
    """Return the cases whose channels lie in one folder as nnU-Net names them: `case_0000`, ..."""
    folders: dict[PurePosixPath, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for id, path in paths.items():
        if match := re.fullmatch(r"(.+)_(\d{4})", stem(path)):
            folders[path.parent][match[1]][id] = match[2]
    return {
        id: str(folder / case)
        for folder, cases in folders.items()
        for case in that_look_alike({name: set(ids.values()) for name, ids in cases.items()})
        for id in cases[case]
    }


def that_look_alike(roles: dict[str, set[str]]) -> list[str]:
    """Return who of them, by name, holds what several others hold, if that is more than one thing.

    Args:
        roles: What each holds.
    """
    count = Counter(role for held in roles.values() for role in held)
    shared = {role for role, n in count.items() if n >= SIBLINGS}
    if len(shared) < 2 or len(count) > FEW:
        return []
    return [name for name, held in roles.items() if held & shared]


def roles_of(paths: list[PurePosixPath], depth: int, folder: str) -> set[str]:
    """Return what the names of a folder's files say beside whose they are: t1c, anat/T2w, ...

    Words that all of them begin with are not among it; of one file, words of its folder's name.
    """
    words = [re.split(r"[_\-. ]+", stem(path)) for path in paths]
    others = words if len(words) > 1 else [*words, re.split(r"[_\-. ]+", folder)]
    shared = 0
    while len({tuple(name[: shared + 1]) for name in others}) == 1 and shared < len(others[0]):
        shared += 1
    roles = {"/".join([*path.parts[depth:-1], "_".join(name[shared:])])
             for path, name in zip(paths, words, strict=True)}  # fmt: skip
    return {role for role in roles if re.search("[A-Za-z]", role)}


def path_below(path: Path, base: Path) -> PurePosixPath:
    """Return a path relative to a folder, with slashes; the folder itself by its name."""
    relative = os.path.relpath(path, base)
    return PurePosixPath(path.name if relative == "." else relative.replace(os.sep, "/"))


def stem(path: PurePosixPath) -> str:
    """Return the name of a file without the suffix of its format."""
    return path.name[: -len(suffix)] if (suffix := volume_suffix(path.name)) else path.name


def keep_copies_together(subjects: list[Subject]) -> tuple[list[Subject], list[str]]:
    """Give volumes of the same content to one person; tell which they are."""
    leader: dict[str, str] = {}

    def lead(person: str) -> str:
        while person in leader:
            person = leader[person]
        return person

    lines = []
    for first, *others in same_content(subjects):
        for other in others:
            if None not in (first.split, other.split) and first.split != other.split:
                end = f"the manifest puts them into {first.split} and {other.split}"
            else:
                end = "they stay on one side of the split"
                if lead(other.person) != lead(first.person):
                    leader[lead(other.person)] = lead(first.person)
            lines.append(f"identical content: {first.id} and {other.id}, byte by byte; {end}")
    if len(lines) > 3:
        lines[3:] = [f"identical content: {len(lines) - 3} more volumes are copies"]
    return [replace(s, owner=lead(s.person)) for s in subjects], lines


def same_content(subjects: Iterable[Subject]) -> list[list[Subject]]:
    """Group the volumes whose files hold the same bytes.

    Whole files are read only where sizes and a sample agree, which is rarely by chance.
    """
    groups = [list(subjects)]
    for look in (sizes_of, sample_of, content_of):
        finer: dict[tuple, list[Subject]] = defaultdict(list)
        for number, group in enumerate(groups):
            for s in group:
                finer[(number, look(s))].append(s)
        groups = [group for (_, seen), group in finer.items() if seen and len(group) > 1]
    return groups


def sizes_of(subject: Subject) -> tuple[int | str | None, ...]:
    """Sizes of all files of a volume, and which series of them; () where one cannot be read.

    Stores are told apart by where they lie: their voxels are not read for this.
    """
    if any(map(is_store, subject.paths)):
        return ()
    try:
        files = [file for path in subject.paths for file in files_of(path)]
        sizes = tuple(file.stat().st_size for file in files)
    except OSError:  # gone or forbidden: told when it is read
        return ()
    # A pipe would block for ever, and what is empty is not the same as anything.
    if not sum(sizes) or not all(file.is_file() for file in files):
        return ()
    return (*sizes, *(split_series(path)[1] for path in subject.paths))


def sample_of(subject: Subject) -> bytes:
    """Bytes from the begin, the middle and the end of the middle file of each path."""
    seen = b""
    for files in map(files_of, subject.paths):
        path = files[len(files) // 2]
        size = path.stat().st_size
        with open(path, "rb") as file:
            for place in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(place)
                seen += file.read(SAMPLE)
    return hashlib.blake2b(seen).digest()


def content_of(subject: Subject) -> tuple[str, ...]:
    """Hash of all bytes of each path."""
    return tuple(map(digest, subject.paths))
