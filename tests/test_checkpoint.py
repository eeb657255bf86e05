import csv
import errno
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import tiny_vae, toy_trainer

import vae3d
from loaders import DataConfig, Preprocess
from vae3d.commands.convert import convert
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import evaluate
from vae3d.commands.sample import sample
from vae3d.commands.train import train_3d
from vae3d.config import config_dict
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.stage2.latents import find_latents
from vae3d.training import checkpoint
from vae3d.training.checkpoint import (
    Checkpoints,
    load_checkpoint,
    load_model,
    load_vae,
    write_atomic,
)
from vae3d.training.distributed import World
from vae3d.training.run import Run


def state(step):
    weight = torch.full((64, 64), float(step))
    return {"step": step, "owed": ["validation"], "model": {"weight": weight}}


def steps(folder):
    return sorted(int(p.stem[5:]) for p in folder.glob("step_*.pt"))


@pytest.fixture
def run(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(state(step))
        checkpoints.note({"owed": []}, best=step == 20)
    return tmp_path


def test_newest_two_step_files_stay_beside_last_and_best(run):
    assert steps(run) == [20, 30]
    assert load_checkpoint(run / "last.pt")["step"] == 30
    assert load_checkpoint(run / "best.pt")["step"] == 20
    assert not list(run.glob(".*"))


def test_best_survives_the_rotation_of_its_step_file(run):
    checkpoints = Checkpoints(run)
    checkpoints.resume(run / "last.pt")
    for step in (40, 50, 60):
        checkpoints.save(state(step))
    assert load_checkpoint(run / "best.pt")["step"] == 20


def test_rotation_spares_the_file_resumed_from_and_files_of_others(run):
    shutil.copy(run / "step_00000020.pt", run / "step_00000005.pt")  # somebody's backup
    checkpoints = Checkpoints(run)
    path, skipped = checkpoints.find_latest()
    assert path.name == "step_00000030.pt" and not skipped
    checkpoints.resume(path)
    for step in (40, 50, 60):
        checkpoints.save(state(step))
    assert steps(run) == [5, 30, 50, 60]


def test_a_note_is_of_one_checkpoint_and_torn_it_is_none(run):
    again = Checkpoints(run)
    path, _ = again.find_latest()
    assert again.resume(path)["owed"] == []
    assert again.resume(run / "step_00000020.pt")["owed"] == ["validation"]
    again.save(state(30))  # the same step once more, after a loss of the files beyond 20
    assert again.resume(path)["owed"] == ["validation"]
    again.note({"owed": []})
    (run / "newest.json").write_text('{"owed": [')
    assert again.resume(path)["owed"] == ["validation"]


def test_all_ranks_resume_by_the_note_that_the_first_one_sees(run, monkeypatch):
    def train(out_dir: str) -> int:
        """Train."""

    call = {"out_dir": str(run)}
    saved = state(40) | {"config": config_dict(train, call), "best": 2.0, "stale": 1}
    Checkpoints(run).save(saved)
    seen_by_first = {"owed": [], "best": 1.0, "stale": 0, "names": ["last.pt", "best.pt"]}
    sent = iter([run / "step_00000040.pt", seen_by_first])
    monkeypatch.setattr(World, "broadcast", lambda *_: next(sent))
    other = Run(run, World(rank=1, size=2))
    _, resumed = other.begin(train, call)
    assert {key: resumed[key] for key in seen_by_first} == seen_by_first


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_steps_are_ordered_by_number_not_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (99999999, 100000000):
        checkpoints.save(state(step))
    (tmp_path / "last.pt").unlink()
    assert checkpoints.find_latest()[0].name == "step_100000000.pt"


def test_damaged_newest_is_skipped_with_its_reason(run):
    (run / "step_00000030.pt").write_bytes(b"no zip")  # last.pt is the same file
    path, skipped = Checkpoints(run).find_latest()
    assert path.name == "step_00000020.pt"
    assert len(skipped) == 1 and "step_00000030.pt" in skipped[0] and "cut short" in skipped[0]


def test_no_valid_file_is_an_error_and_never_a_fresh_start(run):
    for path in run.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"no checkpoint is readable.*--fresh"):
        Checkpoints(run).find_latest()


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "new").find_latest() == (None, [])


