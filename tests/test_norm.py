"""Norms: equal to torch's, safe in half precision, one batch across ranks."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import on_ranks

from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import (
    ACTIVATIONS,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    NoNorm,
    Norm,
    NormAct,
    RMSNorm,
    activation,
)

NORMS = [partial(GroupNorm, num_groups=4), InstanceNorm, BatchNorm, RMSNorm, NoNorm]
SIZES = [(5, 7), (3, 4, 5)]


def ids(norm):
    return getattr(norm, "func", norm).__name__


def test_the_list_of_norms_is_complete():
    ours = {cls for cls in Norm.__subclasses__() if cls.__module__.startswith("vae3d.")}
    assert ours | {InstanceNorm} == {getattr(n, "func", n) for n in NORMS}


@pytest.mark.parametrize("size", SIZES)
def test_group_and_instance_norm_equal_torch(size):
    x = 3 * torch.randn(2, 8, *size) + 5
    for ours, theirs in (
        (GroupNorm(8, 4, eps=1e-3), nn.GroupNorm(4, 8, eps=1e-3)),
        (InstanceNorm(8), nn.GroupNorm(8, 8)),
    ):
        with torch.no_grad():
            theirs.weight.normal_()
            theirs.bias.normal_()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", SIZES)
def test_batch_norm_equals_torch_in_training_and_evaluation(size):
    theirs = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(size)](8)
    ours = BatchNorm(8)
    for _ in range(3):
        x = torch.randn(4, 8, *size) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = torch.randn_like(x)
        (ours(a) * weight).sum().backward()
        (theirs(b) * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_rms_norm_divides_each_voxel_by_its_own_channels():
    x = torch.randn(2, 8, 3, 4)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(8)(x), expected)
    y = x.clone()
    y[..., 0] = 100
    assert torch.equal(RMSNorm(8)(x)[..., 1:], RMSNorm(8)(y)[..., 1:])


@pytest.mark.parametrize("norm", NORMS, ids=ids)
def test_statistics_are_taken_in_float32(norm):
    # fp16 squares of these overflow; bf16 sums of them stop counting after a few hundred voxels.
    x = 1000 * torch.randn(1, 8, 24, 24, 24) + 300
    layer = NormAct(norm(8), "silu")
    expected = layer(x)
    for dtype in (torch.float16, torch.bfloat16):
        out = layer(x.to(dtype))
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("norm", NORMS, ids=ids)
def test_half_precision_weights_and_autocast_keep_the_dtype_of_the_input(norm):
    x = torch.randn(1, 8, 4, 4)
    assert norm(8).half()(x.half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(8)(x.bfloat16()).dtype == torch.bfloat16
        assert norm(8)(x).dtype == torch.float32


@pytest.mark.parametrize("norm", NORMS, ids=ids)
def test_float64_stays_float64(norm):
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    layer = NormAct(norm(8).double(), "silu")
    assert layer(x).dtype == torch.float64
    torch.testing.assert_close(layer(x).float(), layer.float()(x.float()))


@pytest.mark.parametrize("norm", NORMS, ids=ids)
def test_a_network_of_each_norm_gives_gradients_to_all(norm):
    vae = CustomVAE(channels=(8, 8), norm=norm, num_res_blocks=1)
    recon, _ = vae(torch.randn(2, 1, 8, 4, 6))
    recon.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_runs_in_a_network(name):
    vae = CustomVAE(channels=(4,), norm=NoNorm, act=name, num_res_blocks=1, spatial_dims=2)
    assert vae(torch.randn(1, 1, 4, 4))[0].isfinite().all()


def test_activations_are_torchs():
    x = torch.randn(10)
    assert torch.equal(activation("silu")(x), torch.nn.functional.silu(x))
    assert torch.equal(activation("none")(x), x)
    with pytest.raises(ValueError, match="act='swish' is not one of silu, relu"):
        activation("swish")


def test_groups_must_divide_channels():
    with pytest.raises(ValueError, match="num_groups=32 does not divide 8 channels"):
        CustomVAE(channels=(8, 16))


def test_checkpointing_updates_running_statistics_once():
    states = []
    for mode in ("none", "block", "level"):
        torch.manual_seed(0)
        vae = CustomVAE(channels=(4, 4), norm=BatchNorm, num_res_blocks=1)
        vae.set_checkpointing(mode)
        for _ in range(2):
            recon, _ = vae(torch.randn(2, 1, 4, 4, 8))
            recon.square().mean().backward()
        states.append({k: v for k, v in vae.state_dict().items() if "running" in k})
    assert all(torch.equal(states[0][k], other[k]) for other in states[1:] for k in states[0])


def batch_norm_on_a_rank(world, x):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(2, 4, 1), BatchNorm(4)))
    # Ranks of different sizes: every voxel of the batch counts the same.
    mine = x[:1] if world.rank == 0 else x[1:]
    model(mine).pow(3).sum().backward()
    gradients = {k: p.grad * world.size for k, p in model.module.named_parameters()}
    return {"gradients": gradients, "state": model.module.state_dict()}


def test_two_ranks_normalize_by_one_common_batch():
    x = torch.randn(3, 2, 4, 4) * 2 + 7
    result, _ = on_ranks(2, batch_norm_on_a_rank, x)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), BatchNorm(4))
    model(x).pow(3).sum().backward()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result["state"][name], value)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-3)
