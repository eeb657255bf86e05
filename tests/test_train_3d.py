"""`train_3d.py` as users run it: the real command line, in processes of its own."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from processes import (
    GAN,
    ROOT,
    TINY,
    Process,
    assert_same_run,
    fork_server,
    losses,
    run,
    volumes,
)

from loaders import DataConfig, survey_data
from train_3d import train_3d
from vae3d.config import _is_users_mistake, parse
from vae3d.losses.adversarial import PatchDiscriminator
from vae3d.training.checkpoint import load_checkpoint
from vae3d.training.run import differences, with_new_options
from vae3d.training.trainer import Trainer

__all__ = ["fork_server", "volumes"]  # fixtures


@pytest.fixture
def options(tmp_path, volumes):
    """Command line of a tiny run into `tmp_path/run`."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    cache = volumes.parent / "cache"
    return ["--config", str(config), "--data.root", str(volumes), "--data.cache_dir", str(cache),
            "--out_dir", str(tmp_path / "run")]  # fmt: skip


def test_run_folder_holds_what_the_design_promises(options, tmp_path):
    text = run([*options, "--media_every", "8"], tmp_path)
    folder = tmp_path / "run"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    files = ("last", "best", "step_00000006", "step_00000008")
    checkpoints = {f"checkpoints/{name}.pt" for name in files}
    assert {"config.yaml", "split.json", "metrics.jsonl"} | checkpoints <= names
    assert any(name.startswith("media/step_00000008/") and name.endswith(".mp4") for name in names)
    assert not any(".partial." in name for name in names)
    split = json.loads((folder / "split.json").read_text())
    assert sum(map(len, split.values())) == 10 and all(split[k] for k in ("train", "val", "test"))
    assert "patches/s" in text and "step 8/8" in text
    config = yaml.safe_load((folder / "config.yaml").read_text())
    reloaded = parse(train_3d, ["--config", str(folder / "config.yaml")])
    assert reloaded["patch_size"] == (8, 8, 8) and config["model"]["init_args"]["channels"] == [
        4,
        8,
    ]
    assert load_checkpoint(folder)["preprocess"]["percentiles"]


def test_the_same_command_again_ends_in_no_time_and_changes_nothing(options, tmp_path):
    run(options, tmp_path)
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    text = run(options, tmp_path)
    assert "continuing" in text and "from step 8" in text
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before
    assert len(losses(tmp_path / "run")) == 8