def test_every_flipped_bit_of_the_tensors_is_found(tmp_path):
    path = tmp_path / "step_00000001.pt"
    write_atomic(path, {"format": 1, **state(1)})
    whole = path.read_bytes()
    data = whole.find(torch.full((4,), 1.0).numpy().tobytes())
    assert data > 0
    for _ in range(50):
        position = random.randrange(data, data + 64 * 64 * 4)
        damaged = bytearray(whole)
        damaged[position] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|cut short"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 1


def test_no_flipped_bit_anywhere_changes_what_is_loaded(tmp_path):
    path = tmp_path / "step_00000001.pt"
    write_atomic(path, {"format": 1, **state(1)})
    whole = path.read_bytes()
    chance = random.Random(0)
    directory = range(whole.index(b"PK\1\2"), len(whole))  # what says where the entries are
    for place in [*directory, *chance.sample(range(len(whole)), 300)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ValueError:
            continue
        assert loaded["step"] == 1 and (loaded["model"]["weight"] == 1).all()  # padding was hit


@pytest.mark.parametrize("length", [0, 10, 0.5, 0.99])
def test_a_file_cut_short_is_refused(run, length):
    path = run / "last.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_checkpoint(path)


def test_pickled_code_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": 1, "step": 1, "model": {}, "hook": partial(print, "boo")}, path)
    with pytest.raises(ValueError, match="not a checkpoint of vae3d"):
        load_checkpoint(path)


def test_other_files_and_missing_ones_are_named(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt: not a checkpoint of vae3d.*\(weight, ...\)"):
        load_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="nowhere: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is it a run folder"):
        load_checkpoint(tmp_path / "empty")


def test_a_newer_format_asks_for_an_update(tmp_path):
    write_atomic(tmp_path / "last.pt", {"format": checkpoint.FORMAT + 1, **state(1)})
    with pytest.raises(ValueError, match="newer than this program reads"):
        load_checkpoint(tmp_path)


class DiskFull:
    """A file that takes so many bytes and then reports a full disk."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 3000, 17000])
def test_a_full_disk_is_said_and_nothing_is_lost(run, monkeypatch, room):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    opened = open
    monkeypatch.setattr(checkpoint, "open", lambda *a: DiskFull(opened(*a), room), raising=False)
    with pytest.raises(OSError, match="No space left on device") as caught:
        Checkpoints(run).save(state(40))
    assert caught.value.filename.endswith("step_00000040.pt")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_stale_temporaries_are_swept(run):
    (run / ".0a1b2c3d.partial.step_00000040.pt").write_bytes(b"half")
    (run / "notes.tmp").write_text("mine")
    Checkpoints(run).sweep()
    assert not list(run.glob(".*"))
    assert (run / "notes.tmp").exists()


def test_file_systems_without_hard_links_get_a_copy(run, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    checkpoints = Checkpoints(run)
    checkpoints.save(state(40))
    checkpoints.note({}, best=True)
    assert load_checkpoint(run / "last.pt")["step"] == 40
    assert load_checkpoint(run / "best.pt")["step"] == 40
    assert not list(run.glob(".*"))


def test_checkpoint_is_fsynced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _r=real: (calls.append(_n), _r(*a))[1])
    write_atomic(tmp_path / "last.pt", state(1))
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def die_at(count, folder):
    """Save the next checkpoint and name it the best; die just before the n-th system call of it."""
    left = [count]

    def deadly(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    class DeadlyFile:
        def __init__(self, *args):
            self.file = deadly(io.open)(*args, buffering=0)
            self.write = deadly(self.file.write)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            deadly(self.file.close)()

    checkpoints = Checkpoints(folder)
    path, _ = checkpoints.find_latest()
    saved = checkpoints.resume(path)
    saved["step"] += 10
    saved["model"]["weight"] += 10
    saved["owed"] = ["validation"]
    for name in ("open", "fsync", "link", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    checkpoint.open = DeadlyFile
    checkpoints.save(saved)
    checkpoints.note({"owed": []}, best=True)
    os._exit(0)


def kill_at_each_call(origin):
    """Count n = 0, 1, ... until a save outlives its n-th call; after each, all must be well.

    It is the best where its note was written, whether its name was or not; else it is validated
    again, and nothing knows it as the best before.
    """
    seen = []
    for calls in range(1000):
        folder = shutil.copytree(origin, origin.with_name(f"killed_{calls}"))
        if (child := os.fork()) == 0:
            die_at(calls, folder)
        _, status = os.waitpid(child, 0)
        path, skipped = Checkpoints(folder).find_latest()
        found = load_checkpoint(path)
        assert not skipped
        assert found["step"] in (30, 40), f"killed at call {calls}"
        assert (found["model"]["weight"] == found["step"]).all()
        for name in ("last.pt", "best.pt"):
            assert load_checkpoint(folder / name)["step"] <= found["step"]
        again = Checkpoints(folder)  # as a run that goes on does
        again.sweep()
        resumed = again.resume(path)
        again.name(path, resumed["names"])
        seen.append((found["step"], resumed["owed"]))
        assert load_checkpoint(folder / "last.pt")["step"] == found["step"]
        best = 40 if seen[-1] == (40, []) else 20
        assert load_checkpoint(folder / "best.pt")["step"] == best
        assert not list(folder.glob(".*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert found["step"] == 40 and steps(folder) == [30, 40]
    order = [(30, []), (40, ["validation"]), (40, [])]
    assert [a for a, b in zip(seen, [*seen[1:], None], strict=True) if a != b] == order
    print(calls)


def test_a_kill_at_any_system_call_of_a_checkpoint_loses_nothing(run):
    # Forked by a process of its own: a child of one that has run threads can wait for ever.
    command = [sys.executable, __file__, str(run)]
    one_thread = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


@pytest.fixture
def trained(tmp_path):
    trainer = toy_trainer(tmp_path / "checkpoints", max_steps=3, record={"spec": tiny_vae().spec})
    trainer.fit()
    trainer.save()
    trainer.note(best=True)
    return tmp_path, trainer


def test_load_model_rebuilds_the_averaged_network_in_eval_mode(trained):
    folder, trainer = trained
    vae = load_model(folder)
    assert isinstance(vae, CustomVAE) and not vae.training
    for name, p in vae.named_parameters():
        assert torch.equal(p, trainer.ema.shadow[name])
    raw = vae3d.load_model(folder / "checkpoints" / "last.pt", ema=False)
    for p, q in zip(raw.parameters(), trainer.task.network.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoint_holds_what_a_resume_needs_and_plain_data_only(trained):
    state = load_checkpoint(trained[0])
    needed = "format step samples best model ema task optimizers scaler loader ranks versions"
    assert set(needed.split()) <= set(state)
    json.dumps(state["spec"]), json.dumps(state["versions"])


def test_foreign_classes_need_trust(tmp_path):
    spec = tiny_vae().spec | {"class_path": "my_lab.MyVAE"}
    write_atomic(tmp_path / "last.pt", {"format": 1, "spec": spec, **state(1)})
    with pytest.raises(ValueError, match="--trust my_lab"):
        load_model(tmp_path)


def test_a_model_with_missing_weights_is_refused(trained, tmp_path):
    state = load_checkpoint(trained[0])
    state["ema"].pop(next(iter(state["ema"])))
    write_atomic(tmp_path / "broken.pt", state)
    with pytest.raises(ValueError, match="do not fit this network: missing: "):
        load_model(tmp_path / "broken.pt")


def test_group_norm_of_the_toy_is_rebuilt_with_its_options(trained):
    norms = [m for m in load_model(trained[0]).modules() if isinstance(m, GroupNorm)]
    assert norms and all(n.num_groups == 4 for n in norms)


def test_write_atomic_removes_its_temporary_after_any_error(tmp_path):
    with pytest.raises(AttributeError):  # a lambda cannot be pickled
        write_atomic(tmp_path / "last.pt", {"bad": lambda: 0})
    assert list(Path(tmp_path).iterdir()) == []


if __name__ == "__main__":
    kill_at_each_call(Path(sys.argv[1]))


# What commit 2c89f8d measured of this checkpoint, by the one rule that there was.
METRICS_OF_2C89F8D = {
    "mae": 0.536323415577499,
    "psnr": 9.792903674635946,
    "ssim": 0.0039429069057579855,
    "foreground_mae": 0.44416982489676515,
    "foreground_psnr": 11.237247883411783,
    "mae_original": 0.2648646565849049,
    "rmse_original": 0.3198762993574252,
    "kl": 0.10808621099507103,
}


def test_a_run_of_an_earlier_version_loads_is_evaluated_and_goes_on(tmp_path, monkeypatch, capsys):
    """`schedule` is `lr_schedule` since, and there is `linear_code`; see tests/data/README.md."""
    monkeypatch.chdir(tmp_path)
    stored = Path(__file__).parent / "data" / "run_of_6fba4f7.pt.gz"
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.pt").write_bytes(gzip.decompress(stored.read_bytes()))
    (tmp_path / "data").mkdir()
    for n in range(3):
        volume = np.random.default_rng(n).random((8, 8, 8)).astype(np.float32)
        np.save(tmp_path / "data" / f"{n}.npy", volume)
    vae = load_vae("run")
    assert vae.contract["preprocess"]["intensity"] == "symmetric" and vae.contract["step"] == 2
    evaluate("run", "data", mode="full", media=False)
    (row,) = csv.DictReader((tmp_path / "evaluation" / "metrics.csv").read_text().splitlines())
    told = {name: float(row[name]) for name in METRICS_OF_2C89F8D}
    assert told == pytest.approx(METRICS_OF_2C89F8D, rel=1e-4)
    convert("run", tmp_path / "folder")
    x = torch.rand(1, 1, 4, 8, 4)
    assert torch.equal(load_vae("folder")(x)[0], vae(x)[0])
    encode("run", "latents", VolumeSource("data"))
    assert len(find_latents("latents")) == 3
    sample("run", latents="latents", out_dir="samples", n=1, prior="gaussian", media=False)
    assert (tmp_path / "samples" / "gaussian" / "sample_000.nii.gz").is_file()
    size = dict(channels=(2, 2), num_res_blocks=1, latent_channels=1)
    model = partial(
        CustomVAE, **size, norm=partial(GroupNorm, num_groups=1), encoder_mid=False,
        decoder_mid=False,
    )  # fmt: skip
    data = DataConfig("data", cache_dir="cache", preprocess=Preprocess(intensity="symmetric"))
    options = dict(
        model=model, patch_size=(4, 4, 4), lr=1e-3, val_every=1, media_every=0, threads=0,
        wandb="disabled", device="cpu", amp="off",
    )  # fmt: skip
    train_3d(data, "run", **options, max_steps=3)
    assert "from step 2" in capsys.readouterr().out
    state = load_checkpoint(checkpoints / "last.pt")
    assert state["step"] == 3
    for kept in (state["preprocess"], state["config"]["data"]["preprocess"]):
        assert (kept["percentiles_of"], kept["rules"]) == ("all", 1)  # as it was begun
    contract = load_vae("folder").contract["preprocess"]
    assert Preprocess.from_dict(contract).percentiles_of == "all"
    train_3d(data, "other", **options, max_steps=1, init_from="folder")
