"""Whose volumes they are, and that no person lies on two sides of a split."""

import json
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from dicoms import dataset, save, write_series

from loaders import DataConfig, Volume, open_data, survey_data, write_volume
from loaders.find import find_subjects
from loaders.persons import find_persons, persons_by_case
from loaders.readers import Dicom, Reading
from loaders.splits import split_subjects
from loaders.subjects import Subject


def scan(path: Path, seed: int = 0) -> Path:
    """A volume of noise; the same seed, the same bytes."""
    data = np.random.default_rng(seed).integers(0, 99, (1, 5, 4, 3)).astype(np.int16)
    write_volume(path, Volume(data))
    return path


def scans(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        scan(root / f"{name}.nii.gz", seed)
    return root


def dicom(folder: Path, patient: str | None, slices: int = 2, seed: int = 0) -> Path:
    """An axial series of one patient; None writes no PatientID at all."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{seed}.{number + 1}"
        meta.TransferSyntaxUID, meta.ImplementationClassUID = "1.2.840.10008.1.2.1", "1.2.3.4"
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID = meta.MediaStorageSOPClassUID
        data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = f"1.2.{seed}", "1.2", "MR"
        if patient is not None:
            data.PatientID = patient
        data.Rows, data.Columns, data.PixelSpacing, data.SliceThickness = 4, 4, [1, 1], 1
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [0, 0, number]
        data.InstanceNumber = number + 1
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = np.random.default_rng(seed).integers(0, 99, 16).astype("<i2").tobytes()
        pydicom.dcmwrite(folder / f"{number}.dcm", data, enforce_file_format=True)
    return folder


def persons(root: Path, group_by: str | None = None) -> tuple[dict[str, str], list[str]]:
    found, lines = find_persons(find_subjects(root), root, group_by)
    return {s.id: s.person for s in found}, lines


def test_series_of_one_patient_stay_together_and_the_id_goes_nowhere(tmp_path):
    root, patients = tmp_path / "data", [f"MRN{n // 2:05d}" for n in range(12)]
    for n, patient in enumerate(patients):
        dicom(root / f"series{n}", patient, seed=n)
    config = DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"))
    lines: list[str] = []
    store, split = open_data(config, say=lines.append)
    assert lines[0] == "persons: 6 in 12 volumes (12 by PatientID)"
    sides = [{patients[int(id[6:])] for id in ids} for ids in split.values()]
    assert sum(map(len, sides)) == 6 and all(sides)
    metas = [store.meta(n) for n in range(len(store))]
    text = json.dumps([lines, split, metas, [repr(e.subject) for e in store.entries]])
    assert "MRN" not in text and "patient-" in repr(store.entries[0].subject)
    for path in (tmp_path / "cache").rglob("*"):
        assert "MRN" not in path.name and (path.is_dir() or b"MRN" not in path.read_bytes())


def test_each_series_of_a_folder_has_a_patient_of_its_own_and_is_no_copy_of_the_others(tmp_path):
    for number in range(6):
        patient, uid = f"MRN{number // 2}", f"1.2.{number}"
        about = {"SeriesDescription": f"s{number}", "PatientID": patient}
        write_series(tmp_path / "all", 3, series=uid, **about)
    found = find_subjects(tmp_path, Reading(dicom=Dicom(series="all")))
    subjects, lines = find_persons(found, tmp_path)
    whose = [s.person for s in sorted(subjects, key=lambda s: s.id)]
    assert whose[::2] == whose[1::2] and len(set(whose)) == 3
    assert lines == ["persons: 3 in 6 volumes (6 by PatientID)"]


def test_a_folder_that_was_copied_holds_copies_of_its_series(tmp_path):
    for uid in ("1.2.1", "1.2.2"):
        write_series(tmp_path / "a", 3, series=uid, SeriesDescription=uid[-1])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = find_subjects(tmp_path, Reading(dicom=Dicom(series="all")))
    subjects, lines = find_persons(found, tmp_path)
    assert {s.id: s.person for s in subjects} == {
        "a__1": "a__1", "b__1": "a__1", "a__2": "a__2", "b__2": "a__2",
    }  # fmt: skip
    assert sum("identical content" in line for line in lines) == 2


def test_objects_without_an_image_do_not_say_whose_a_folder_is(tmp_path):
    for number in range(6):
        folder = write_series(tmp_path / f"s{number}", 3, PatientID=f"P{number // 2}")
        save(dataset("DICOMDIR"), folder / "0")  # before all others, and without PatientID
        for file in list(folder.glob("1*")):  # as before DICOM's first bytes were usual
            file.with_name(f"{file.name}.dcm").write_bytes(file.read_bytes()[128 + 4 :])
            file.unlink()
        (folder / "note.txt").write_text(str(number))
    whose, lines = persons(tmp_path)
    assert whose["s0"] == whose["s1"] != whose["s2"] and len(set(whose.values())) == 3
    assert lines[0] == "persons: 3 in 6 volumes (6 by PatientID)"


def test_a_patient_id_that_is_empty_or_nearly_everybodys_is_not_used_and_that_is_told(tmp_path):
    for n in range(4):
        dicom(tmp_path / f"a{n}", "ANONYMOUS", seed=n)
    dicom(tmp_path / "b0", "", seed=4)
    dicom(tmp_path / "b1", None, seed=5)
    dicom(tmp_path / "c", "P7", seed=6)
    whose, lines = persons(tmp_path)
    assert len(set(whose.values())) == 7 and whose["a0"] == "a0" and whose["c"] != "c"
    assert "empty in 2 of 7" in lines[1] and "the same in 4 of 7" in lines[2]
    assert all("data.group_by" in line for line in lines[1:3]) and "ANONYMOUS" not in str(lines)


def test_names_that_show_a_patient_id_are_told(tmp_path):
    for n in range(3):
        dicom(tmp_path / f"LIDC-000{n}" / "ct", f"LIDC-000{n}", seed=n)
    told = [line for line in persons(tmp_path)[1] if "show it" in line]
    assert len(told) == 1 and "the names of 3 volumes" in told[0] and "LIDC-000" not in told[0]


@pytest.mark.parametrize(
    ("name", "person"),
    [
        ("sub-01_T1w", "sub-01"),
        ("sub-01__ses-1__anat__sub-01_ses-1_T1w", "sub-01"),
        ("sub-control01_bold", "sub-control01"),
        ("site__sub-3_1", "sub-3"),
        ("sub-pilot_ses-2_T1w", "sub-pilot"),
        ("sub-pilot__anat__sub-pilot_T1w", "sub-pilot"),
        ("sub-sampled_000", None),
        ("sub-sampled__000", None),
        ("sub-sampled-3", None),
        ("sub-volumes_img_2", None),
    ],
)
def test_bids_names_a_person_and_a_word_that_begins_alike_does_not(name, person):
    assert Subject(name, (Path(f"{name}.nii"),)).person == (person or name)


def test_subsampled_volumes_are_twenty_persons(tmp_path):
    scans(tmp_path, *(f"sub-sampled_{n:03d}" for n in range(20)))
    split = survey_data(DataConfig(root=str(tmp_path))).split
    assert (
        sorted(map(len, split.values()))[0] >= 1 and len(set(persons(tmp_path)[0].values())) == 20
    )


def test_modalities_in_a_folder_of_their_own_are_one_person_and_the_segmentation_none(tmp_path):
    names = [f"BraTS-GLI-0000{n}-000" for n in range(12)]
    kinds = ("t1c", "t2w", "seg")
    scans(tmp_path, *(f"{name}/{name}-{kind}" for name in names for kind in kinds))
    (tmp_path / names[4] / f"{names[4]}-t2w.nii.gz").unlink()  # a modality may be missing
    survey = survey_data(DataConfig(root=str(tmp_path)))
    assert len(survey.subjects) == 23 and not any("seg" in s.id for s in survey.subjects)
    assert "persons: 12 in 23 volumes (23 by folder)" in survey.lines
    assert survey.lines[0].startswith("left out: 12 files are called like label maps, first")
    sides = [{id.split("__")[0] for id in ids} for ids in survey.split.values()]
    assert sum(map(len, sides)) == 12 and all(sides)
    assert "name them in a glob" in survey.lines[0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Three folders with the same names, whatever stands before these.
        ([f"p{n}/{kind}" for n in range(3) for kind in ("T1", "T2")], 3),
        ([f"s{n}/x{n}_{kind}" for n in range(3) for kind in ("flair", "t1ce")], 3),
        # The uppermost folder: sessions are no persons.
        ([f"p{n}/ses{k}/{m}" for n in range(3) for k in range(3) for m in ("T1", "T2")], 3),
        # Two folders are too few, numbers are no names, parts of a split are no persons.
        ([f"p{n}/{kind}" for n in range(2) for kind in ("T1", "T2")], 4),
        ([f"site{n}/{k:03d}" for n in range(3) for k in range(4)], 12),
        ([f"{part}/{k}" for part in ("train", "val", "test") for k in ("heart", "liver")], 6),
        # Many names are a collection.
        ([f"site{n}/case{k}x" for n in range(3) for k in range(13)], 39),
        # Names that the folders do not share.
        ([f"class{n}/{n}{k}a" for n in range(3) for k in range(3)], 9),
    ],
)
def test_a_folder_is_a_person_only_among_siblings_with_the_same_few_names(
    tmp_path, names, expected
):
    scans(tmp_path, *names)
    assert len(set(persons(tmp_path)[0].values())) == expected


def test_label_maps_are_left_out_unless_they_are_named(tmp_path):
    names = ["imagesTr/a", "imagesTr/b", "labelsTr/a", "labelsTr/b", "x/aparc+aseg", "c_Label"]
    scans(tmp_path, *names, "unlabeled_1")
    lines: list[str] = []
    found = [s.id for s in find_subjects(tmp_path, say=lines.append)]
    assert found == ["imagesTr__a", "imagesTr__b", "unlabeled_1"] and "4 files" in lines[0]
    assert len(find_subjects(tmp_path / "labelsTr", say=lines.append)) == 2
    assert len(find_subjects(tmp_path / "**" / "*seg*", say=lines.append)) == 1
    assert len(find_subjects(tmp_path / "c_Label.nii.gz", say=lines.append)) == 1
    (tmp_path / "m.csv").write_text("path\nlabelsTr/a.nii.gz\n")
    assert len(find_subjects(tmp_path / "m.csv", say=lines.append)) == 1 and len(lines) == 1
    kept = find_subjects(tmp_path, named=["c_Label"], say=lines.append)  # by an earlier run
    assert len(kept) == 4 and "3 files" in lines[-1]
    glob = find_subjects(tmp_path / "*" / "*.nii.gz", say=lines.append)  # names no label map
    assert [s.id for s in glob] == ["imagesTr__a", "imagesTr__b"]
    shutil.rmtree(tmp_path / "imagesTr")
    (tmp_path / "unlabeled_1.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"there are no others \(data.root\); name them in a glob"):
        find_subjects(tmp_path)


def test_copies_are_told_and_stay_on_one_side(tmp_path):
    scans(tmp_path, *(f"s{n}" for n in range(30)))
    shutil.copy(tmp_path / "s3.nii.gz", tmp_path / "again.nii.gz")
    whose, lines = persons(tmp_path)
    assert whose["again"] == whose["s3"] and len(set(whose.values())) == 30
    assert lines[1] == (
        "identical content: again and s3, byte by byte; they stay on one side of the split"
    )
    flipped = bytearray((tmp_path / "s3.nii.gz").read_bytes())
    flipped[4] ^= 1  # the time in the header: other bytes of the same length
    (tmp_path / "again.nii.gz").write_bytes(flipped)
    assert len(persons(tmp_path)[1]) == 1


def test_copies_that_the_manifest_splits_are_told(tmp_path):
    scan(tmp_path / "a.nii.gz")
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    (tmp_path / "m.csv").write_text("path,split\na.nii.gz,train\nb.nii.gz,test\n")
    survey = survey_data(DataConfig(root=str(tmp_path / "m.csv")))
    assert survey.split == {"train": ["a"], "val": [], "test": ["b"]}
    assert "the manifest puts them into train and test" in survey.lines[1]


def test_a_sample_of_large_files_spares_reading_them_whole(tmp_path, monkeypatch):
    import loaders.persons

    for n in range(3):
        data = np.zeros((64, 64, 64), np.int16)
        data[32, :, :] = n
        np.save(tmp_path / f"{n}.npy", data)
    monkeypatch.setattr(loaders.persons, "digest", lambda path: pytest.fail("read whole"))
    assert len(persons(tmp_path)[1]) == 1


def test_group_by_is_a_pattern_or_a_column_and_wins(tmp_path):
    scans(tmp_path, "a/p1_x", "a/p1_y", "b/p2_x", "sub-01_T1w")
    assert len(set(persons(tmp_path, r"^[ab]/(p\d)|sub-(\d+)")[0].values())) == 3
    with pytest.raises(ValueError, match=r"data.group_by 'p\(' is no regular expression"):
        persons(tmp_path, "p(")
    with pytest.raises(ValueError, match=r"matches nothing in sub-01_T1w\.nii\.gz"):
        persons(tmp_path, r"p\d")
    (tmp_path / "m.csv").write_text(
        "path,subject,ward\na/p1_x.nii.gz,1,w\na/p1_y.nii.gz,2,w\nb/p2_x.nii.gz,3,v\n"
    )
    found, lines = find_persons(find_subjects(tmp_path / "m.csv"), tmp_path, "ward")
    assert [s.person for s in found] == ["w", "w", "v"] and "3 by the column ward" in lines[0]
    found, lines = find_persons(find_subjects(tmp_path / "m.csv"), tmp_path)
    assert [s.person for s in found] == ["1", "2", "3"] and "column subject" in lines[0]
    (tmp_path / "m.csv").write_text("path,ward\na/p1_x.nii.gz,w\na/p1_y.nii.gz,\n")
    with pytest.raises(ValueError, match="no 'ward' for p1_y"):
        find_persons(find_subjects(tmp_path / "m.csv"), tmp_path, "ward")


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_volumes_train_first(tmp_path, count):
    for start in range(30):  # whatever their names are
        subjects = [Subject(f"v{start + n}", ()) for n in range(count)]
        assert len(split_subjects(subjects)["train"]) == 1


def cohort(count: int, groups: int = 2) -> list[Subject]:
    return [
        Subject(f"p{n}_{k}", (), None, {"subject": f"p{n}", "site": "abc"[n % groups]})
        for n in range(count)
        for k in range(1 + n % 2)
    ]


def test_folds_validate_everybody_once_and_leave_the_test_part_alone():
    subjects = cohort(43)
    plain = split_subjects(subjects)
    parts = [split_subjects(subjects, folds=5, fold=fold) for fold in range(5)]
    for part in parts:
        assert part["test"] == plain["test"]
        assert {id.split("_")[0] for id in part["train"]}.isdisjoint(
            id.split("_")[0] for id in part["val"]
        )
        assert sorted(part["train"] + part["val"]) == sorted(plain["train"] + plain["val"])
    validated = [id for part in parts for id in part["val"]]
    assert sorted(validated) == sorted(plain["train"] + plain["val"])
    sizes = [len({id.split("_")[0] for id in part["val"]}) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_strata_come_in_equal_shares_in_parts_and_in_folds():
    subjects = [Subject(f"s{n}", (), None, {"sex": "m" if n % 4 else "f"}) for n in range(80)]
    sex = {s.id: s.labels["sex"] for s in subjects}
    split = split_subjects(subjects, stratify_by="sex")
    assert {name: len(ids) for name, ids in split.items()} == {"train": 64, "val": 8, "test": 8}
    for name, women in [("train", 16), ("val", 2), ("test", 2)]:
        assert sum(sex[id] == "f" for id in split[name]) == women
    for fold in range(4):
        part = split_subjects(subjects, (0.8, 0.2, 0.0), 4, fold, "sex")
        assert len(part["val"]) == 20 and sum(sex[id] == "f" for id in part["val"]) == 5


def test_folds_and_strata_that_cannot_be_made_are_told():
    subjects = cohort(6)
    for options, words in [
        (dict(folds=1), "data.folds is 1: use 2 to"),
        (dict(folds=9), "data.folds is 9: use 2 to"),
        (dict(folds=2, fold=2), "data.fold is 2: of 2 folds use 0 to 1"),
        (dict(stratify_by="age"), "no 'age' for p0_0"),
    ]:
        with pytest.raises(ValueError, match=words):
            split_subjects(subjects, **options)
    given = [Subject("a", (), "val"), *subjects]
    with pytest.raises(ValueError, match="puts a into val: with folds, leave the column split"):
        split_subjects(given, folds=2)
    tested = [Subject("a", (), "test"), *subjects]
    assert "a" in split_subjects(tested, folds=2)["test"]


def test_a_resumed_run_keeps_its_split_and_new_files_are_told_in_one_line(tmp_path):
    scans(tmp_path, "p0/T1", "p0/T2", "p1/T1", "p1/T2", "p2/T1", "p2/T2", "p2/p2_seg")
    old = {"train": ["p0__T1", "p1__T1", "p2__p2_seg"], "val": ["p0__T2"], "test": ["p1__T2"]}
    survey = survey_data(DataConfig(root=str(tmp_path)), split=old)  # of before persons were found
    assert survey.split == old and [s.id for s in survey.subjects] == sorted(
        id for ids in old.values() for id in ids
    )
    assert survey.lines == [
        f"{tmp_path} has changed since this run began: 2 new and not used: p2__T1, p2__T2. The run "
        "keeps its own split; --fresh begins anew",
        "split: 3 train, 1 val, 1 test",
    ]


def test_a_manifest_whose_split_changed_is_refused_unless_it_is_forced(tmp_path):
    scans(tmp_path, "a", "b", "c")
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,split\na.nii.gz,train\nb.nii.gz,val\nc.nii.gz,\n")
    config = DataConfig(root=str(manifest))
    begun = {"train": ["a", "c"], "val": ["b"], "test": []}
    assert survey_data(config, split=begun).split == begun
    manifest.write_text("path,split\na.nii.gz,test\nb.nii.gz,val\nc.nii.gz,\n")
    with pytest.raises(
        ValueError, match=r"1 in another split: a \(train -> test\).*--force.*--fresh"
    ):
        survey_data(config, split=begun)
    survey = survey_data(config, split=begun, force=True)
    assert survey.split == begun and "keeps its own split" in survey.lines[0]


def test_channels_that_nnu_net_names_are_of_one_case_and_running_numbers_are_not(tmp_path):
    names = [f"case_{case:03}_{channel:04}" for case in range(3) for channel in range(2)]
    paths = {name: PurePosixPath(f"imagesTr/{name}.nii.gz") for name in names}
    found = persons_by_case(paths)
    assert found == {name: f"imagesTr/{name[:8]}" for name in names}
    single = {name: path for name, path in paths.items() if name.endswith("_0000")}
    assert persons_by_case(single) == {}
    assert (
        persons_by_case({f"img_{n:04}": PurePosixPath(f"img_{n:04}.png") for n in range(9)}) == {}
    )
