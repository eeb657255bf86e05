"""What a GPU is spared, shown without one: on the meta device, by stand-ins, and by counting."""

import configparser
import os
import random
import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import ToyLoader, on_ranks, tiny_vae, toy_trainer

from loaders import Batch
from vae3d.exact import executor
from vae3d.exact.executor import Executor, decode_exact, encode_exact
from vae3d.exact.nodes import Conv, Kept, Source
from vae3d.inference import reconstruct as coding_module
from vae3d.inference.costs import Living
from vae3d.inference.evaluation import Evaluator
from vae3d.inference.reconstruct import Coding, autoencode, bytes_taken, fitting
from vae3d.kernels.device import there
from vae3d.kernels.moments import Moments, of_blocks
from vae3d.kernels.precision import exact_float32, settle_float32
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.blocks import ResBlock
from vae3d.models.norm import BatchNorm, GroupNorm
from vae3d.spectrum import pooled_to, resized, spectral_gap
from vae3d.stage2.diffusion import positions_of
from vae3d.training import distributed
from vae3d.training.augment import Augmentation, resampled
from vae3d.training.checkpoint import load_checkpoint
from vae3d.training.distributed import World, open_world
from vae3d.training.memory import Trial, telling_of_device
from vae3d.training.task import VAETask

ROOT = Path(__file__).resolve().parents[1]
META = torch.device("meta")


