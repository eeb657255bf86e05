"""`--sharding spatial` as users run it: the command line, ranks as processes of their own."""

import signal
import time
from functools import partial

import numpy as np
import pytest
from processes import TINY, Process, fork_server, losses, run, volumes

from loaders import PatchLoader, Reading, VolumeStore
from vae3d.spatial.slabs import own_part

__all__ = ["fork_server", "volumes"]  # fixtures


@pytest.fixture
def command(tmp_path, volumes):
    """Command line of a tiny run into a folder of `tmp_path`."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    cache = volumes.parent / "cache"

    def line(folder, *more):
        options = ["--config", config, "--data.root", volumes, "--data.cache_dir", cache]
        options += ["--out_dir", tmp_path / folder, "--lr_schedule", "constant", *more]
        return list(map(str, options))

    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    "cutting",
    [
        ("--patching", "null", "--batch_size", "1"),  # 12 to 14 rows, of which 13 are cut unevenly
        ("--patch_size", "[10,8,8]", "--slab_axis", "y"),
    ],
)
def test_two_ranks_train_what_one_does_and_one_goes_on(command, tmp_path, cutting):
    run(command("alone", *cutting), tmp_path)
    slabs = command("slabs", *cutting, "--media_every", "4")
    run([*slabs, "--sharding", "spatial", "--max_steps", "4"], tmp_path, ranks=2)
    assert (tmp_path / "slabs" / "media" / "step_00000004").is_dir()
    assert "continuing" in run(slabs, tmp_path)  # on one rank
    for name in ("train/loss", "train/recon", "train/kl", "val/mae"):
        alone, found = (losses(tmp_path / folder, name) for folder in ("alone", "slabs"))
        assert found.keys() == alone.keys()
        assert list(found.values()) == pytest.approx(list(alone.values()), rel=1e-3)
    assert losses(tmp_path / "slabs")[1] == pytest.approx(losses(tmp_path / "alone")[1], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--augment", "{flip: [0]}", "--batch_size", "auto"),
            "not go with --batch_size auto, --augment",
        ),
        (
            ("--patch_size", "[4,2,8]", "--slab_axis", "y"),
            "2 rows along y are 1 cells of the factor 2, fewer than the 2 ranks that share them; "
            "--slab_axis z has 4",
        ),
        (("--model.block", "{class_path: ResBlock, init_args: {dropout: 0.1}}"), "dropout to 0"),
    ],
)
def test_what_slabs_do_not_do_is_refused_in_one_line(command, tmp_path, more, words):
    text = run(command("run", "--sharding", "spatial", *more), tmp_path, ranks=2, expect=2)
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert words in line and "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_and_is_named(command, tmp_path):
    argv = command("run", "--sharding", "spatial", "--max_steps", "5000", "--val_every", "0",
                   "--timeout_minutes", "0.2")  # fmt: skip
    process = Process(argv, tmp_path, ranks=2)
    until = time.monotonic() + 120
    while len(losses_so_far(tmp_path / "run")) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    process.ranks[1].kill()
    assert process.wait() == [1, -signal.SIGKILL]
    assert "rank 1 no longer answers" in process.text() and "step" in process.text()


def losses_so_far(folder):
    return losses(folder) if (folder / "metrics.jsonl").exists() else {}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("patch", [(7, 6, 4), (20, 20, 4), None])
def test_slabs_of_ranks_are_the_patches_of_one(tmp_path, patch, axis):
    """Also where a patch is larger than its volume, whose end is mirrored into it."""
    rng = np.random.default_rng(0)
    for i, rows in enumerate((12, 15)):
        shape = rows, rows - 4, 5
        np.save(tmp_path / f"{i}.npy", rng.random(shape, np.float32))
        np.save(tmp_path / f"{i}_mask.npy", (rng.random(shape) < 0.5).astype(np.uint8))
    reading = Reading(mask="{name}_mask.npy")
    store = VolumeStore.build(tmp_path, tmp_path / "cache", reading=reading)
    options = dict(patching=None if patch is None else "random_parts", batch_size=2, threads=0)
    whole = next(iter(PatchLoader(store, patch, **options)))
    parts, weights = [], []
    for rank in range(3):
        part = partial(own_part, factor=(2, 2, 2), parts=3, rank=rank, axis=axis)
        batch = next(iter(PatchLoader(store, patch, part=part, **options)))
        assert batch.whole == whole.image.shape[2:]
        assert batch.index.equal(whole.index)
        parts.append(batch.image.numpy())
        weights.append(batch.weight.numpy())
    assert np.array_equal(np.concatenate(parts, 2 + axis), whole.image.numpy())
    assert np.array_equal(np.concatenate(weights, 2 + axis), whole.weight.numpy())
    assert 0 < whole.weight.mean() < 1
