"""Manifests: a CSV or JSON table with a row for each volume, as spreadsheets write it."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path, PureWindowsPath

from loaders.readers import url_of, volume_suffix
from loaders.splits import SPLITS
from loaders.subjects import Subject, names_of
from loaders.texts import read_bytes

SUFFIXES = (".csv", ".tsv", ".json")
COLUMNS = ("path", "id", "subject", "split", "label", "label_map")  # known in any case
Row = dict[str, object]


def manifest_subjects(manifest: Path) -> list[Subject]:
    """Read a table with a header line (CSV of any dialect), or a JSON list of objects."""
    rows = read_rows(manifest)
    if not rows:
        raise ValueError(f"{manifest}: holds no volumes (data.root)")
    all_paths, labels = [], []
    for number, row in rows.items():
        entry = row.pop("path", None)
        if not entry:
            there = ", ".join(repr(name) for name in row)
            raise ValueError(f"{manifest}: row {number} has no 'path'; it has {there or 'nothing'}")
        parts = entry if isinstance(entry, list) else str(entry).split(";")
        # A file that the row does not name lies where none can: below the manifest itself.
        nowhere = manifest / f"row {number}, file"
        all_paths.append(tuple(
            located(str(part).strip(), manifest, f"row {number}") if part and str(part).strip()
            else nowhere / str(place) for place, part in enumerate(parts, start=1)
        ))  # fmt: skip
        labels.append({k: str(v).strip() for k, v in row.items() if v not in (None, "")})
    name_label_maps(labels, list(rows), manifest)
    # Ids come from the paths, relative to the folder that holds them all.
    firsts = [next((p for p in paths if manifest not in p.parents), paths[0])
              for paths in all_paths]  # fmt: skip
    common = Path(os.path.commonpath([os.path.abspath(path.parent) for path in firsts]))
    ids = names_of([Path(os.path.abspath(path)) for path in firsts], common)
    ids = [row.pop("id", id) for id, row in zip(ids, labels, strict=True)]
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{manifest}: id {twice[0]!r} is given twice")
    splits = [row.pop("split", "").lower() or None for row in labels]
    for id, split in zip(ids, splits, strict=True):
        if split is not None and split not in SPLITS:
            raise ValueError(f"{manifest}: {id} has the split {split!r}: use train, val or test")
    return [
        Subject(*values) for values in zip(ids, all_paths, splits, labels, strict=True)
    ]  # fmt: skip


def read_rows(manifest: Path) -> dict[int, Row]:
    """Return the rows of a manifest by their numbers from 1, columns by their names."""
    raw = read_bytes(manifest)
    try:
        text = decoded(raw)
        if manifest.suffix.lower() != ".json":
            return table(text, manifest)
        rows = json.loads(text)
    except (csv.Error, UnicodeError, json.JSONDecodeError, RecursionError) as error:
        # RecursionError: nested without end
        raise ValueError(f"{manifest}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{manifest}: must be a list of objects with the key 'path'")
    return {
        number: {column(str(key)): value for key, value in row.items()}
        for number, row in enumerate(rows, start=1)
    }


def decoded(raw: bytes) -> str:
    """Text as Excel saves it: UTF-16 or UTF-8 with a mark, plain UTF-8, else Windows' 1252."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def table(text: str, manifest: Path) -> dict[int, Row]:
    """Rows of a table whose cells are cut by the mark that makes one of them 'path'."""
    text = text.lstrip("\r\n")
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # for Excel alone
        first, text = rest.partition("\n")[0], rest
    for mark in ",;\t":
        names = [column(name) for name in next(csv.reader([first], delimiter=mark), [])]
        if "path" in names:
            break
    else:
        raise ValueError(f"{manifest}: has no column 'path'; its header is {first.strip()[:200]!r}")
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"{manifest}: column {twice[0]!r} is given twice")
    rows: dict[int, Row] = {}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    for number, cells in enumerate(reader):
        if any(cell.strip() for cell in cells[len(names) :]):
            raise ValueError(
                f"{manifest}: row {number} has {len(cells)} cells, the header {len(names)}: "
                f"put what holds a {mark!r} in quotes"
            )
        if number and any(cell.strip() for cell in cells):
            rows[number] = {name: cell.strip() for name, cell in zip(names, cells, strict=False)
                            if name}  # fmt: skip
    return rows


def column(name: str) -> str:
    """Name of a column, without spaces around; what is known here, in lower case."""
    name = name.strip()
    return name.lower() if name.lower() in COLUMNS else name


def located(text: str, manifest: Path, where: str) -> Path:
    """A path as a manifest gives it: relative to it, a URL, with `~`, or written on Windows."""
    if url_of(text):
        return Path(text)
    path = manifest.parent / os.path.expanduser(text)
    if "\\" not in text or os.sep == "\\" or path.exists():
        return path
    if PureWindowsPath(text).drive:
        raise ValueError(
            f"{manifest}: {where}: {text} is on a drive of Windows, which is not known here: "
            f"give paths relative to the manifest"
        )
    return manifest.parent / os.path.expanduser(text.replace("\\", "/"))


def name_label_maps(labels: list[dict[str, str]], numbers: list[int], manifest: Path) -> None:
    """Make paths of the column `label_map`; a column `label` holds classes, or maps as it once did.

    Args:
        labels: Further columns of each row, changed in place.
        numbers: Of the rows.
        manifest: Their file.
    """
    former = [row["label"] for row in labels if "label" in row]
    files = all(volume_suffix(name) or (manifest.parent / name).exists() for name in former)
    if former and files and not any("label_map" in row for row in labels):
        print(f"{manifest}: the column 'label' holds label maps: name it 'label_map', since a "
              f"label is a class", file=sys.stderr)  # fmt: skip
        for row in labels:
            if "label" in row:
                row["label_map"] = row.pop("label")
    for row, number in zip(labels, numbers, strict=True):
        if "label_map" in row:
            row["label_map"] = str(located(row["label_map"], manifest, f"row {number}"))
