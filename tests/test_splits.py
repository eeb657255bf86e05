"""Finding volumes, naming them, and splitting them by subject."""

import json
from pathlib import Path

import numpy as np
import pytest

from loaders.find import find_subjects
from loaders.splits import changes_since, split_subjects
from loaders.subjects import Subject


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def ids(root) -> list[str]:
    return [subject.id for subject in find_subjects(root)]


def test_folder_is_searched_below_and_other_files_are_left_out(tmp_path):
    touch(tmp_path, "b/x.NII.GZ", "a.b c.nii", "\u00fc/s\u00e4.mha", "notes.txt", ".hidden.nii")
    touch(tmp_path, ".git/x.nii", "a.json", "b/pair.hdr", "b/pair.img", "b/m.mhd", "b/m.raw")
    assert ids(tmp_path) == ["a.b c", "b__m", "b__pair", "b__x", "\u00fc__s\u00e4"]


def test_names_never_collide(tmp_path):
    touch(tmp_path, "a/x.nii", "b/x.nii", "a__x.nii", "a/x.nrrd", "A/x.nii")
    found = ids(tmp_path)
    assert len({id.casefold() for id in found}) == len(found) == 5


def test_links_are_followed_and_a_loop_ends(tmp_path):
    touch(tmp_path / "data", "a.nii")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone.nii").symlink_to(tmp_path / "nowhere")
    assert ids(tmp_path / "link") == ["a", "gone"]  # the dangling one is told when it is read


def test_dicom_folder_is_one_volume(tmp_path):
    touch(tmp_path, "p1/1.dcm", "p1/2.dcm", "p2/scan/README")
    (tmp_path / "p2" / "scan" / "IM0").write_bytes(b"\0" * 128 + b"DICM")
    found = find_subjects(tmp_path)
    assert [subject.id for subject in found] == ["p1", "p2__scan"]
    assert found[0].paths == (tmp_path / "p1",)


def test_glob_and_single_file(tmp_path):
    touch(tmp_path, "s1/t1.nii", "s1/t2.nii", "s2/t1.nii", "t1.txt")
    assert ids(tmp_path / "**" / "t1*") == ["s1__t1", "s2__t1"]
    assert ids(tmp_path / "s1" / "t2.nii") == ["t2"]


@pytest.mark.parametrize("name", ["", "nothing", "nothing/*.nii"])
def test_missing_and_empty_roots_are_told(tmp_path, name):
    with pytest.raises(ValueError, match=r"data\.root"):
        find_subjects(tmp_path / name)


def test_csv_manifest_with_channels_splits_and_labels(tmp_path):
    (tmp_path / "m.csv").write_text(
        "path,subject,split,site,label_map\n"
        "a/t1.nii;a/t2.nii,p1,train,x,a/seg.nii\nb/t1.nii,p1,train,y,\nc/t1.nii,p2,val,,\n",
        encoding="utf-8-sig",
    )
    first, second, third = find_subjects(tmp_path / "m.csv")
    assert first.paths == (tmp_path / "a" / "t1.nii", tmp_path / "a" / "t2.nii")
    assert (first.id, second.id, third.split) == ("a__t1", "b__t1", "val")
    assert first.labels == {"subject": "p1", "site": "x", "label_map": str(tmp_path / "a/seg.nii")}
    assert split_subjects([first, second, third])["train"] == ["a__t1", "b__t1"]


def test_json_manifest_and_its_mistakes(tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps([{"path": ["a.nii", "b.nii"], "id": "both", "age": 3}]))
    (subject,) = find_subjects(manifest)
    assert subject.id == "both" and len(subject.paths) == 2 and subject.labels == {"age": "3"}
    for text, words in [
        ("[", "cannot be read"),
        ("{}", "list of objects"),
        ("[]", "holds no volumes"),
        ('[{"file": "a"}]', "row 1 has no 'path'"),
        ('[{"path": "a.nii", "split": "dev"}]', "train, val or test"),
        ('[{"path": "a.nii", "id": "x"}, {"path": "b.nii", "id": "x"}]', "given twice"),
    ]:
        manifest.write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            find_subjects(manifest)
        assert str(manifest) in str(caught.value)


def people(count: int) -> list[Subject]:
    return [Subject(f"s{n}", (Path(f"s{n}.nii"),)) for n in range(count)]


def test_adding_a_subject_moves_no_other():
    before = split_subjects(people(200))
    after = split_subjects(people(201))
    for name in before:
        assert set(before[name]) <= set(after[name])
    sizes = {name: len(ids) for name, ids in before.items()}
    assert sum(sizes.values()) == 200 and abs(sizes["train"] - 160) < 20, sizes
    assert before == split_subjects(people(200))


@pytest.mark.parametrize("count", [3, 4, 10])
def test_no_split_stays_empty_in_small_sets(count):
    split = split_subjects(people(count))
    assert all(split.values()) and sum(map(len, split.values())) == count
    assert split_subjects(people(count), (1.0, 0.0, 0.0))["train"] == [s.id for s in people(count)]


def test_all_volumes_of_a_person_are_on_one_side():
    bids = [Subject(f"sub-{n:02d}__ses-{k}__T1w", ()) for n in range(40) for k in range(3)]
    split = split_subjects(bids)
    sides = [{id[:6] for id in ids} for ids in split.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_a_person_in_two_splits_is_told():
    both = [
        Subject(f"v{n}", (), split, {"subject": "p"}) for n, split in enumerate(("train", "val"))
    ]
    with pytest.raises(ValueError, match="'p' is in train and in val"):
        split_subjects(both)


def test_fractions_are_checked():
    for fractions in [(0.5, 0.5, 0.5), (1.2, -0.2, 0.0), (0.5, 0.5)]:
        with pytest.raises(ValueError, match=r"data\.fractions"):
            split_subjects(people(5), fractions)


def test_shares_follow_the_fractions_in_the_long_run():
    split = split_subjects(people(5000), (0.6, 0.3, 0.1))
    shares = np.array([len(split[name]) for name in ("train", "val", "test")]) / 5000
    assert np.allclose(shares, (0.6, 0.3, 0.1), atol=0.03)


def test_what_changed_since_a_run_began_is_told_by_a_few_names_and_counts():
    begun = {"train": ["a", "b", "c", "d", "e"], "val": ["f"], "test": ["g"]}
    assert changes_since(dict.fromkeys("abcdefg"), begun) == (begun, [])
    split, (line,) = changes_since(dict.fromkeys("gfedcbazyxw"), begun, root="DIR")
    assert split == begun
    assert line.startswith("DIR has changed since this run began: 4 new and not used: z, y, x and ")
    today = dict.fromkeys("ex") | {"g": "train", "f": "val"}
    what = "DIR has changed since this run began: 4 gone: a, b, c and 1 more; 1 in another split: "
    what += "g (test -> train); 1 new and not used: x. "
    with pytest.raises(ValueError) as error:
        changes_since(today, begun, root="DIR")
    assert str(error.value).startswith(what) and "by --force" in str(error.value)
    split, (line,) = changes_since(today, begun, force=True, root="DIR")
    assert split == {"train": ["e"], "val": ["f"], "test": ["g"]} and line.startswith(what)
