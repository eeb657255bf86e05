"""benchmarks/data_sets.py: parts of public volumes that do not touch, and what is told of them."""

import csv
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile

from loaders import find_subjects
from loaders.readers import Reading, Volume, read_volume, write_volume
from vae3d.config import main

ROOT = Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data_sets = script("data_sets")


def slabs(folder, axis):
    """Per part the planes it holds, in volumes whose values count planes along an axis."""
    planes = {}
    with open(folder / "manifest.csv", newline="") as file:
        for row in csv.DictReader(file):
            values = read_volume(folder / row["path"]).data[0]
            planes.setdefault(row["split"], set()).update(np.unique(values).tolist())
            along = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
            assert (along == along[:, :1]).all()  # whole planes, none turned
    return planes


def apart(planes, gap):
    """No plane of one part within `gap` planes of another part's."""
    parts = list(planes.values())
    return all(abs(a - b) > gap for i, one in enumerate(parts) for other in parts[:i]
               for a in one for b in other)  # fmt: skip


def test_parts_of_the_chest_are_whole_slices_with_two_between_them(tmp_path):
    data = np.empty((1, 6, 5, 69), np.int16)
    data[:] = np.arange(69)
    source = tmp_path / "chest.nii.gz"
    write_volume(source, Volume(data, np.diag([2.0, 2.0, 4.0, 1.0])))
    data_sets.prepare("chest", str(source), str(tmp_path / "parts"))
    planes = slabs(tmp_path / "parts", axis=2)
    assert {part: len(found) for part, found in planes.items()} == {
        "train": 39, "val": 12, "test": 12}  # fmt: skip
    assert apart(planes, gap=2)
    hilum = read_volume(tmp_path / "parts" / "hilum.nii.gz")
    assert hilum.affine[2, 3] == 36 * 4 and hilum.spacing_mm == (2.0, 2.0, 4.0)


def test_parts_of_the_nuclei_lie_apart_and_know_their_voxel_size(tmp_path):
    stack = np.empty((60, 2, 256, 256), np.uint16)
    stack[:, 1] = np.arange(256)  # along x; channel 0, membranes, is left out
    stack[:, 0] = 999
    tifffile.imwrite(tmp_path / "cells3d.tif", stack)
    for folder in ("parts", "again"):
        data_sets.prepare("nuclei", str(tmp_path / "cells3d.tif"), str(tmp_path / folder))
    planes = slabs(tmp_path / "parts", axis=0)
    assert {part: len(found) for part, found in planes.items()} == {
        "train": 144, "val": 40, "test": 48}  # fmt: skip
    assert apart(planes, gap=12)
    edge = read_volume(tmp_path / "parts" / "edge.ome.tif")
    assert edge.data.shape == (1, 48, 256, 60)
    assert edge.spacing_mm == pytest.approx((0.26e-3, 0.26e-3, 0.29e-3))
    for path in (tmp_path / "parts").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_stack_that_is_not_the_nuclei_is_one_line(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "other.tif", np.zeros((3, 8, 8), np.uint16))
    with pytest.raises(SystemExit) as stop:
        main(data_sets.prepare, ["nuclei", str(tmp_path / "other.tif"), str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "other.tif" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_four_contrasts_of_a_patient_become_channels_of_one_volume(tmp_path):
    source = tmp_path / "tutorials"
    for number, (_, name, pattern, contrasts) in enumerate(data_sets.TUMORS):
        for channel, contrast in enumerate(contrasts):
            data = np.full((1, 3, 4, 5), 10 * number + channel, np.int16)
            write_volume(source / pattern.format(name, contrast), Volume(data))
    data_sets.prepare("tumors", str(source), str(tmp_path / "out"))
    subjects = find_subjects(str(tmp_path / "out" / "manifest.csv"))
    assert [subject.split for subject in subjects] == ["train", "train", "val", "test"]
    for number, subject in enumerate(subjects):
        values = [read_volume(path, Reading()).data.max() for path in subject.paths]
        assert values == [10 * number + channel for channel in range(4)]


def test_a_missing_contrast_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(data_sets.prepare, ["tumors", str(tmp_path), str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "t1.nii.gz is missing" in capsys.readouterr().err


def test_the_table_of_data_sets_names_every_recipe_and_files_that_exist():
    for page in (ROOT / "docs" / "data_sets.md", ROOT / "docs" / "recipes.md"):
        text = page.read_text()
        for recipe in (ROOT / "configs" / "train").glob("*.yaml"):
            assert f"`{recipe.stem}" in text, f"{page.name} does not tell of {recipe.name}"
        linked = re.findall(r"\]\(([^)#:]+)\)", text)
        assert linked and all((page.parent / path).is_file() for path in linked)


def test_pictures_of_data_sets_are_small():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "docs" / "data_sets.md").read_text()):
        assert (ROOT / "docs" / path).stat().st_size < 300_000, path