class Bus(TorchDispatchMode):
    """Counts what is copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            found = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            if len({t.device for t in found}) > 1:
                self.copies.append(out.numel())
        return out


@pytest.fixture
def _float32_as_before():
    asked, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(asked)
    torch.backends.cudnn.allow_tf32 = convolutions


# Inference


def test_patches_of_a_volume_on_the_device_stay_there_and_go_through_together(monkeypatch):
    vae, x = tiny_vae().eval().to(META), torch.empty(1, 160, 160, 160, device=META)
    monkeypatch.setattr(coding_module, "check_finite", lambda *_: None)  # it reads, once a volume
    passes = []
    for name in ("encode", "decode"):
        run = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda b, run=run: passes.append(len(b)) or run(b))
    with Bus() as bus:
        recon, *_ = autoencode(vae, x, "patch", patch_size=(64, 64, 64), batch_size=32)
    assert recon.shape == x.shape
    assert passes == [32, 32, 32, 32]  # 64 patches there, 64 back
    # The weights of a blend, of four tiles along each of three axes, in latent voxels and others.
    assert bus.copies == [4 * 3 * 32, 4 * 3 * 64]


def test_on_a_gpu_as_many_patches_go_together_as_half_of_its_free_memory_takes():
    assert fitting(1_000, free=20_000) == 10
    assert fitting(1_000, free=1_000) == 1
    assert fitting(1, free=10**9) == 32


def test_what_a_pass_takes_is_its_peak_beside_what_was_there(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000)
    assert bytes_taken(lambda: calls.append("run"), torch.device("cuda")) == 700
    assert calls == ["reset", "run"]


@pytest.mark.parametrize(("free", "there"), [(10_000, True), (500, False)])
def test_a_volume_goes_to_the_gpu_whole_where_it_is_little_there(free, there, monkeypatch):
    monkeypatch.setattr(coding_module, "_home", lambda _: torch.device("cuda"))
    monkeypatch.setattr(coding_module, "free_bytes", lambda _: free)
    volume = SimpleNamespace(device=torch.device("cpu"), shape=(25,), to=lambda device: device.type)
    assert coding_module._near(None, volume, 50) == ("cuda" if there else volume)


def test_on_the_cpu_one_patch_goes_at_a_time_unless_told():
    vae = tiny_vae().eval()
    assert Coding()._together(vae, None, (1, 8, 8, 8)) == 1
    assert Coding(batch_size=3)._together(vae, None, (1, 8, 8, 8)) == 3


def test_without_gradients_a_block_holds_two_volumes_beside_its_input():
    """The normalized and the activated one; what a shortcut makes is not there yet."""
    norm = partial(GroupNorm, num_groups=4)
    block = ResBlock(16, 8, 3, norm, "silu").to(META)
    x = torch.empty(1, 16, 16, 16, 16, device=META)
    with torch.no_grad(), Living() as held:
        block(x)
    assert held.peak / x.nbytes == pytest.approx(2, abs=0.01)


def test_slices_of_a_2d_model_go_through_together_as_told_with_the_result_of_one_by_one():
    vae, x = tiny_vae(spatial_dims=2).eval(), torch.rand(1, 16, 12, 5)
    for a, b in zip(autoencode(vae, x, "full"), autoencode(vae, x, "full", batch_size=3),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_amp_is_off_unless_asked_and_leaves_validation_its_own():
    vae, x = tiny_vae().eval(), torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        whole = vae.encode(x[None]).mean[0]
    off, half = (Coding("full", amp=amp).encode(vae, x)[0] for amp in ("off", "bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        validated = Coding("full").encode(vae, x)[0]
    assert torch.equal(off, whole)
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.05)
    assert torch.equal(validated, half)


def test_latents_say_in_what_precision_they_were_made_where_it_is_not_float32():
    assert "amp" not in Coding("full").facts()
    assert Coding("full", amp="bf16").facts()["amp"] == "bf16"


def test_exact_is_exact_in_float32_alone():
    with pytest.raises(ValueError, match="mode exact computes in float32; leave out amp bf16"):
        Coding("exact", amp="bf16")
    with pytest.raises(ValueError, match="amp 'half' is unknown; choose one of off, bf16, fp16"):
        Coding("full", amp="half")


def test_rows_of_an_evaluation_without_amp_are_kept_from_before_there_was_one():
    old = {"mode": "full", "overlap": 0.5}
    options = [Evaluator(None, None, Path(), how)._matters() for how in (old, old | {"amp": "off"})]
    assert options[0] == options[1] == old
    assert Evaluator(None, None, Path(), old | {"amp": "bf16"})._matters()["amp"] == "bf16"


# Exact mode


def test_activations_and_statistics_of_the_exact_mode_stay_on_the_device():
    """On the meta device nothing could be read back; the volume goes there once."""
    vae, x = tiny_vae().eval().to(META), torch.rand(1, 32, 24, 16)
    out = torch.empty(x.shape, device=META)
    with Bus() as bus:
        posterior = encode_exact(vae, x, memory_gb=1)
        decode_exact(vae, posterior.mean, memory_gb=1, out=out)
    assert posterior.mean.shape == (vae.latent_channels, 16, 12, 8)
    fold = 8 * 8 * 27  # how the weights after an upsampling are summed, in decoding
    assert bus.copies == [x.numel(), fold]


@pytest.mark.parametrize(("budget", "place"), [(1.0, META), (1e-4, torch.device("cpu"))])
def test_what_the_device_cannot_hold_goes_to_the_host(budget, place):
    home = META, torch.float32
    source = Source(torch.empty(8, 32, 16, 16, device=META), (32, 16, 16), *home)
    node = Kept(Conv(source, nn.Conv3d(8, 8, 3, padding=1, device=META)))
    nodes, _, where = Executor(budget, home=home).to_store(node)
    assert nodes == [node] and where == place


def test_the_budget_is_the_devices_and_half_of_what_is_free_there_where_none_is_given(monkeypatch):
    monkeypatch.setattr(executor, "half_of_free", lambda device: {"meta": 8000}.get(device.type, 5))
    run = Executor(home=(META, torch.float32))
    assert run.budgets == {META: 8000, torch.device("cpu"): 5} and run.work == 1000
    assert Executor(2**-30 * 100).budgets == {torch.device("cpu"): 100}


def test_tiles_of_a_gpu_are_as_large_as_the_budget_allows():
    source = Source(torch.empty(8, 64, 16, 16, device=META), (64, 16, 16), META, torch.float32)
    assert Executor(1.0, home=(META, torch.float32)).tile_size(source) == [64, 16, 16]
    assert Executor(1.0).tile_size(source) == [16, 16, 16]


def test_statistics_taken_at_once_are_those_taken_block_by_block(monkeypatch):
    tile = torch.randn(1, 5, 3, 50, 70) * 2 + 100
    together, singly = Moments(5), Moments(5)
    singly.update(tile)
    on_gpu = SimpleNamespace(type="cuda")

    class There(torch.Tensor):
        device = on_gpu

    monkeypatch.setattr(
        "vae3d.kernels.moments.of_blocks", lambda values: of_blocks(values.as_subclass(There))
    )
    together.update(tile)
    for a, b in ((together.mean, singly.mean), (together.m2, singly.m2)):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b, rtol=1e-6, atol=0)


# float32


@pytest.mark.usefixtures("_float32_as_before")
def test_float32_means_float32_unless_torch_was_asked_for_less():
    with open_world("cpu"):
        assert not torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    settle_float32()
    assert torch.backends.cudnn.allow_tf32
    with exact_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("_float32_as_before")
def test_the_exact_mode_never_takes_tf32():
    torch.set_float32_matmul_precision("high")
    settle_float32()
    vae, seen = tiny_vae().eval(), []
    vae.head.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    encode_exact(vae, torch.rand(1, 8, 8, 8))
    assert seen == [False] and torch.backends.cudnn.allow_tf32


# The loop


def counted(world, folder):
    """The collectives that a run of five steps asks for, by name."""
    calls = []

    def spy(name, true, *args, **options):
        calls.append(name)
        return true(*args, **options)

    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list"):
        setattr(dist, name, partial(spy, name, getattr(dist, name)))
    trainer = toy_trainer(folder, world, max_steps=5, log_every=100, save_every=0)
    calls.clear()
    trainer.due = lambda every: False  # the end would be logged and saved
    trainer.fit()
    return calls


def test_a_step_asks_the_other_ranks_for_one_thing_alone(tmp_path):
    for calls in on_ranks(2, counted, tmp_path):
        assert calls == ["all_reduce"] * 5  # whether one of them wants to stop


def broken(world, folder):
    loader = ToyLoader(10, 2, world.rank, world.size)
    if world.rank == 1:
        images = iter(range(100))
        stream = loader.stream

        def once_not_finite():
            for batch in stream():
                if next(images) == 1:
                    batch.image[:] = torch.nan
                yield batch

        loader.stream = once_not_finite
    trainer = toy_trainer(folder, world, loader=loader, max_steps=3)
    trainer.fit()
    weights = [p.detach().clone() for p in trainer.task.network.parameters()]
    return float(trainer.skipped), weights


def test_a_loss_that_is_not_finite_on_one_rank_drops_the_step_of_all(tmp_path):
    (skipped, weights), (skipped_there, weights_there) = on_ranks(2, broken, tmp_path)
    assert skipped == skipped_there == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_there, strict=True))
    assert all(bool(w.isfinite().all()) for w in weights)


def test_a_term_that_is_not_finite_drops_the_step_though_its_gradient_is(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=2)
    forward = trainer.task.forward

    def with_a_number(batch, step):
        terms = forward(batch, step)
        return terms | {"measured": torch.tensor(torch.inf if step == 0 else 1.0)}

    trainer.task.forward = with_a_number
    trainer.fit()
    assert float(trainer.skipped) == 1


@pytest.mark.parametrize("same_shapes", [True, False])
def test_kernels_are_tried_out_for_patches_of_one_shape_not_for_whole_volumes(
    same_shapes, tmp_path
):
    seen = []

    def validate(network, step):
        seen.append(("validation", torch.backends.cudnn.benchmark))
        return {"val/mae": 1.0}

    trainer = toy_trainer(
        tmp_path, max_steps=1, validate=validate, val_every=1, same_shapes=same_shapes
    )
    backward = trainer.backward
    trainer.backward = lambda window: (
        seen.append(("training", torch.backends.cudnn.benchmark)) or backward(window)
    )
    trainer.fit()
    assert seen == [("training", same_shapes), ("validation", False)]


def test_the_peak_of_memory_is_that_since_the_last_line(tmp_path, monkeypatch):
    trainer, calls = toy_trainer(tmp_path), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 3e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    trainer.device = torch.device("cuda")
    numbers = trainer._clock()
    assert (numbers["perf/gpu_memory_gb"], numbers["perf/gpu_reserved_gb"]) == (2.0, 3.0)
    assert calls == ["reset"]


def test_batch_norm_does_not_send_its_count_to_the_device():
    norm = BatchNorm(4).to(META)
    with Bus() as bus:
        norm(torch.empty(2, 4, 8, 8, 8, device=META))
    assert not bus.copies


@pytest.mark.parametrize(
    "run",
    [
        lambda x, z: spectral_gap(pooled_to(x, z.shape[2:]), z),
        lambda x, z: resized(z, (3, 2, 2)),
        lambda x, z: z + there(z, positions_of, z.shape[2:], 4)[:4].view(4, 1, 1, 4),
    ],
    ids=["SpectrumMatching", "ScaleEquivariance", "condition"],
)
def test_what_the_cpu_makes_goes_to_the_device_once_not_in_each_step(run):
    x, z = (torch.empty(2, 4, *shape, device=META) for shape in ((16, 12, 8), (8, 6, 4)))
    with torch.inference_mode(), Bus() as before:
        run(x, z)
    with Bus() as after:
        run(x, z.requires_grad_())  # and what an inference has made serves a gradient
    assert before.copies and not after.copies


def half_sharded(world, folder):
    dtypes = []
    trainer = toy_trainer(folder, world, max_steps=1, sharding="fsdp", amp="bf16", save_every=0)
    layer = next(m for m in trainer.task.network.modules() if isinstance(m, nn.Conv3d))
    layer.register_forward_pre_hook(lambda module, _: dtypes.append(module.weight.dtype))
    trainer.fit()
    kept = {p.dtype for p in trainer.task.network.parameters()}
    return trainer.tracker.losses(), dtypes, kept


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
def test_sharded_weights_travel_in_amp_and_are_kept_in_float32(tmp_path):
    alone = toy_trainer(tmp_path, max_steps=1, batch_size=4, amp="bf16")
    alone.fit()
    (losses, dtypes, kept), _ = on_ranks(2, half_sharded, tmp_path / "fsdp")
    assert torch.bfloat16 in dtypes and kept == {torch.float32}
    assert losses == pytest.approx(alone.tracker.losses(), rel=0.02)


# Ranks on GPUs


@pytest.fixture
def _two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


@pytest.mark.usefixtures("_two_gpus")
def test_ranks_share_gpus_by_gloo_alone():
    assert distributed._device("cuda", 3, shared=True) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="local rank 3 has no GPU of its own, there are 2"):
        distributed._device("cuda", 3)


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize(
    ("backend", "wanted"),
    [(None, ("nccl", torch.device("cuda", 1))), ("gloo", ("gloo", None))],
)
def test_nccl_is_told_its_device_from_the_start(backend, wanted, monkeypatch):
    class Told(Exception):
        pass

    def told(backend, **options):
        raise Told(backend, options["device_id"])

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", told)
    with pytest.raises(Told) as found, open_world("cuda", backend=backend):
        pass
    assert found.value.args == wanted


def test_a_sum_over_ranks_of_one_is_the_number_itself():
    assert World().add(2.5) == 2.5


# MPS


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (
            NotImplementedError(
                "The operator 'aten::grid_sampler_3d' is not currently implemented for the MPS "
                "device. If you want this op to be considered for addition please comment on ..."
            ),
            "grid_sampler_3d",
        ),
        (
            TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            ),
            "float64",
        ),
    ],
)
def test_what_mps_lacks_is_named_in_one_line(error, lacking):
    said = f"--device mps does not have {lacking}, "
    with pytest.raises(ValueError, match=said) as caught, telling_of_device("--batch_size"):
        raise error
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in str(caught.value)


@pytest.mark.parametrize("error", [TypeError("unsupported operand"), NotImplementedError("aten")])
def test_other_errors_of_these_types_are_left_as_they_are(error):
    with pytest.raises(type(error)) as caught, telling_of_device("--batch_size"):
        raise error
    assert caught.value is error


def test_ranks_on_mps_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--device mps is one GPU"), open_world("mps"):
        pass


def test_an_automatic_batch_on_mps_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(Trial, "device", torch.device("mps"))
    with pytest.raises(ValueError, match=r"mps does not tell .* give --batch_size a number"):
        Trial(None, (1, 8, 8, 8)).largest_batch()


# With a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["full", "patch", "exact"])
def test_a_gpu_reconstructs_what_the_cpu_does(mode):
    vae, x = tiny_vae().eval(), torch.rand(1, 24, 16, 20)
    how = {"patch_size": (8, 8, 8)} if mode == "patch" else {}
    wanted = autoencode(vae, x, mode, **how)
    with exact_float32():
        found = autoencode(vae.cuda(), x, mode, **how)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_waits_for_nothing_in_a_step_saves_and_goes_on(tmp_path):
    device = torch.device("cuda", 0)

    def trainer_of(steps):
        change = Augmentation((0, 1, 2), (5.0, 5.0, 5.0), 0.1, 0.02)
        task = VAETask(tiny_vae().to(device), VAELoss().to(device), augment=change)
        options = {
            "task": task,
            "amp": "bf16",
            "same_shapes": True,
            "save_every": 2,
            "log_every": 4,
        }
        return toy_trainer(tmp_path, World(device=device), max_steps=steps, **options)

    first = trainer_of(4)
    batches = first.fetch(first.loader.stream())
    window = [replace(batch, image=batch.image.to(device)) for batch in batches]
    first.update(first.backward(window), window)  # takes memory, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        first.update(first.backward(window), window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first.fit()
    second = trainer_of(6)
    second.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    second.fit()
    assert second.step == 6 and float(second.skipped) == 0


# Augmentation on the device


def patches(*shape, weight=False):
    x = torch.rand(3, 1, *shape)
    zeros = torch.zeros(3, len(shape), dtype=torch.long)
    return Batch(x, zeros[:, 0], zeros, torch.tensor([4, 7, 9]), x.clone() if weight else None)


def test_augmentation_depends_on_seed_step_and_sample_not_on_the_batch():
    change = Augmentation((0, 2), (20.0, 0.0, 10.0), 0.2, 0.1)
    batch = patches(8, 12, 10)
    whole = change(batch, 0, 5).image
    for row in range(3):
        one = Batch(*(t[row : row + 1] for t in (batch.image, batch.volume, batch.corner,
                                                 batch.index)))  # fmt: skip
        torch.testing.assert_close(change(one, 0, 5).image[0], whole[row])
    assert not torch.equal(change(batch, 0, 6).image, whole)
    assert not torch.equal(change(batch, 1, 5).image, whole)


def test_flips_mirror_half_of_the_samples_and_move_the_weights_with_them():
    flipped, batch = 0, patches(6, 5, 4, weight=True)
    for step in range(60):
        changed = Augmentation(flip=(1,))(batch, 0, step)
        assert torch.equal(changed.image, changed.weight)
        for before, after in zip(batch.image, changed.image, strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(2))
            flipped += not torch.equal(after, before)
    assert 60 < flipped < 120


class Most(random.Random):
    """Draws the largest numbers."""

    def uniform(self, a, b):
        return b


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_about_an_axis_is_that_of_the_voxels(axis):
    x, turned = torch.rand(1, 1, 8, 8, 8), [0.0, 0.0, 0.0]
    turned[axis] = 90.0
    found = Augmentation(rotation_deg=tuple(turned)).affine(Most(), x.shape[2:])
    plane = [2 + a for a in range(3) if a != axis]
    wanted = x.rot90(-1, plane)
    torch.testing.assert_close(resampled(x, found[None], "bilinear", "reflection"), wanted)


def test_half_a_turn_of_a_patch_that_is_no_cube_keeps_its_voxels():
    x = torch.rand(1, 1, 8, 12, 6)
    found = Augmentation(rotation_deg=(0.0, 180.0, 0.0)).affine(Most(), x.shape[2:])
    torch.testing.assert_close(resampled(x, found[None], "bilinear", "zeros"), x.flip(2, 4))


def test_scaling_enlarges_about_the_middle():
    x = torch.zeros(1, 1, 8, 8)
    x[..., 3:5, 3:5] = 1
    found = Augmentation(scaling=0.999).affine(Most(), x.shape[2:])
    assert float(resampled(x, found[None], "nearest", "zeros").sum()) == 16  # 4 x 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flip": (0, 2)}, r"--augment.flip \[0, 2\]: the model has the axes \[0, 1\]"),
        ({"scaling": 1.0}, "below 1"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"rotation_deg": (10.0, 0.0, 0.0)}, r"the last: \[0, 0, 10\]"),
    ],
)
def test_what_is_no_augmentation_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Augmentation(**options).check(dims=2)


# make gpu-check

CHECK = ROOT / "benchmarks" / "gpu.py"


def test_without_a_gpu_the_check_says_so_in_one_line(monkeypatch, capsys):
    check = runpy.run_path(str(CHECK))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check["main"]() == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "there is no GPU here" in line


def test_a_part_that_lacks_a_library_is_left_out_by_name(monkeypatch, capsys):
    check = runpy.run_path(str(CHECK))

    def needs_it(_bench):
        yield "before", "1 ms"
        import a_library_that_nobody_has  # noqa: F401

    monkeypatch.setitem(check["PARTS"], "steps", (needs_it, 5))
    check["run_part"]("steps", "cpu", True)
    assert capsys.readouterr().out.splitlines() == [
        "| steps | before | 1 ms |",
        "| steps | | left out: no a_library_that_nobody_has |",
    ]


PARTS = """
import os, subprocess, sys, time
sys.path.insert(0, sys.argv.pop(1))
import gpu

