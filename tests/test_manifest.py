"""Manifests: what spreadsheets on any machine write is read, or refused in one line."""

import os
from pathlib import Path

import pytest

from loaders import find_subjects

HEADER = "path,id,split,site"
ROW = "scans/a.nii,Müller,train,Köln"


def manifest(folder: Path, text: str | bytes, name: str = "m.csv") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def refused(path: Path, *words: str) -> None:
    """The manifest must be refused in one line with its name and these words."""
    with pytest.raises(ValueError) as caught:
        find_subjects(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_of_any_dialect_and_encoding_of_excel_is_the_same(
    tmp_path, mark, encoding, newline
):
    text = newline.join([HEADER, ROW, ""]).replace(",", mark)
    raw = ("\ufeff" + text if encoding == "utf-16-be" else text).encode(encoding)
    (subject,) = find_subjects(manifest(tmp_path, raw))
    assert subject.paths == (tmp_path / "scans" / "a.nii",)
    assert (subject.id, subject.split, subject.labels) == ("Müller", "train", {"site": "Köln"})


def test_a_file_of_tabs_may_be_called_tsv_and_a_line_for_excel_is_no_header(tmp_path):
    text = f"{HEADER}\n{ROW}\n".replace(",", "\t")
    assert find_subjects(manifest(tmp_path, text, "m.tsv"))[0].id == "Müller"
    text = f"sep=;\n{HEADER}\n{ROW}\n".replace(",", ";")
    assert find_subjects(manifest(tmp_path, text))[0].id == "Müller"


def test_known_columns_are_found_in_any_case_and_others_keep_theirs(tmp_path):
    text = "Path ,ID,Split,SUBJECT,Site\na.nii,one,Train,p1,X\n"
    (subject,) = find_subjects(manifest(tmp_path, text))
    assert (subject.id, subject.split) == ("one", "train")
    assert subject.labels == {"subject": "p1", "Site": "X"}


def test_empty_columns_and_rows_that_a_spreadsheet_leaves_behind_are_nothing(tmp_path):
    text = "path,split,,\na.nii,train,,\n,,,\nb.nii,val,,\n,,,\n"
    subjects = find_subjects(manifest(tmp_path, text))
    assert [(s.id, s.split, s.labels) for s in subjects] == [("a", "train", {}), ("b", "val", {})]


def test_channels_stand_in_quotes_where_semicolons_cut_the_cells(tmp_path):
    text = 'path;split\n"t1.nii;t2.nii";train\n'
    (subject,) = find_subjects(manifest(tmp_path, text))
    assert subject.paths == (tmp_path / "t1.nii", tmp_path / "t2.nii")
    path = manifest(tmp_path, "path;split\nt1.nii;t2.nii;train\n")
    refused(path, "row 1 has 3 cells, the header 2: put what holds a ';' in quotes")


def test_a_manifest_of_one_column_holds_channels_without_quotes(tmp_path):
    (subject,) = find_subjects(manifest(tmp_path, "path\nt1.nii;t2.nii\n"))
    assert subject.paths == (tmp_path / "t1.nii", tmp_path / "t2.nii")


def test_a_channel_that_a_row_does_not_name_is_no_folder(tmp_path):
    (subject,) = find_subjects(manifest(tmp_path, "path\n;t2.nii\n"))
    assert not subject.paths[0].exists() and subject.paths[1] == tmp_path / "t2.nii"
    assert subject.id == "t2" and "row 1, file" in str(subject.paths[0])


def test_a_cell_may_hold_a_line_break(tmp_path):
    first, second = find_subjects(manifest(tmp_path, 'path,note\na.nii,"two\nlines"\nb.nii,x\n'))
    assert first.labels == {"note": "two\nlines"} and second.id == "b"


def test_the_home_folder_and_paths_of_windows_are_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = "path\n~/a.nii\nscans\\b.nii\n~\\c.nii\n"
    subjects = find_subjects(manifest(tmp_path, text))
    assert [s.paths[0] for s in subjects] == [
        tmp_path / "home" / "a.nii", tmp_path / "scans" / "b.nii", tmp_path / "home" / "c.nii"
    ]  # fmt: skip
    if os.sep == "/":
        path = manifest(tmp_path, "path\nD:\\scans\\a.nii\n")
        refused(path, r"row 1: D:\scans\a.nii is on a drive of Windows", "relative to the manifest")


@pytest.mark.skipif(os.sep == "\\", reason="a backslash is no part of a name there")
def test_a_file_whose_name_holds_a_backslash_is_itself(tmp_path):
    (tmp_path / "a\\b.nii").touch()
    (subject,) = find_subjects(manifest(tmp_path, "path\na\\b.nii\n"))
    assert subject.paths == (tmp_path / "a\\b.nii",)


def test_a_file_whose_name_holds_a_bracket_is_found_by_its_name(tmp_path):
    for name in ("a [1].nii", "a 1.nii"):
        (tmp_path / name).touch()
    assert [s.paths[0].name for s in find_subjects(tmp_path / "a [1].nii")] == ["a [1].nii"]
    assert [s.id for s in find_subjects(tmp_path / "a [0-9].nii")] == ["a 1"]
    (subject,) = find_subjects(manifest(tmp_path, "path\na [1].nii\n", "set [2].csv"))
    assert subject.paths == (tmp_path / "a [1].nii",)


def test_mistakes_show_what_was_found(tmp_path):
    refused(manifest(tmp_path, "file;split\na.nii;train\n"), "no column 'path'", "'file;split'")
    refused(manifest(tmp_path, "path,Path\na,b\n"), "column 'path' is given twice")
    refused(manifest(tmp_path, "path,split\na.nii,val\n,train\n"), "row 2 has no 'path'", "'split'")
    refused(manifest(tmp_path, '[{"file": "a"}]', "m.json"), "row 1 has no 'path'", "it has 'file'")
    refused(manifest(tmp_path, b"path\n\x81\x8d\n"), "cannot be read")
    refused(manifest(tmp_path, "path,split\n"), "holds no volumes")
    refused(manifest(tmp_path, ""), "no column 'path'")


def test_a_label_is_a_class_and_a_label_map_has_a_column_of_its_own(tmp_path, capsys):
    text = "path,label,label_map\na.nii,tumor,seg/a.nii\nb.nii,healthy,\n"
    first, second = find_subjects(manifest(tmp_path, text))
    assert first.labels["label"] == "tumor" and first.label_map == tmp_path / "seg" / "a.nii"
    assert second.labels == {"label": "healthy"} and second.label_map is None
    assert capsys.readouterr().err == ""


def test_label_maps_in_the_column_label_are_taken_as_before_with_a_line(tmp_path, capsys):
    path = manifest(tmp_path, "path,label\na.nii,seg/a.nii.gz\nb.nii,\n")
    first, second = find_subjects(path)
    assert first.label_map == tmp_path / "seg" / "a.nii.gz" and "label" not in first.labels
    assert second.label_map is None
    assert capsys.readouterr().err == (
        f"{path}: the column 'label' holds label maps: name it 'label_map', since a label is a "
        "class\n"
    )
