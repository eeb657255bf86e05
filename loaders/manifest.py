"""Manifests: a CSV or JSON table with a row for each volume."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

from loaders.splits import SPLITS
from loaders.subjects import Subject, names_of


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
        # A file that the row does not name lies where none can: below the manifest itself.
        nowhere = manifest / f"row {number}, file"
        all_paths.append(
            tuple(
                manifest.parent / part.strip() if part and part.strip() else nowhere / str(place)
                for place, part in enumerate(parts, start=1)
            )
        )
        labels.append({k: str(v).strip() for k, v in row.items() if v not in (None, "")})
        if "label" in labels[-1]:
            labels[-1]["label"] = str(manifest.parent / labels[-1]["label"])
    # Ids come from the paths, relative to the folder that holds them all.
    firsts = [next((p for p in paths if manifest not in p.parents), paths[0])
              for paths in all_paths]  # fmt: skip
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