def test_a_command_that_is_refused_leaves_the_record_of_a_run(options, tmp_path):
    run(options, tmp_path)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    for extra in (["--data.root", "/no/such/folder", "--force"], ["--max_steps", "0", "--force"]):
        one_line([*options, *extra], tmp_path)
        assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_fresh_removes_nothing_before_the_new_run_begins(options, tmp_path):
    run([*options, "--max_steps", "2"], tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one_line([*options, "--fresh", "--data.root", "/no/such/folder"], tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run([*options, "--fresh", "--max_steps", "1"], tmp_path)
    assert sorted(path.name for path in folder.glob("step*")) == ["step_00000001.pt"]


def test_whole_volumes_train_from_python(tmp_path, volumes):
    model, loss = (parse(train_3d, ["--config", str(write(tmp_path, TINY)), "--data.root", ".",
        "--out_dir", "."])[k] for k in ("model", "loss"))  # fmt: skip
    code = train_3d(
        str(volumes), str(tmp_path / "run"), model, loss, patching=None, batch_size=1, max_steps=2,
        val_every=2, media_every=0, wandb="disabled", threads=0, device="cpu",
    )  # fmt: skip
    assert code == 0
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def test_the_precision_is_the_devices_own_and_a_resumed_run_keeps_it(
    options, tmp_path, volumes, monkeypatch
):
    parsed = parse(train_3d, [*options, "--amp", "null", "--val_every", "0"])
    parsed["data"].root = str(volumes)
    for own, max_steps in (("bf16", 1), ("off", 2)):  # continued on a machine without its units
        monkeypatch.setattr("vae3d.training.run.native_amp", lambda device, own=own: own)
        assert train_3d(**parsed | {"max_steps": max_steps}) == 0
        assert load_checkpoint(tmp_path / "run")["amp"] == "bf16"
    assert train_3d(**parsed | {"fresh": True}) == 0
    assert load_checkpoint(tmp_path / "run")["amp"] == "off"


def write(folder, text):
    path = Path(folder) / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "extra", ["", pytest.param(GAN, marks=pytest.mark.slow)], ids=["plain", "gan"]
)
def test_killed_at_random_moments_a_run_ends_as_one_never_killed(options, tmp_path, volumes, extra):
    (tmp_path / "tiny.yaml").write_text(TINY + extra)
    start = time.monotonic()
    run(options, tmp_path)
    seconds = time.monotonic() - start
    (tmp_path / "run").rename(tmp_path / "never_killed")
    kill_until_done([*options, "--threads", "2"], tmp_path, kills=3, longest_s=seconds)
    assert_same_run(tmp_path / "run", tmp_path / "never_killed")


def kill_until_done(argv, folder, kills, longest_s, ranks=1):
    generator = random.Random(0)
    for _ in range(kills):
        process = Process(argv, folder, ranks)
        time.sleep(generator.uniform(0.1, longest_s))
        process.kill()
        assert set(process.wait()) <= {-signal.SIGKILL, 0}, process.text()
    run(argv, folder, ranks)


@pytest.mark.slow
def test_fifty_kills_lose_nothing(options, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY + GAN)
    argv = [*options, "--max_steps", "120", "--save_every", "3", "--val_every", "30"]
    run(argv, tmp_path)
    (tmp_path / "run").rename(tmp_path / "never_killed")
    kill_until_done(argv, tmp_path, kills=50, longest_s=3.0)
    assert_same_run(tmp_path / "run", tmp_path / "never_killed")


@pytest.mark.slow
def test_two_ranks_killed_together_continue_bit_by_bit(options, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY + GAN)
    run(options, tmp_path, ranks=2)
    (tmp_path / "run").rename(tmp_path / "never_killed")
    kill_until_done(options, tmp_path, kills=4, longest_s=6.0, ranks=2)
    assert_same_run(tmp_path / "run", tmp_path / "never_killed")


def test_two_ranks_equal_one_process_with_every_loss_switched_on(options, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY + GAN)
    run([*options, "--batch_size", "4"], tmp_path)
    (tmp_path / "run").rename(tmp_path / "one")
    run([*options, "--batch_size", "1", "--grad_accum", "2"], tmp_path, ranks=2)
    for name in ("train/loss", "train/recon", "val/mae"):
        one, two = losses(tmp_path / "one", name), losses(tmp_path / "run", name)
        assert two == pytest.approx(one, rel=1e-3), name
    assert losses(tmp_path / "run")[1] == pytest.approx(losses(tmp_path / "one")[1], rel=1e-5)


def last_step(folder):
    return max(losses(folder), default=0) if (Path(folder) / "metrics.jsonl").exists() else 0


def wait_for_step(process, folder, step):
    for _ in process.naps():
        if last_step(folder) >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.text()}")


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_and_exits_with_its_code(options, tmp_path, number, code):
    argv = [*options, "--max_steps", "5000", "--save_every", "5000", "--val_every", "0"]
    process = Process(argv, tmp_path)
    wait_for_step(process, tmp_path / "run", 3)
    os.kill(process.ranks[0].pid, number)
    assert process.wait() == [code]
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["step"] == max(losses(tmp_path / "run"))
    assert "Traceback" not in process.text()


def test_a_signal_to_one_rank_stops_both_at_the_same_step(options, tmp_path):
    argv = [*options, "--max_steps", "5000", "--save_every", "5000", "--val_every", "0"]
    process = Process(argv, tmp_path, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    os.kill(process.ranks[1].pid, signal.SIGTERM)
    assert process.wait() == [143, 143]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] >= 3


def test_a_signal_to_a_rank_that_waits_ends_the_validation_of_the_other(options, tmp_path):
    """Rank 0 decodes for a minute, rank 1 waits for it in a collective call."""
    argv = [*options, "--model.class_path", "slow.SlowVAE", "--val_every", "2"]
    process = Process(argv, tmp_path, ranks=2)
    wait_for_step(process, tmp_path / "run", 2)
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        time.sleep(0.02)
    time.sleep(1)
    begun = time.monotonic()
    os.kill(process.ranks[1].pid, signal.SIGUSR1)
    assert process.wait() == [138, 138]
    assert time.monotonic() - begun < 15, process.text()
    assert process.text().count("stopped by SIGUSR1: step 2 is saved; the same command") == 1
    assert "Traceback" not in process.text() + process.text(1)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["step"] == 2 and state["owed"] == ["validation"]


