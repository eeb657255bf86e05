"""The step of GPUs: kernels in Triton's interpreter, or compiled where a GPU is; layers in float64.

The network is made to believe that the CPU is a GPU, so that what is tested is what a GPU runs.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_steps import CONV, distance, randomize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vae3d.kernels import steps
from vae3d.models import upsample
from vae3d.models.blocks import ResBlock
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import BatchNorm, GroupNorm, InstanceNorm, NoNorm, NormAct, RMSNorm

gpu = pytest.importorskip("vae3d.kernels.gpu", reason="Triton is for Linux")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
GROUPS = lambda n: partial(GroupNorm, num_groups=n)  # noqa: E731
CASES = {
    "groups of two": (GROUPS(3), 6, (3, 4, 5), "silu", FP32),
    "groups of two, bfloat16": (GROUPS(4), 8, (5, 3, 2), "silu", BF16),
    "one group": (GROUPS(1), 5, (3, 2, 5), "silu", FP32),
    "no activation": (GROUPS(2), 4, (3, 5, 3), "none", FP32),
    "2D": (GROUPS(2), 6, (5, 7), "silu", FP32),
    "instance": (InstanceNorm, 3, (3, 4, 5), "silu", FP32),
    "root mean square": (RMSNorm, 6, (3, 4, 3), "silu", FP32),
    "root mean square, bfloat16, 2D": (RMSNorm, 8, (5, 4), "silu", BF16),
    "one channel": (GROUPS(1), 1, (5, 7), "silu", FP32),
    "one voxel": (GROUPS(1), 4, (1, 1, 1), "silu", FP32),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A tiny volume is then several chunks of several tiles, the last of each in part."""
    monkeypatch.setattr(gpu, "TILE", 128)
    monkeypatch.setattr(gpu, "CHUNK", 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the step of GPUs be chosen, whatever the device; return the list of steps taken."""
    for module in (steps, upsample):
        monkeypatch.setattr(module, "is_fast", lambda layer, x: False)
        monkeypatch.setattr(module, "on_gpu", lambda x: steps._enabled)
    taken, apply = [], gpu.NormActConv.apply
    count = lambda *a: (taken.append(1), apply(*a))[1]  # noqa: E731
    monkeypatch.setattr(gpu.NormActConv, "apply", count)
    return taken


def results(layers, tensors, dtype, plain=False):
    """Value of norm, activation, convolution and residual sum, and every gradient."""
    layers = [layer.to(dtype) for layer in layers]
    x, residual = (t.to(dtype).requires_grad_() for t in tensors)
    with steps.plain() if plain else nullcontext():
        out = steps.run(layers, x, residual)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    parameters = [p for layer in layers for p in layer.parameters()]
    grads = torch.autograd.grad(out, [x, residual, *parameters], direction.to(out))
    return [out.detach(), *grads]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_as_exact_as_those_of_the_layers(case, as_on_a_gpu):
    norm, channels, grid, act, dtype = case
    layers = [NormAct(norm(channels), act), CONV[len(grid)](channels, 5, 3, padding=1)]
    randomize(nn.ModuleList(layers)).to(DEVICE)
    layers[0].norm.weight.data[0] = 0
    for parameter in nn.ModuleList(layers).parameters():  # the same numbers in every precision
        parameter.data = parameter.data.to(dtype).float()
    tensors = [(torch.randn(2, c, *grid) * 2 + 3).to(DEVICE, dtype) for c in (channels, 5)]
    ours = results(layers, tensors, dtype)
    assert len(as_on_a_gpu) == 1
    plain, exact = (results(layers, tensors, d, plain=True) for d in (dtype, torch.float64))
    slack = 3 if dtype == BF16 else 1.5  # the interpreter cuts bfloat16 off, where a GPU rounds
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert distance(a, c) < slack * distance(b, c) + 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_mean_far_from_zero_costs_no_digits(as_on_a_gpu):
    layers = [NormAct(GroupNorm(4, 2), "silu"), nn.Conv3d(4, 5, 1)]
    tensors = [torch.randn(1, 4, 3, 4, 5) + 1000, torch.zeros(1, 5, 3, 4, 5)]
    nn.ModuleList(layers).to(DEVICE)
    tensors = [t.to(DEVICE) for t in tensors]
    ours = results(layers, tensors, FP32)
    exact = results(layers, tensors, torch.float64, plain=True)
    assert max(distance(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-4


@pytest.mark.parametrize("learned", ["input", "weights", "norm"])
def test_what_needs_no_gradient_gets_none(learned, as_on_a_gpu):
    norm_act, conv = NormAct(RMSNorm(4), "silu"), nn.Conv3d(4, 4, 1, bias=False)
    layers = nn.ModuleList([norm_act, conv]).to(DEVICE).requires_grad_(False)
    randomize(layers)
    x = torch.randn(1, 4, 2, 3, 3, device=DEVICE)
    wanted = {"input": x, "weights": conv.weight, "norm": norm_act.norm.weight}[learned]
    wanted.requires_grad_()
    grads = []
    for plain in (False, True):
        with steps.plain() if plain else nullcontext():
            steps.run(layers, x).square().sum().backward()
        grads.append([t.grad for t in (x, *layers.parameters())])
        wanted.grad = None
    assert len(as_on_a_gpu) == 1
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_a_network_keeps_channels_innermost_and_its_weights_as_they_are(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "TILE", 2048)
    norm = partial(GroupNorm, num_groups=1)
    vae = CustomVAE(channels=(2, 4), num_res_blocks=1, norm=norm, encoder_mid=False)
    vae = randomize(vae).to(DEVICE)
    x, layouts, found = torch.rand(1, 1, 4, 6, 8, device=DEVICE), [], []
    for layer in vae.modules():
        if isinstance(layer, ResBlock):
            layer.register_forward_hook(lambda _, ins, out: layouts.append(out.stride(1)))
    for plain in (False, True):
        with steps.plain() if plain else nullcontext():
            recon, posterior = vae(x, False)
        (recon.square().mean() + posterior.kl()).backward()
        found.append([recon.detach(), *(p.grad for p in vae.parameters())])
        vae.zero_grad()
        if not plain:
            assert layouts == 6 * [1] and len(as_on_a_gpu) == 2 * 6 + 2
    for ours, theirs in zip(*found, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_autocast_says_what_is_convolved_and_volumes_keep_their_precision(as_on_a_gpu):
    layers = nn.ModuleList([NormAct(RMSNorm(4), "silu"), nn.Conv2d(4, 5, 3, padding=1)]).to(DEVICE)
    x = torch.randn(1, 4, 3, 5, device=DEVICE, requires_grad=True)
    residual, grads = torch.ones(1, 5, 3, 5, device=DEVICE), []
    for plain in (False, True):
        with torch.autocast(DEVICE, BF16), steps.plain() if plain else nullcontext():
            out = steps.run(layers, x, residual)
            with torch.no_grad():
                assert torch.equal(steps.run(layers, x, residual), out)
        assert out.dtype == FP32  # what a bfloat16 and a float32 volume add up to
        grads.append(torch.autograd.grad(out.square().sum(), [x, *layers.parameters()]))
    assert len(as_on_a_gpu) == 2
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == FP32 and distance(ours, theirs) < 0.02


def test_other_norms_and_activations_leave_a_network_as_it_was(as_on_a_gpu):
    for norm, act in ((BatchNorm, "silu"), (RMSNorm, "gelu"), (NoNorm, "silu")):
        layers = nn.Sequential(NormAct(norm(4), act), nn.Conv2d(4, 5, 3, padding=1)).to(DEVICE)
        x = torch.randn(1, 4, 3, 5, device=DEVICE)
        assert steps.arranged(layers, x) is x
        steps.run(layers, x).sum().backward()
    assert not as_on_a_gpu


@pytest.mark.parametrize(
    ("device", "precision", "capability", "chosen"),
    [
        ("cuda", BF16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", FP32, (9, 0), False),
        ("cuda", BF16, (7, 5), False),  # Triton has given these up
        ("cpu", BF16, (9, 0), False),
    ],
)
def test_the_step_is_for_half_precision_on_gpus(device, precision, capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(steps, "has_triton", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 2, 3, 4, device=device, dtype=precision)
        assert steps.on_gpu(x) == chosen
        with steps.plain():
            assert not steps.on_gpu(x)
    monkeypatch.setattr(steps, "has_triton", lambda: False)
    assert not steps.on_gpu(x)


def test_without_a_compiler_one_warning_says_why_the_layers_run(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(steps, "which", lambda name: None)
    steps.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="install gcc and python3-dev"):
        assert not steps.has_triton()
    assert not steps.has_triton()  # and no second warning
    steps.has_triton.cache_clear()


def test_nearest_upsampling_by_copies_is_that_of_pytorch():
    for grid, factor in (((2, 3, 4), (2, 1, 3)), ((3, 5), (2, 2))):
        x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
        ours = upsample.repeat(x, factor)
        theirs = F.interpolate(x, scale_factor=tuple(map(float, factor)))
        assert torch.equal(ours, theirs) and ours.stride(1) == 1
        direction = torch.randn_like(theirs)
        grads = [torch.autograd.grad(y, x, direction)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*grads)


OPERATORS = {
    "take_statistics": lambda x, c, s: (x, 2, 1e-5, s),
    "apply_norm": lambda x, c, s: (x, c, c, s, 1e-5, True, torch.empty_like(x)),
    "sum_gradient": lambda x, c, s: (
        *(x, x.clone(), c, c, s, 2, 1e-5, True), torch.empty_like(x), torch.empty(2, 4), s.clone()
    ),
    "input_gradient": lambda x, c, s: (
        *(x, x.clone(), c, c, s, s, 1e-5, True), torch.empty_like(x)
    ),
    "add": lambda x, c, s: (x, c, None, torch.empty_like(x)),
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
@pytest.mark.parametrize("name", OPERATORS)
def test_whoever_traces_a_network_sees_what_a_kernel_reads_and_writes(name):
    x = torch.randn(1, 4, 2, 3).contiguous(memory_format=torch.channels_last)
    arguments = OPERATORS[name](x, torch.randn(4), torch.rand(2, 1, 4) + 1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(gpu, name), arguments, test_utils=tests)
