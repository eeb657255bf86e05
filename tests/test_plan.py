import re
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import GAN
from test_train_3d import TINY
from toys import SHAPE, on_ranks, tiny_vae

from loaders.texts import load_yaml
from vae3d.commands.plan import is_data, largest_patch, plan
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import Chain, CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.spatial.slabs import own_part
from vae3d.training.memory import RankMemory, Trial
from vae3d.training.slabs import SlabTask
from vae3d.training.task import VAETask


def test_plan_tells_parameters_latent_compression_and_memory(tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    plan(str(recipe), patch_size=(32, 16, 16), batch_size=1, memory_gb=4.0, device="cpu")
    text = capsys.readouterr().out
    assert "4 x 16 x 8 x 8 for a patch of 32 x 16 x 16" in text
    assert re.search(r"compression +2 input numbers", text)  # 8 voxels to 4 channels
    assert re.search(r"memory +\d+\.\d+ GB for 1 x 32 x 16 x 16", text)
    edge = int(re.search(r"fits 4 GB +patch (\d+) x", text)[1])
    assert edge > 32 and edge % 2 == 0


def test_plan_tells_how_many_ranks_a_patch_takes(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY + "sharding: spatial\n")
    line = RankMemory(fixed=1e9, per_voxel=1e6, per_face=1e6, factor=(2, 2, 2))
    monkeypatch.setattr(RankMemory, "measured", lambda *_: line)
    plan(str(recipe), patch_size=(30, 16, 16), batch_size=1, memory_gb=4.0, device="cpu")
    text = capsys.readouterr().out
    assert "8.68 GB on each of 1 ranks, 5.35 GB on each of 2 ranks, 3.56 GB on each of 4" in text
    assert re.search(r"fits 4 GB +4 ranks with batch 1", text)
    with pytest.raises(ValueError, match="--sharding is for a recipe"):
        plan(str(tmp_path), sharding="spatial")


def of_a_rank(world, vae, shapes):
    task = SlabTask(vae, VAELoss())
    for shape in shapes:
        slab = own_part(shape, vae.factor, world.size, world.rank)
        sample = [1, *(axis.stop - axis.start for axis in slab)]
        peak = Trial(task, sample, whole=shape).peak_bytes(1)
    return peak


@pytest.mark.slow
def test_what_a_rank_is_said_to_take_is_what_it_takes():
    """On a slab several times as large as those that are measured."""
    torch.set_num_threads(1)  # as many as ranks have
    vae = CustomVAE(channels=(16, 32), norm=partial(GroupNorm, num_groups=4), num_res_blocks=1)
    shape = (128, 96, 96)
    said = RankMemory.measured(vae, VAELoss(), torch.device("cpu"), "off", 1).of(shape, 2)
    shapes = [(8, 8, 8), shape]  # the first loads code
    found = max(on_ranks(2, of_a_rank, vae, shapes, timeout_s=300))
    assert said == pytest.approx(found, rel=0.1)


def test_plan_refuses_what_training_refuses(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    with pytest.raises(ValueError, match="multiple of the model's factor"):
        plan(str(recipe), patch_size=(9, 8, 8), device="cpu")


def test_largest_patch_lies_on_the_line_through_two_measured_ones():
    peaks = {(64, 64, 64): 10**8 + 10 * 64**3, (32, 32, 32): 10**8 + 10 * 32**3}
    assert largest_patch(peaks, (4, 4, 4), 10**8 + 10 * 100**3 + 1) == (100, 100, 100)
    assert largest_patch(peaks, (4, 4, 4), 10**7) is None


def test_a_model_is_planned_with_the_defaults_of_training(tmp_path, capsys):
    model = tmp_path / "model.yaml"
    model.write_text("class_path: CustomVAE\ninit_args: {channels: [4, 8], norm: NoNorm}\n")
    plan(str(model), patch_size=(16, 16, 8), batch_size=1, device="cpu")
    assert "4 x 8 x 8 x 4 for a patch of 16 x 16 x 8" in capsys.readouterr().out


def test_a_model_goes_by_its_name_too(capsys):
    plan("anisotropic", patch_size=(8, 8, 4), batch_size=1, device="cpu")
    assert re.search(r"factor +4 x 4 x 2", capsys.readouterr().out)


def test_a_model_that_the_default_patch_does_not_fit_is_refused_by_the_option():
    with pytest.raises(
        ValueError, match=r"--patch_size \[64, 64, 64\] has 3 axes, the model has 2"
    ):
        plan("stable_diffusion", device="cpu")


def test_what_is_neither_recipe_nor_model_nor_data_is_told():
    with pytest.raises(
        ValueError, match=r"ixi_t2: .*no recipe of that name; recipes are ct, demo, ixi_t1"
    ):
        plan("ixi_t2", device="cpu")


def test_names_of_recipes_win_over_folders_which_are_data_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("monai").mkdir()
    Path("mine.yaml").write_text(TINY)
    Path("scan.nii").touch()
    assert not any(map(is_data, ("demo", "ixi_t1", "monai", "mine.yaml", "gone")))
    assert all(map(is_data, ("./demo", "scan.nii", "*.nii", str(tmp_path))))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with two volumes, in a working folder; a training step takes 1 kB a voxel."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        np.save(folder / f"{number}.npy", rng.integers(0, 900, (32, 40, 24)).astype(np.int16))
    monkeypatch.setattr(Trial, "peak_bytes", lambda trial, n: 1000 * n * prod(trial.sample_shape))
    return str(folder)


def test_a_proposal_for_data_is_printed_after_their_fingerprint(data, capsys):
    plan(data, device="cpu")
    facts, _, recipe = capsys.readouterr().out.partition("\n\n")
    assert re.search(r"^shape +32 x 40 x 24 ", facts, re.MULTILINE)
    options = load_yaml(recipe)
    assert options["data"]["root"] == data
    assert options["patch_size"] == [32, 40, 24]
    assert options["batch_size"] == 2
    assert not Path("recipe.yaml").exists()


def test_a_recipe_is_written_with_the_fingerprint_at_its_head(data, capsys):
    plan("data", write="mine.yaml", device="cpu")
    said, text = capsys.readouterr().out, Path("mine.yaml").read_text()
    assert "wrote mine.yaml: python train_3d.py --config mine.yaml" in said
    assert "# shape         32 x 40 x 24" in text
    options = load_yaml(text)
    assert options["out_dir"] == "runs/mine"
    assert options["data"]["root"] == data  # wherever it is used from


def test_a_glob_and_a_manifest_are_data_too(data, capsys):
    Path("all.csv").write_text("path\ndata/0.npy\ndata/1.npy\n")
    for root in ("data/*.npy", "all.csv"):
        plan(root, device="cpu")
        facts, _, recipe = capsys.readouterr().out.partition("\n\n")
        assert re.search(r"^volumes +2 ", facts, re.MULTILINE)
        options = load_yaml(recipe)
        assert options["data"]["root"] == str(Path(root).absolute())
        assert options["out_dir"] == ("runs/all" if root == "all.csv" else "runs/data")


def test_a_file_is_not_written_over(data):
    Path("mine.yaml").write_text("precious")
    with pytest.raises(ValueError, match=r"--write mine\.yaml: is there already"):
        plan(data, write="mine.yaml", device="cpu")
    assert Path("mine.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    "memory_gb, patch, batch",
    [(0.1, [32, 40, 24], 2), (0.05, [32, 40, 24], 1), (0.02, [28, 28, 24], 1)],
)
def test_patch_and_batch_are_the_largest_that_fit_into_the_memory(
    data, memory_gb, patch, batch, capsys
):
    plan(data, memory_gb=memory_gb, device="cpu", write="mine.yaml")
    options = load_yaml(Path("mine.yaml").read_text())
    assert (options["patch_size"], options["batch_size"]) == (patch, batch)


def test_memory_for_not_even_the_smallest_patch_is_told_and_nothing_written(data):
    options = dict(patch_size=(16, 16, 16), batch_size=16, device="cpu", write="mine.yaml")
    with pytest.raises(ValueError, match=r"no patch, not even 16 x 16 x 16, trains within 0.01 GB"):
        plan(data, memory_gb=0.01, **options)
    assert not Path("mine.yaml").exists()


def test_a_patch_and_a_batch_that_are_asked_for_are_proposed(data, capsys):
    plan(data, patch_size=(16, 16, 16), batch_size=5, device="cpu")
    options = load_yaml(capsys.readouterr().out.partition("\n\n")[2])
    assert (options["patch_size"], options["batch_size"]) == ([16, 16, 16], 5)
    with pytest.raises(ValueError, match="multiple of the model's factor"):
        plan(data, patch_size=(15, 16, 16), device="cpu")


def test_write_is_refused_for_what_is_a_recipe_itself(tmp_path):
    with pytest.raises(ValueError, match="--write is for the recipe that data ask for"):
        plan("demo", write=str(tmp_path / "a.yaml"), device="cpu")


@pytest.fixture
def trial():
    return Trial(VAETask(tiny_vae(), VAELoss()), (1, *SHAPE))


def test_trying_batches_touches_neither_weights_nor_gradients_nor_random_numbers(trial):
    before = [p.detach().clone() for p in trial.task.parameters()]
    state = torch.get_rng_state()
    assert trial.peak_bytes(2) >= 0
    assert all(torch.equal(p, q) for p, q in zip(trial.task.parameters(), before, strict=True))
    assert all(p.grad is None for p in trial.task.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def measured(trial, monkeypatch):
    """A trial whose batches take 1000 bytes and 300 more a sample."""
    monkeypatch.setattr(Trial, "peak_bytes", lambda self, n: 1000 + 300 * n)
    return trial


@pytest.mark.parametrize("budget, fits", [(1300, 1), (1599, 1), (2500, 5), (10**9, 64)])
def test_the_largest_batch_is_the_last_that_stays_in_the_budget(measured, budget, fits):
    assert measured.largest_batch(budget) == fits


@pytest.mark.parametrize("budget, fits", [(1300, 1), (2500, 5), (2799, 5), (4000, 10)])
def test_on_a_gpu_it_is_found_by_trying(measured, budget, fits):
    found = measured._search(budget, most=256)
    assert fits - fits // 8 <= found <= fits


class Card:
    """Stands for torch.cuda: other programs hold 2 GB of 24, this one 1 GB, a sample takes 3 GB."""

    def __init__(self, monkeypatch):
        self.calls, self.sizes = [], []
        for name in ("empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: self.calls.append(name))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (21e9, 24e9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1e9)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", self.peak)
        monkeypatch.setattr(Trial, "device", torch.device("cuda"))
        forward = VAETask.forward

        def counted(task, batch, step):
            self.sizes.append(len(batch.image))
            self.calls.append("step")
            return forward(task, batch, step)

        monkeypatch.setattr(VAETask, "forward", counted)

    def peak(self, *_):
        self.calls.append("read")
        return 1e9 + 3e9 * self.sizes[-1]


def test_on_a_gpu_two_steps_are_measured_by_what_is_reserved(trial, monkeypatch):
    card = Card(monkeypatch)
    assert trial.largest_batch() == 6  # 19 GB of 0.92 x 22
    assert card.calls[:5] == ["empty_cache", "reset_peak_memory_stats", "step", "step", "read"]
    assert card.sizes == [1, 1, 2, 2, 4, 4, 8, 8, 6, 6, 7, 7]


def test_what_is_measured_is_what_trains(monkeypatch):
    """Compiled, recomputing and with the discriminator, from the first step on."""
    task, seen = VAETask(tiny_vae(), GAN()), []
    task.network.set_checkpointing("block")
    task.network.decoder._compiled_call_impl = "compiled"
    monkeypatch.setattr(Chain, "compile", lambda self: seen.append(self))
    monkeypatch.setattr(torch.compiler, "reset", lambda: seen.append("forgotten"))
    loss = VAETask.discriminator_loss
    monkeypatch.setattr(
        VAETask, "discriminator_loss", lambda *a: seen.append("discriminator") or loss(*a)
    )
    Trial(task, (1, *SHAPE)).peak_bytes(1)
    copied, *rest = seen
    assert copied is not task.network.decoder and copied.checkpointing == "block"
    assert rest == ["discriminator", "forgotten"]


@pytest.mark.parametrize("same_shapes", [True, False])
def test_kernels_are_tried_out_where_they_are_in_training(trial, same_shapes, monkeypatch):
    seen, forward = [], VAETask.forward

    def watched(*args):
        seen.append(torch.backends.cudnn.benchmark)
        return forward(*args)

    monkeypatch.setattr(VAETask, "forward", watched)
    trial.same_shapes = same_shapes
    trial.peak_bytes(1)
    assert seen == [same_shapes]


def test_a_recipe_that_compiles_is_measured_compiled(tmp_path, monkeypatch):
    recipe, compiled = tmp_path / "tiny.yaml", []
    recipe.write_text(TINY + "compile: true\n")
    monkeypatch.setattr(Chain, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(Trial, "peak_bytes", lambda self, n: len(compiled) * sum(self.sample_shape))
    plan(str(recipe), patch_size=(32, 16, 16), batch_size=1, memory_gb=4.0, device="cpu")
    assert len(compiled) == 2


def test_not_even_one_patch_is_said(measured):
    with pytest.raises(ValueError, match="not even one patch"):
        measured.largest_batch(1200)


def test_memory_grows_with_the_patch():
    task = VAETask(tiny_vae(channels=(8, 16)), VAELoss())
    large = Trial(task, (1, 64, 48, 48)).peak_bytes(1)
    assert large > 2 * 64 * 48 * 48 * 8 * 4  # at least the first block's activations