def test_a_rank_that_dies_ends_the_other_and_is_named(options, tmp_path):
    argv = [*options, "--max_steps", "5000", "--save_every", "2", "--val_every", "0",
            "--timeout_minutes", "0.2"]  # fmt: skip
    process = Process(argv, tmp_path, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    process.ranks[1].kill()
    assert process.wait() == [1, -signal.SIGKILL]
    assert "rank 1 no longer answers" in process.text() and "step" in process.text()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_other_within_the_timeout(options, tmp_path):
    argv = [*options, "--max_steps", "5000", "--save_every", "2", "--val_every", "0",
            "--timeout_minutes", "0.1"]  # fmt: skip
    process = Process(argv, tmp_path, ranks=2)
    wait_for_step(process, tmp_path / "run", 3)
    os.kill(process.ranks[1].pid, signal.SIGSTOP)
    process.ranks[0].join(60)
    assert process.ranks[0].exitcode == 1
    assert "rank 1 no longer answers" in process.text()
    process.ranks[1].kill()


def test_world_size_may_change_and_no_sample_is_lost(options, tmp_path):
    run([*options, "--max_steps", "2", "--batch_size", "4"], tmp_path)
    text = run([*options, "--max_steps", "4", "--batch_size", "4"], tmp_path, ranks=2)
    assert "continuing" in text
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["samples"] == 8 + 16


# What users do wrong: exit code 2, one line, nothing half-written


def one_line(argv, folder, ranks=1):
    text = run(argv, folder, ranks=ranks, expect=2)
    errors = [line for line in text.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]


def test_wrong_inputs_exit_with_two_and_one_line_that_helps(options, tmp_path, volumes):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    shutil.copytree(volumes, broken)
    (broken / "subject_03.npy").write_bytes(b"not a volume")
    (tmp_path / "file").write_text("")
    for extra, words in [
        (["--patch_sise", "[8,8,8]"], ["patch_sise"]),
        (["--model.init_args.chanels", "[4,8]"], ["chanels"]),
        (["--data.root", "/no/such/folder"], ["/no/such/folder"]),
        (["--data.root", str(empty)], ["empty"]),
        (["--data.root", str(broken)], ["subject_03.npy"]),
        (["--patch_size", "[8,7,8]"], ["--patch_size", "7", "multiple"]),
        (["--patch_size", "[8,8]"], ["--patch_size", "axes"]),
        (["--batch_size", "0"], ["batch_size"]),
        (["--grad_accum", "0"], ["grad_accum"]),
        (["--max_steps", "0"], ["max_steps"]),
        (["--keep_checkpoints", "1"], ["keep_checkpoints"]),
        (["--ema_decay", "1.5"], ["ema_decay"]),
        (["--threads", "-1"], ["threads"]),
        (["--val_volumes", "-1"], ["val_volumes"]),
        (["--model.init_args.latent_channels", "0"], ["latent_channels"]),
        (["--data.fractions", "[0,1,0]"], ["data.fractions"]),
        (["--config", str(volumes / "subject_00.npy")], ["--config"]),
        (["--out_dir", str(tmp_path / "file" / "run")], ["file"]),
    ]:
        line = one_line([*options, *extra], tmp_path)
        assert all(word in line for word in words), (extra, line)
        assert not list((tmp_path / "run").glob("**/*.pt"))
        assert not list((tmp_path / "run").glob("**/*.partial.*"))


def test_more_ranks_than_volumes_is_said(options, tmp_path, volumes):
    two = tmp_path / "two"
    two.mkdir()
    shutil.copy(volumes / "subject_00.npy", two)
    line = one_line([*options, "--data.root", str(two)], tmp_path, ranks=2)
    assert "volume" in line


def test_changed_options_are_listed_and_harmless_ones_pass(options, tmp_path):
    run([*options, "--max_steps", "2"], tmp_path)
    line = one_line([*options, "--lr", "5e-3", "--model.init_args.latent_channels", "2"], tmp_path)
    assert "lr: 0.001 -> 0.005" in line and "latent_channels: 4 -> 2" in line and "--force" in line
    run([*options, "--max_steps", "3", "--log_every", "3"], tmp_path)
    other = ["--lr", "5e-3", "--patches_per_volume", "3", "--data.fractions", "[0.6,0.2,0.2]"]
    line = one_line([*options, "--max_steps", "4", *other], tmp_path)
    assert "patches_per_volume: 2 -> 3" in line
    text = run([*options, "--max_steps", "4", *other, "--force"], tmp_path)
    assert "changed by --force: lr: 0.001 -> 0.005\n" in text
    assert re.search(r"the order of the data begins anew: rows_per_epoch was \d+, is \d+\n", text)
    kept = "data.fractions: [0.8, 0.1, 0.1] -> [0.6, 0.2, 0.2]; no effect, the run keeps its split"
    assert kept in text
    assert re.search(r"learning rate: \S+ up to step 3, from here 0\.00", text)
    run([*options, "--max_steps", "5", *other], tmp_path)  # the checkpoint has them by now
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 5


def test_a_decoder_is_tuned_on_an_encoder_that_stays(options, tmp_path):
    run([*options, "--max_steps", "4"], tmp_path)
    tune = [*options, "--init_from", str(tmp_path / "run"), "--freeze", "encoder"]
    tune += ["--out_dir", str(tmp_path / "tuned")]
    run([*tune, "--max_steps", "4"], tmp_path)
    run([*tune, "--max_steps", "6"], tmp_path)  # a resumed run keeps to it
    old, new = (load_checkpoint(tmp_path / name) for name in ("run", "tuned"))
    for name, value in new["model"].items():
        kept = name.startswith(("encoder.", "quant_conv.", "head.", "linear_code.analysis."))
        assert torch.equal(value, old["ema"][name]) == kept, name
    assert "needs --init_from" in one_line([*options, "--freeze", "decoder"], tmp_path)


def test_an_option_that_a_newer_version_has_got_is_no_change():
    def newer(lr: float = 1e-3, init_from: str | None = None, blur: float = 0.0): ...

    saved = with_new_options({"lr": 2e-3}, newer)  # by a version with one option
    assert differences(saved, {"lr": 2e-3, "init_from": None, "blur": 0.0}) == []
    assert differences(saved, {"lr": 2e-3, "init_from": None, "blur": 0.5}) == ["blur: 0.0 -> 0.5"]


def test_damaged_checkpoints_stop_a_run_unless_fresh_is_asked_for(options, tmp_path):
    run([*options, "--max_steps", "4"], tmp_path)
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "--fresh" in one_line(options, tmp_path)
    run([*options, "--max_steps", "2", "--fresh"], tmp_path)
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def test_a_disk_that_takes_no_more_costs_one_line_and_no_checkpoint(options, tmp_path):
    run([*options, "--max_steps", "2"], tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    full = Process([*options, "--max_steps", "4"], tmp_path, max_file_bytes=20_000)
    assert full.wait() == [2]
    assert full.text().splitlines()[-1].endswith("step_00000004.pt: File too large")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run([*options, "--max_steps", "4"], tmp_path)
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_volume_that_has_vanished_is_named(options, tmp_path, volumes, part):
    root = shutil.copytree(volumes, tmp_path / "volumes")
    argv = [*options, "--data.root", str(root), "--max_steps", "2"]
    run(argv, tmp_path)
    gone = json.loads((tmp_path / "run" / "split.json").read_text())[part][0]
    next(root.glob(f"{gone}*")).unlink()
    line = one_line([*argv, "--max_steps", "4"], tmp_path)
    assert f"1 gone: {gone}." in line and "--force" in line and "--fresh" in line
    text = run([*argv, "--max_steps", "4", "--force"], tmp_path)
    assert f"1 gone: {gone}. The run keeps its own split" in text
    assert gone not in json.loads((tmp_path / "run" / "split.json").read_text())[part]
    assert ("order of the data begins anew" in text) == (part == "train")


def test_a_run_tells_of_its_data_and_goes_on_without_volumes_that_came_later(
    options, tmp_path, volumes
):
    root = shutil.copytree(volumes, tmp_path / "volumes")
    argv = [*options, "--data.root", str(root)]
    survey = survey_data(DataConfig(root=str(root)))
    survey.ask_headers()
    said = run([*argv, "--max_steps", "2"], tmp_path).splitlines()
    assert said[: len(survey.lines)] == survey.lines and len(survey.lines) == 3
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    np.save(root / "zz_later.npy", np.load(root / "subject_00.npy") * 2)
    text = run([*argv, "--max_steps", "4"], tmp_path)
    assert text.count("1 new and not used: zz_later") == 1
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == split


def test_one_volume_trains(options, tmp_path, volumes):
    argv = [*options, "--data.root", str(volumes / "subject_03.npy"), "--max_steps", "2"]
    run(argv, tmp_path)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split == {"train": ["subject_03"], "val": [], "test": []}


def test_a_manifest_that_changes_its_split_stops_a_run_unless_forced(options, tmp_path, volumes):
    manifest, names = tmp_path / "m.csv", [f"subject_{n:02d}" for n in range(3)]

    def write(*splits):
        rows = [f"{volumes / name}.npy,{part}" for name, part in zip(names, splits, strict=True)]
        manifest.write_text("\n".join(["path,split", *rows]))

    argv = [*options, "--data.root", str(manifest)]
    write("train", "train", "val")
    run([*argv, "--max_steps", "2"], tmp_path)
    write("train", "test", "val")
    line = one_line([*argv, "--max_steps", "4"], tmp_path)
    assert "subject_01" in line and "--fresh" in line and "--force" in line
    run([*argv, "--max_steps", "4", "--force"], tmp_path)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split == {"train": names[:2], "val": names[2:], "test": []}
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    write("val", "test", "val")
    line = one_line([*argv, "--out_dir", str(tmp_path / "other")], tmp_path)
    assert "no volume is left to train on" in line


def test_two_runs_in_one_folder_are_kept_apart(options, tmp_path):
    argv = [*options, "--max_steps", "5000", "--val_every", "0"]
    process = Process(argv, tmp_path)
    wait_for_step(process, tmp_path / "run", 2)
    assert "is training into this folder" in one_line(argv, tmp_path)
    process.ranks[0].kill()
    process.wait()
    run([*options, "--max_steps", str(max(losses(tmp_path / "run")) + 1), "--val_every", "0"],
        tmp_path)  # fmt: skip


def test_secrets_in_the_environment_reach_no_file(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t" * 6)
    run([*options, "--max_steps", "2", "--wandb", "offline"], tmp_path)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_died(options, tmp_path):
    argv = [*options, "--max_steps", "300", "--save_every", "5", "--val_every", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--max-restarts=2", "--standalone", str(ROOT / "train_3d.py"), *argv]  # fmt: skip
    environ = dict(os.environ, OMP_NUM_THREADS="1")
    with open(tmp_path / "torchrun.txt", "w") as output:
        launcher = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        until = time.monotonic() + 200
        while last_step(tmp_path / "run") < 7 and time.monotonic() < until:
            time.sleep(0.05)
        assert launcher.poll() is None, (tmp_path / "torchrun.txt").read_text()
        psutil.Process(launcher.pid).children()[-1].kill()
        code = launcher.wait(300)
    text = (tmp_path / "torchrun.txt").read_text()
    assert code == 0, text
    assert "continuing" in text
    assert sorted(losses(tmp_path / "run")) == list(range(1, 301))


@pytest.mark.slow
def test_compiled_and_checkpointed_training_gives_the_same_numbers(options, tmp_path):
    argv = [*options, "--max_steps", "4", "--val_every", "0"]
    run(argv, tmp_path)
    (tmp_path / "run").rename(tmp_path / "plain")
    for extra in (
        ["--checkpointing", "block"],
        ["--checkpointing", "level"],
        ["--compile"],
        ["--compile", "--checkpointing", "block"],
    ):
        text = run([*argv, *extra, "--fresh"], tmp_path)
        assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4), text


def test_out_of_gpu_memory_is_one_line_that_names_what_helps(options, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB"
        )

    monkeypatch.setattr(Trainer, "backward", full)
    with pytest.raises(ValueError, match=r"Tried to allocate 2.00 GiB; what helps: ") as caught:
        train_3d(**parse(train_3d, options))
    line = str(caught.value)
    for name in ("--batch_size", "--patch_size", "--checkpointing level", "expandable_segments"):
        assert name in line
    assert _is_users_mistake(caught.value) and "\n" not in line


def test_out_of_memory_without_a_gpu_is_one_line_too(options, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "backward", lambda *_: torch.empty(2**60))
    with pytest.raises(ValueError, match=r"allocate \d+ bytes of memory; what helps: --batch") as e:
        train_3d(**parse(train_3d, options))
    assert _is_users_mistake(e.value) and "\n" not in str(e.value)


def test_batch_size_auto_is_found_once_and_kept_by_a_resume(options, tmp_path):
    argv = [*options, "--batch_size", "auto", "--max_steps", "1", "--val_every", "0"]
    text = run(argv, tmp_path)
    found = int(re.search(r"batch_size auto: (\d+)", text)[1])
    assert found > 1
    assert load_checkpoint(tmp_path / "run")["batch_size"] == found
    text = run([*argv, "--max_steps", "2"], tmp_path)
    assert "batch_size auto" not in text
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["samples"] == 2 * found


def test_a_loaded_library_does_not_make_names_of_ours_ambiguous(options):
    """MONAI has a `PatchDiscriminator` too, and may be in memory before the YAML is read."""
    import monai.networks.nets  # noqa: F401

    loss = yaml.safe_load(GAN)["loss"]
    made = parse(train_3d, [*options, f"--loss={json.dumps(loss)}"])["loss"]()
    assert isinstance(made.adversarial.critic.net, PatchDiscriminator)
