"""Files appear whole or not at all, whatever happens while they are written."""

import errno
import os

import pytest

from loaders.whole import sweep, whole_file, write_text


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "summary.json"
    with whole_file(path) as temporary:
        temporary.write_text("{}")
        assert not path.exists() and temporary.suffix == ".json" and temporary.name[0] == "."
    assert path.read_text() == "{}" and os.listdir(path.parent) == ["summary.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("named", [True, False])
def test_an_error_of_the_disk_names_the_file_that_was_to_be(tmp_path, named):
    path = tmp_path / "config.yaml"
    with pytest.raises(OSError) as caught, whole_file(path) as temporary:
        raise OSError(errno.ENOSPC, "full", *[str(temporary)] * named)
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError) as caught, whole_file(path):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


@pytest.mark.parametrize("path", ["", "/"])
def test_what_is_no_name_of_a_file_is_refused(path):
    with pytest.raises(ValueError, match="no name of a file"), whole_file(path):
        pass


def test_two_writers_do_not_share_a_temporary(tmp_path):
    with whole_file(tmp_path / "a") as one, whole_file(tmp_path / "a") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the last to finish


@pytest.mark.parametrize("durable", [False, True])
def test_bytes_reach_the_disk_before_the_name_where_asked_for(tmp_path, monkeypatch, durable):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _r=real: (calls.append(_n), _r(*a))[1])
    with whole_file(tmp_path / "a", durable) as temporary:
        temporary.write_text("1")
    assert calls == (["fsync", "replace", "fsync"] if durable else ["replace"])


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    left = whole_file(tmp_path / "a.pt")
    left.__enter__().write_text("half")
    (tmp_path / ".hidden").write_text("mine")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [".hidden"]


def test_a_folder_takes_the_place_of_a_folder_and_what_a_killed_writer_left_is_swept(tmp_path):
    for content in ("old", "new"):
        with whole_file(tmp_path / "a.zarr") as temporary:
            temporary.mkdir()
            (temporary / "zarr.json").write_text(content)
    assert (tmp_path / "a.zarr" / "zarr.json").read_text() == "new"
    left = tmp_path / ".0.partial.b.zarr"
    left.mkdir()
    (left / "chunk").write_text("half")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["a.zarr"]
