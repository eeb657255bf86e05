"""Convolutions that keep what they are computed from: the same bits, a fraction of the memory."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from test_steps import CONV, GROUPS, MODELS, SHAPE, distance, randomize, values_and_gradients
from torch import nn

from vae3d.kernels import lean, steps
from vae3d.models import upsample
from vae3d.models.blocks import ResBlock
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import BatchNorm, GroupNorm, InstanceNorm, NoNorm, NormAct, RMSNorm
from vae3d.models.presets import VAEModel
from vae3d.models.upsample import InterpUp


@pytest.fixture(autouse=True)
def no_fast_paths(monkeypatch):
    """As on a GPU, where the steps of the CPU do not apply."""
    for module in (steps, upsample):
        monkeypatch.setattr(module, "is_fast", lambda layer, x: False)


def count_lean_steps(monkeypatch):
    """A list that grows by one with each step."""
    taken, apply = [], lean.PreparedConv.apply
    count = lambda *a: (taken.append(1), apply(*a))[1]  # noqa: E731
    monkeypatch.setattr(lean.PreparedConv, "apply", count)
    return taken


def equal_bits(function, inputs, parameters):
    """Whether values and gradients are those of the plain layers to the last bit."""
    ours, reference = (values_and_gradients(function, inputs, parameters, p) for p in (0, 1))
    pairs = list(zip(ours, reference, strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_model_gives_the_bits_of_the_plain_layers(make, precision, monkeypatch):
    vae = randomize(make()).eval()
    half = precision == torch.bfloat16
    dtype = torch.float32 if half else precision
    vae, x = vae.to(dtype), torch.randn(2, vae.in_channels, *SHAPE[vae.spatial_dims], dtype=dtype)
    taken = count_lean_steps(monkeypatch)

    def recon(x):
        with torch.autocast("cpu", precision) if half else nullcontext():
            posterior = vae.encode(x)
            return vae.decode(posterior.mean if isinstance(vae, CustomVAE) else posterior[0])

    used = [p for n, p in vae.named_parameters() if "quant_conv_log_sigma" not in n]
    assert equal_bits(recon, [x], used)
    assert len(taken) > 2


@pytest.mark.parametrize("norm", [GROUPS, InstanceNorm, RMSNorm, NoNorm])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("options", [dict(stride=2), dict(dilation=2, groups=4), dict(bias=False)])
def test_every_norm_and_convolution_gives_the_bits_of_the_layers(norm, dims, options, monkeypatch):
    layers = nn.ModuleList([NormAct(norm(8), "silu"), CONV[dims](8, 12, 3, padding=1, **options)])
    taken = count_lean_steps(monkeypatch)
    x = torch.randn(2, 8, *SHAPE[dims])
    assert equal_bits(partial(steps.run, layers), [x], list(randomize(layers).parameters()))
    assert len(taken) == 1


@pytest.mark.parametrize("frozen", ["input", "weights", "norm"])
def test_what_needs_no_gradient_gets_none(frozen):
    block = randomize(ResBlock(8, 12, 3, GROUPS, "silu"))
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(
            frozen == "input" or ("norm" in name) == (frozen == "weights") or "shortcut" in name
        )
    x = torch.randn(2, 8, *SHAPE[3], requires_grad=frozen != "input")
    grads = []
    for plain in (False, True):
        with steps.plain() if plain else nullcontext():
            block(x).square().sum().backward()
        tensors = [x, *block.parameters()]
        grads.append([t.grad for t in tensors])
        for t in tensors:
            t.grad = None
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def saved_bytes(net, x):
    """What autograd keeps for the backward pass, beside the weights."""
    kept = {}
    weights = {p.data_ptr() for p in net.parameters()}

    def note(t):
        if t.data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = net(x)
    del out
    return sum(kept.values())


@pytest.mark.slow
def test_in_bfloat16_a_fraction_of_what_monai_and_the_layers_keep_is_kept():
    from monai.networks.nets import AutoencoderKL  # here: the tests of a GPU go without

    options = dict(channels=(16, 32), num_res_blocks=(2, 2), norm_num_groups=4, latent_channels=4)
    options |= dict(spatial_dims=3, in_channels=1, out_channels=1, attention_levels=(False,) * 2)
    options |= dict(with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)
    x = torch.rand(1, 1, 24, 32, 28)
    theirs, ours = AutoencoderKL(**options), VAEModel.from_config(options)
    with torch.autocast("cpu", torch.bfloat16):
        lean, monai = saved_bytes(ours, x), saved_bytes(theirs, x)
        with steps.plain():
            layers = saved_bytes(ours, x)
    assert lean < 0.37 * monai
    assert lean < 0.23 * layers


def test_norms_with_a_state_and_hooked_layers_run_as_layers(monkeypatch):
    taken = count_lean_steps(monkeypatch)
    x = torch.randn(2, 8, *SHAPE[3], requires_grad=True)

    class Counting(GroupNorm):
        """A norm of somebody's own, which may count."""

    for norm in (BatchNorm(8), Counting(8, 4)):
        steps.run([NormAct(norm, "silu"), nn.Conv3d(8, 8, 3, padding=1)], x).sum().backward()
    layers = [NormAct(GroupNorm(8, 4), "silu"), nn.Conv3d(8, 8, 3, padding=1)]
    seen = []
    layers[0].register_forward_hook(lambda *_: seen.append(1))
    steps.run(layers, x)
    up = InterpUp(8, 2, 3)
    up.conv.register_forward_hook(lambda *_: seen.append(1))
    up(x)
    assert seen == [1, 1] and not taken


