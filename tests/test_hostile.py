"""Files from elsewhere: whatever stands in them ends well or in one line, within bounds."""

import copy
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toys import tiny_vae

from loaders import Preprocess, VolumeStore
from loaders.readers import Reading
from loaders.texts import MAX_BYTES, misfit, read_bytes, read_json, read_yaml
from loaders.undo import undo
from vae3d import config, train_3d
from vae3d.config import _is_users_mistake
from vae3d.inference.reconstruct import Coding, coding_of
from vae3d.models.classes import made
from vae3d.models.spec import build
from vae3d.ranges import check_ranges
from vae3d.stage2.latents import LatentStore, check_header, read_latent, write_index, write_latent
from vae3d.tracking.tracker import read_metrics, read_tables
from vae3d.training.checkpoint import (
    Checkpoints,
    checkpoint_of,
    load_checkpoint,
    load_model,
    load_vae,
    write_atomic,
)

NONSENSE = (None, -1, "x", [], {}, 1e308, True, 10**30, [["x"]], float("nan"))
MISSING = object()


def nodes(value, path=()):
    """Where something stands in nested data: each key, and the first of each list."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, one in value.items():
            yield from nodes(one, (*path, key))
    elif isinstance(value, (list, tuple)) and value:
        yield from nodes(value[0], (*path, 0))


def changed(value, path, new):
    """Nested data with another thing at one place, or nothing."""
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside[key] = list(inside[key]) if isinstance(inside[key], tuple) else inside[key]
        inside = inside[key]
    if new is MISSING:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return value


def survives(value, use):
    """Use nested data with each of its parts replaced by nonsense; no error may be ours."""
    tried = 0
    for path in nodes(value):
        for new in (NONSENSE[tried % len(NONSENSE)], MISSING)[: 1 + tried % 2]:
            tried += 1
            try:
                use(changed(value, path, new))
            except (ValueError, MemoryError) as error:
                users = isinstance(error, MemoryError) or _is_users_mistake(error)
                assert users, f"{path} = {new!r}: {error!r}"
            except Exception as error:
                raise AssertionError(f"{path} = {new!r}: {error!r}") from error
    assert tried > 3


@pytest.fixture(scope="module")
def vae():
    return tiny_vae(latent_channels=2).eval()


@pytest.fixture
def latent(tmp_path, vae):
    """A latent file of one small volume, as `vae3d encode` writes it."""
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).random((8, 6, 4)).astype(np.float32))
    store = VolumeStore.build([tmp_path / "scan.npy"], tmp_path / "cache", progress=False)
    from vae3d.inference.files import latent_info

    coding = Coding()
    mean, logvar = coding.encode(vae, torch.from_numpy(store.read(0)))
    made_by = {"checkpoint": "c", "step": 1, "ema": True, **coding.facts()}
    about = {"split": "train", "labels": {"sex": "F"}, "made_by": made_by}
    path = tmp_path / "latents" / "scan.safetensors"
    write_latent(path, mean, logvar, latent_info(store, 0, [2, 2, 2]) | about)
    write_index(path.parent, made_by, "runs/a")
    return path


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_a_latent_says_of_itself_it_decodes_or_is_refused(latent, vae):
    whole = read_latent(latent)
    with safe_open(latent, "pt") as file:
        header = json.loads(file.metadata()["vae3d"])

    def use(header):
        tensors = {"mean": whole.mean, "logvar": whole.logvar}
        save_file(tensors, latent, metadata={"vae3d": json.dumps(header)})
        read = read_latent(latent)
        check_header(read.info, latent)
        coding, _ = coding_of(read.info["made_by"])
        coding.check(vae)
        x = coding.decode(vae, read.mean, read.info["volume_shape"][1:])
        undo(x.numpy(), read.info["source"]["undo"])

    survives(header, use)


def test_a_latent_with_other_tensors_or_no_object_for_a_header_is_refused(latent):
    tensors = {"mean": torch.zeros(2, 4, 3, 2), "logvar": torch.zeros(2, 4, 3, 2)}
    for text in ("3", "[]", "null", "{}", "[" * 10**5):
        save_file(tensors, latent, metadata={"vae3d": text})
        with pytest.raises(ValueError, match=str(latent)):
            read_latent(latent)
    save_file({"mean": torch.zeros(3)}, latent, metadata={"vae3d": "{}"})
    with pytest.raises(ValueError, match="not one that vae3d encode wrote"):
        read_latent(latent)


def test_whatever_an_index_of_latents_says_it_opens_or_is_refused(latent):
    path = latent.parent / "latents.json"
    index = json.loads(path.read_text())

    def use(index):
        path.write_text(json.dumps(index))
        store = LatentStore(latent.parent, split="train")
        store.statistics.standardize(torch.from_numpy(store.read(0))[:2])

    survives(index, use)


@pytest.mark.slow
def test_whatever_a_checkpoint_says_it_loads_or_is_refused(vae, tmp_path):
    path = tmp_path / "vae.pt"
    contract = {"preprocess": Preprocess().to_dict(), "patch_size": [8, 8, 8], "step": 3}
    state = checkpoint_of(vae.spec, vae.state_dict(), contract)
    weights = state.pop("model")
    state |= {"names": ["last.pt"], "mark": "", "owed": [], "written": [], "best": 0.5}
    state["split"] = {"train": ["a"], "val": [], "test": []}
    state["spec"] = {}  # the next test's

    def use(state):
        torch.save({"model": weights, **state, "spec": vae.spec}, path)
        load_vae(path)
        trained = load_checkpoint(path)["config"]
        Reading.of(trained["data"])
        Preprocess.of_checkpoint(state["preprocess"])
        slicing = {name: trained["data"][name] for name in ("slice_axis", "num_slices")}
        patch = trained["patch_size"]
        Coding("patch" if patch else "full", patch, **slicing).check(vae)

    survives(state, use)


def test_whatever_a_recipe_of_a_network_says_it_is_built_or_refused(vae):
    def use(spec):
        check_ranges("checkpoint", {"spec": spec}, "its ")
        made("the network", lambda: build(spec))

    survives(vae.spec, use)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_lies_in_a_cache_it_is_used_or_built_again(tmp_path):
    data = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    np.save(tmp_path / "scan.npy", data)
    cache = tmp_path / "cache"

    def open_cache():
        store = VolumeStore.build([tmp_path / "scan.npy"], cache, progress=False)
        store.undo(0, store.read(0))

    open_cache()
    sources = cache / "sources.json"
    (sidecar,) = (path for path in cache.glob("*.json") if path != sources)
    for path in (sources, sidecar):
        whole = path.read_text()

        def use(value, path=path):
            path.write_text(json.dumps(value))
            open_cache()

        brief = json.loads(whole)
        for stats in brief.get("statistics", ()):  # 20 alike
            for part in (stats, stats["robust"]):
                kind = "percentiles" if "percentiles" in part else "foreground_percentiles"
                part[kind] = dict(list(part[kind].items())[:2])
        survives(brief, use)
        path.write_text(whole)


def test_lines_of_metrics_that_are_no_numbers_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "a": 2.5, "b": "x", "c": [1], "d": null}',
        '{"step": "2"}',
        "[]",
        "{",
        "3",
    ]
    lines += ['{"step": true}', '{"step": ' + "9" * 400 + "}", "[" * 10**5, '{"step": 2, "a": 3}']
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"step": 3}\n')
    assert read_metrics(path) == [
        {"step": 1, "a": 2.5, "d": None},
        {"step": 2, "a": 3},
        {"step": 3},
    ]
    path.write_text('{"step": 1, "table": 3, "rows": []}\n{"step": 1, "table": "t", "rows": [3]}\n')
    assert read_tables(path) == {}


def test_a_note_names_no_file_but_ours(tmp_path, vae):
    files = Checkpoints(tmp_path / "run" / "checkpoints")
    files.folder.mkdir(parents=True)
    (tmp_path / "run" / "precious").write_text("kept")
    state = checkpoint_of(vae.spec, vae.state_dict(), {})
    path = files.save(state | {"step": 1})
    evil = ["../precious", "/etc/passwd", "best.pt"]
    mark = load_checkpoint(path)["mark"]
    (files.folder / "newest.json").write_text(json.dumps({"mark": mark, "names": evil}))
    assert files.resume(path)["names"] == ["best.pt"]
    write_atomic(path, {**load_checkpoint(path), "written": ["../precious", path.name]})
    files.resume(path)
    assert files.written == [path.name]
    for text in ('{"mark": "%s", "best": "x"}', '{"mark": "%s", "owed": 3}', "[]", "3"):
        (files.folder / "newest.json").write_text(text.replace("%s", mark))
        assert files.resume(path)["owed"] == []


def test_an_archive_that_expands_without_end_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * 2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match="claims to hold 67108864 bytes"):
        load_checkpoint(path)


def test_files_without_end_are_refused_by_their_size_or_kind(tmp_path):
    big = tmp_path / "big.json"
    with open(big, "wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    for read, path in ((read_bytes, big), (read_bytes, tmp_path)):
        with pytest.raises(ValueError, match=str(path)):
            read(path, 1000)
    recipe = big.rename(tmp_path / "big.yaml")
    with pytest.raises(ValueError, match="which no such file is"):
        read_yaml(recipe)
    with pytest.raises(ValueError, match="which no recipe is"):
        config.parse(train_3d, ["--config", str(recipe), "--data.root", "d", "--out_dir", "o"])
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")


def test_a_misfit_is_named_by_its_place():
    shape = {"step": int, "best": (float, None), "names": [str], "split": {str: [str]}}
    whole = {"step": 1, "best": None, "names": ["a"], "split": {"train": ["b"]}, "more": 3}
    assert misfit(whole, shape) is None
    assert misfit(whole | {"best": 2}, shape) is None
    assert misfit(whole | {"step": True}, shape) == "step"
    assert misfit(whole | {"names": ["a", 3]}, shape) == "names.1"
    assert misfit(whole | {"split": {"val": [None]}}, shape) == "split.val.0"
    assert misfit({}, shape) == "step" and misfit([], shape) == "all of it"
    assert misfit({3: 4}, {}) == "all of it" and misfit(2**70, int) == "all of it"


def test_running_out_of_memory_is_one_line(capsys):
    def hungry():
        """Take too much."""
        raise MemoryError("Unable to allocate 3.47 PiB")

    with pytest.raises(SystemExit) as stop:
        config.main(hungry, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: not enough memory: Unable to allocate 3.47 PiB\n"


def test_a_network_that_a_checkpoint_makes_too_large_is_refused_by_name(vae, tmp_path):
    spec = copy.deepcopy(vae.spec)
    spec["init_args"]["num_res_blocks"] = 10**9
    write_atomic(tmp_path / "vae.pt", checkpoint_of(spec, vae.state_dict(), {}))
    with pytest.raises(ValueError, match=r"vae.pt: its spec.num_res_blocks is 1000000000; give at"):
        load_model(tmp_path / "vae.pt")