def crashes(bench):
    yield "before", "1 ms"
    os.abort()

def hangs(bench):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield "child", child.pid
    time.sleep(600)

def errs(bench):
    raise RuntimeError("no kernel | image")

gpu.name_of, gpu.Bench = lambda device: "a card", lambda *_: None
gpu.PARTS = {"hangs": (hangs, 0.1), "crashes": (crashes, 60), "errs": (errs, 60),
             "ends": (lambda bench: iter([("all", "well")]), 60)}
sys.argv[0] = __file__
sys.exit(gpu.main())
"""


def test_a_part_that_crashes_or_hangs_takes_no_other_with_it(tmp_path):
    script, table = tmp_path / "check.py", tmp_path / "table.md"
    script.write_text(PARTS.replace("sys.argv.pop(1)", repr(str(CHECK.parent))))
    done = subprocess.run([sys.executable, script, "--tiny", "--out", table], check=False)
    assert done.returncode == 1
    title, _, *head, child, hung, before, crashed, erred, ended = table.read_text().splitlines()
    assert title == "a card, tiny sizes" and head[1] == "|---|---|---|"
    assert hung == "| hangs | | STOPPED after 1 s,  |" and ended == "| ends | all | well |"
    assert before == "| crashes | before | 1 ms |" and "FAILED: exit code -6" in crashed
    assert erred == "| errs | | FAILED: exit code 1, RuntimeError: no kernel / image |"
    with pytest.raises(ProcessLookupError):  # it was ended with the part that had started it
        for _ in range(100):
            os.kill(int(child.split("|")[3]), 0)
            time.sleep(0.02)


def test_the_table_is_written_after_each_part_and_the_check_ends_within_six_minutes(
    monkeypatch, tmp_path
):
    check = runpy.run_path(str(CHECK))
    main, clock, written, table = check["main"], [0.0], [], tmp_path / "table.md"

    def takes_all_its_time(part, limit, options):
        written.append(table.read_text().count("well") if table.exists() else 0)
        clock[0] += limit
        return [f"| {part} | | well |"], True

    monkeypatch.setattr(check["time"], "monotonic", lambda: clock[0])
    monkeypatch.setitem(main.__globals__, "in_a_process", takes_all_its_time)
    monkeypatch.setitem(main.__globals__, "name_of", lambda device: "a card")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(table)])
    assert main() == 0 and clock[0] <= 350
    assert written == [*range(len(written))] and len(written) > 5
    assert f"| {list(check['PARTS'])[-1]} | | left out: no time |" in table.read_text()


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {missing}:
            return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_the_check_needs_little_beside_torch_and_names_what_else_it_lacks(tmp_path):
    """As on a machine that was made for torch and not for this project."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    extras = options["options.extras_require"].values()
    lines = "\n".join([options["options"]["install_requires"], *extras]).splitlines()
    named = {re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_").lower() for line in lines}
    needed = {"torch", "triton", "numpy", "einops", "psutil", "rich", "safetensors", "pyyaml"}
    missing = named - needed - {"vae3d", "huggingface_hub"} | {"PIL"}
    assert {"nibabel", "monai", "wandb", "docstring_parser"} <= missing
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.replace("{missing}", repr(missing)))
    command = [sys.executable, CHECK, "--device", "cpu", "--out", tmp_path / "table.md"]
    parts = ["numbers", "syncs", "monai", "ranks", "runs"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, *parts], env=environ, stdout=subprocess.PIPE, text=True)
    rows = [line.split("|")[1:4] for line in (tmp_path / "table.md").read_text().splitlines()[4:]]
    assert done.returncode == 0, done.stdout
    left_out = {part.strip(): what.strip() for part, _, what in rows if "left out" in what}
    assert left_out == {
        "monai": "left out: no monai",
        "runs": "left out: no docstring_parser",
    }
    assert {part.strip() for part, *_ in rows} == set(parts)