def test_weights_get_gradients_from_a_second_use_under_one_autocast():
    """Autocast remembers the weights that it cast; within a step they have no history."""
    layers = nn.ModuleList([NormAct(GroupNorm(8, 4), "silu"), nn.Conv3d(8, 8, 3, padding=1)])
    x = torch.randn(1, 8, *SHAPE[3])
    grads = []
    for plain in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            with steps.plain() if plain else nullcontext():
                first = steps.run(layers, x)
            (first + layers[1](x)).float().square().mean().backward()
        grads.append(layers[1].weight.grad)
        layers.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_on_a_gpu_the_numbers_are_those_of_the_layers(layout):
    block = randomize(ResBlock(8, 12, 3, GROUPS, "silu")).cuda().to(memory_format=layout)
    x = torch.randn(2, 8, *SHAPE[3], device="cuda", requires_grad=True)
    grads = []
    for plain in (False, True):
        with torch.autocast("cuda", torch.bfloat16), steps.plain() if plain else nullcontext():
            out = block(x)
        grads.append(torch.autograd.grad(out.float().square().mean(), [x, *block.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert distance(ours, theirs) < 0.03


def test_without_gradients_the_layers_run(monkeypatch):
    taken = count_lean_steps(monkeypatch)
    with torch.no_grad():
        randomize(ResBlock(8, 12, 3, GROUPS, "silu"))(torch.randn(1, 8, *SHAPE[3]))
    assert not taken


def test_on_the_meta_device_the_layers_run(monkeypatch):
    taken = count_lean_steps(monkeypatch)
    block = ResBlock(8, 12, 3, GROUPS, "silu").to("meta")
    assert block(torch.empty(1, 8, *SHAPE[3], device="meta")).shape == (1, 12, *SHAPE[3])
    assert not taken


@pytest.mark.parametrize("mode", ["block", "level"])
def test_checkpointing_changes_no_bit(mode):
    vae = randomize(MODELS["custom 3D"]())
    x = torch.randn(2, 1, *SHAPE[3])
    results = []
    for checkpointing in ("none", mode):
        vae.set_checkpointing(checkpointing)
        parameters = list(vae.parameters())
        results.append(values_and_gradients(lambda x: vae(x, False)[0], [x], parameters[:-2]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
