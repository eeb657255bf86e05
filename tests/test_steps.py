"""Fast paths of the network: the plain layers are the reference for numbers and gradients."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae3d.kernels import convolutions, memory, steps, upsampling, winograd
from vae3d.kernels.precision import exact_float32
from vae3d.models.attention import GlobalAttention
from vae3d.models.blocks import ConvBlock, ResBlock
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.downsample import ConvDown
from vae3d.models.norm import GroupNorm, InstanceNorm, NormAct
from vae3d.models.presets import AutoencoderKL, MaisiVAE, MonaiVAE, T1LightVAE, VAEModel
from vae3d.models.upsample import InterpUp

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
SHAPE = {2: (12, 8), 3: (12, 8, 10)}
GROUPS = partial(GroupNorm, num_groups=4)
CUSTOM = partial(CustomVAE, channels=(4, 8), norm=GROUPS, num_res_blocks=1)
SD = {"base_ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4}
MONAI = {"channels": (4, 8), "num_res_blocks": 1, "norm_num_groups": 4}
MODELS = {
    "custom 3D": CUSTOM,
    "custom 2D": partial(CUSTOM, spatial_dims=2),
    "custom anisotropic": partial(CUSTOM, factors=((1, 1, 1), (2, 2, 1))),
    "custom fourfold": partial(CUSTOM, factors=((1, 1, 1), (4, 2, 2))),
    "custom linear": partial(CUSTOM, up=partial(InterpUp, mode="linear")),
    "custom asymmetric": partial(CUSTOM, down=partial(ConvDown, padding="asymmetric")),
    "custom attention": partial(CUSTOM, mid_attention=GlobalAttention),
    "custom instance": partial(CUSTOM, norm=InstanceNorm, act="leaky_relu"),
    "custom conv blocks": partial(CUSTOM, block=ConvBlock, act="gelu"),
    "custom zero init": partial(CUSTOM, block=partial(ResBlock, zero_init=True)),
    "Stable Diffusion": partial(AutoencoderKL, **SD),
    "Stable Diffusion 3D": partial(AutoencoderKL, spatial_dims=3, **SD),
    "MONAI": partial(MonaiVAE, **MONAI),
    "MONAI transposed": partial(VAEModel, use_convtranspose=True, **MONAI),
    "MAISI": partial(MaisiVAE, num_channels=(4, 8), num_res_blocks=1, norm_num_groups=4),
    "T1 light": partial(T1LightVAE, num_channels=(4, 8), norm_num_groups=4),
}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Slabs of a few rows, so that a tiny volume has several, and every way to convolve."""
    monkeypatch.setattr(steps, "SLAB_BYTES", 1 << 10)
    monkeypatch.setattr(convolutions, "SLOW_KERNEL", 0)
    monkeypatch.setattr(winograd, "PAYS_FROM", 8)
    monkeypatch.setattr(memory, "OWN_PAGES_FROM", 1 << 12)


def randomize(module):
    """Random weights everywhere: fresh norms are the identity and hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def values_and_gradients(function, inputs, parameters, plain=False):
    """Output of `function` and the gradients of a fixed random projection of it."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with steps.plain() if plain else nullcontext():
        out = function(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(out, [*inputs, *parameters], direction.to(out.dtype))
    return [out.detach(), *gradients]


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def assert_fast_equals_plain(function, inputs, module, tolerance=1e-5):
    ours = values_and_gradients(function, inputs, list(module.parameters()))
    reference = values_and_gradients(function, inputs, list(module.parameters()), plain=True)
    scale = max(g.abs().max() for g in reference[1:])
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if b.abs().max() > 1e-4 * scale:  # else it is the rounding error of a sum that vanishes
            assert distance(a, b) < tolerance


def count_fast_steps(monkeypatch):
    """A list that grows by one with each fast step."""
    taken = []
    for step in (steps.NormActConv, upsampling.UpsampleConv):
        apply = step.apply
        monkeypatch.setattr(step, "apply", lambda *a, f=apply: (taken.append(1), f(*a))[1])
    return taken


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_model_gives_the_plain_numbers_and_gradients(make, monkeypatch):
    vae = randomize(make()).eval()
    x = torch.randn(2, vae.in_channels, *SHAPE[vae.spatial_dims])
    taken = count_fast_steps(monkeypatch)

    def recon_and_moments(x):
        posterior = vae.encode(x) if isinstance(vae, CustomVAE) else None
        recon = vae.decode(posterior.mean)[(..., *(slice(n) for n in x.shape[2:]))]
        return torch.cat([recon.flatten(), posterior.std.flatten()])

    assert_fast_equals_plain(recon_and_moments, [x], vae, tolerance=3e-5)
    assert len(taken) > 5


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("act", ["silu", "gelu", "none"])
def test_norm_activation_convolution_and_residual_equal_the_layers(dims, act):
    layers = nn.ModuleList([NormAct(GroupNorm(8, 4), act), CONV[dims](8, 12, 3, padding=1)])
    randomize(layers)
    inputs = [2 * torch.randn(2, 8, *SHAPE[dims]) + 1, torch.randn(2, 12, *SHAPE[dims])]
    assert_fast_equals_plain(lambda x, skip: steps.run(layers, x, skip), inputs, layers)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "far"),
    [(1, 1, 0, None), (3, 1, 1, None), (5, 1, 2, None), (3, 2, 1, None), (3, 2, 0, (0, 1))],
)
@pytest.mark.parametrize("slow_kernel", [0, 1 << 30])
def test_convolutions_equal_the_layer(dims, kernel, stride, padding, far, slow_kernel, monkeypatch):
    """With slabs that PyTorch's fast kernels take in three dimensions, and smaller ones."""
    monkeypatch.setattr(convolutions, "SLOW_KERNEL", slow_kernel)
    layer = randomize(CONV[dims](4, 6, kernel, stride, padding))
    far = None if far is None else [far] * dims
    x = torch.randn(2, 4, *SHAPE[dims])
    assert_fast_equals_plain(lambda x: steps.convolve(layer, x, padding=far), [x], layer)


@pytest.mark.parametrize("rows", [2, 3, 6, 7])
@pytest.mark.parametrize("padding", [(0, 1, 1), (1, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("together, tolerance", [(2, 1e-6), (4, 4e-6)])
def test_winograds_sums_of_rows_equal_the_convolution(rows, padding, together, tolerance):
    x = torch.randn(1, 8, rows + 2 - 2 * padding[0], 5, 7)
    weight, bias, before = (
        torch.randn(12, 8, 3, 3, 3),
        torch.randn(12),
        torch.randn(1, 12, rows, 1, 1),
    )
    layer = partial(F.conv3d, padding=padding)
    expected = layer(x.double(), weight.double(), bias.double())
    slab, held = memory.channels_last(x), before.expand_as(expected)
    target, other = (memory.channels_last(held.clone()) for _ in range(2))
    for onto, total in ((None, expected), (target, 2 * expected), (other, held + expected)):
        convolutions.convolve_into(
            target, slab, weight, bias, padding, onto=onto, together=together
        )
        assert distance(target, total) < tolerance
    grad = torch.randn_like(target)
    exact = weight.double().requires_grad_()
    layer(x.double(), exact).backward(grad.double())
    assert winograd.fits(weight, (1, 1, 1))
    assert distance(convolutions.weights_gradient(grad, slab, weight, padding), exact.grad) < 1e-6


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [(1, 16), (16, 1), (2, 17), (17, 2), (16, 20), (32, 32)])
@pytest.mark.parametrize("normed", [False, True])
def test_slabs_of_the_real_size_equal_the_layers(dims, channels, normed, monkeypatch):
    """Slabs large enough for the kernels that tiny volumes do not reach."""
    monkeypatch.undo()
    first, last = channels
    layers = [NormAct(InstanceNorm(first), "silu")] if normed else []
    layers = randomize(nn.ModuleList([*layers, CONV[dims](first, last, 3, padding=1)]))
    size = (40, 44, 6)[:dims]
    inputs = [torch.randn(2, first, *size), torch.randn(2, last, *size)]
    assert_fast_equals_plain(
        lambda x, skip: steps.run(layers, x, skip), inputs, layers, tolerance=5e-5
    )


@pytest.mark.parametrize("factor", [(2, 2), (1, 2), (2, 1), (2, 2, 2), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsampling_and_convolution_equal_the_layers(factor, mode):
    up = randomize(InterpUp(4, factor, len(factor), mode))
    assert_fast_equals_plain(up, [torch.randn(2, 4, *SHAPE[len(factor)])], up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("exact_arithmetic", [True, False])
def test_half_precision_is_at_least_as_exact_as_the_layers(
    dtype, autocast, exact_arithmetic, monkeypatch
):
    """With and without the instructions for which half-precision arithmetic is used."""
    ops, name = torch.ops.mkldnn, {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if not exact_arithmetic and not getattr(ops, f"_is_mkldnn_{name}_supported")():
        pytest.skip(f"this processor has no {name} convolutions")
    arithmetic = torch.float32 if exact_arithmetic else dtype
    monkeypatch.setattr(steps, "compute_dtype", lambda _: arithmetic)
    block = randomize(nn.Sequential(ResBlock(8, 12, 3, GROUPS, "silu"), InterpUp(12, 2, 3)))
    x = torch.randn(2, 8, *SHAPE[3])
    truth = values_and_gradients(block.double(), [x.double()], list(block.parameters()), plain=True)
    block = block.float() if autocast else block.to(dtype)
    x = x if autocast else x.to(dtype)

    def in_half(x):
        with torch.autocast("cpu", dtype, enabled=autocast):
            return block(x)

    ours, layers = (
        values_and_gradients(in_half, [x], list(block.parameters()), plain) for plain in (0, 1)
    )
    assert ours[0].dtype == layers[0].dtype == dtype
    errors = [
        sum(distance(a, t) for a, t in zip(result, truth, strict=True)) for result in (ours, layers)
    ]
    # Sums of half-precision numbers in another order: 1.04 to 1.26 over eight seeds.
    assert errors[0] < (1.1 if exact_arithmetic else 1.4) * errors[1]


def test_statistics_of_a_large_volume_keep_their_digits(monkeypatch):
    monkeypatch.setattr(steps, "SLAB_BYTES", 2 << 20)
    x = torch.randn(1, 4, 160, 160, 160).add_(20)
    exact = x.double().view(2, -1)
    mean, var = steps.statistics(steps.channels_last(x), groups=2)
    torch.testing.assert_close(mean[0, ::2].double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var[0, ::2].double(), exact.var(1, correction=0), rtol=1e-5, atol=0)


def test_the_plain_norm_of_a_large_channels_last_volume_keeps_its_digits():
    x = torch.randn(1, 4, 160, 160, 160).add_(20)
    norm = GroupNorm(4, num_groups=2)
    ours = norm(steps.channels_last(x))[0, :, ::16].double()
    exact = x.double().view(2, -1)
    exact = (exact - exact.mean(1, keepdim=True)) / exact.std(1, correction=0, keepdim=True)
    assert (ours - exact.view(4, 160, 160, 160)[:, ::16]).abs().max() < 1e-4


@pytest.mark.slow
def test_a_step_over_a_large_volume_is_as_exact_as_float64(monkeypatch):
    monkeypatch.undo()
    layers = randomize(nn.ModuleList([NormAct(GroupNorm(4, 2), "silu"), nn.Conv3d(4, 4, 1)]))
    x = torch.randn(1, 4, 160, 160, 160).add_(20)
    ours = values_and_gradients(lambda x: steps.run(layers, x), [x], list(layers.parameters()))
    layers.double()
    exact = values_and_gradients(
        lambda x: steps.run(layers, x), [x.double()], list(layers.parameters()), plain=True
    )
    for a, b in zip(ours, exact, strict=True):
        assert distance(a, b) < 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_fast_paths():
    vae = randomize(CUSTOM()).eval()
    x = torch.randn(1, 1, *SHAPE[3])
    ours = values_and_gradients(lambda x: vae(x)[0], [x], list(vae.parameters()))
    vae.cuda()
    x = x.cuda().requires_grad_()
    with exact_float32():
        recon = vae(x)[0]
        direction = torch.randn(recon.shape, generator=torch.Generator().manual_seed(3))
        theirs = torch.autograd.grad(recon, [x, *vae.parameters()], direction.cuda())
    for a, b in zip(ours, [recon.detach(), *theirs], strict=True):
        if b.abs().max() > 1e-4:  # else it is the rounding error of a sum that vanishes
            assert distance(a, b.cpu()) < 1e-4


def test_memory_of_dead_tensors_serves_the_next_ones_and_goes_back(monkeypatch):
    kept, size, leases, others = memory.Pages(), 1 << 16, [], 0

    def held_by_the_process():
        return sum(len(lease) for lease in leases) + kept.kept + others

    monkeypatch.setattr(memory, "anonymous_bytes", held_by_the_process)
    monkeypatch.setattr(memory, "MEMORY_OF_THE_MOST", 1)
    for _ in range(4):
        leases.append(kept.take(size))
    assert kept.kept == 0
    leases.clear()
    assert kept.kept == 4 * size
    leases.append(kept.take(size))
    assert kept.kept == 3 * size  # one of them serves again
    others = 2 * size  # such as gradients in the heap
    leases.append(kept.take(size // 2))
    assert held_by_the_process() <= 4 * size
    leases.clear()
    kept.give_back()
    assert kept.kept == 0 and not any(kept.free.values())


@pytest.mark.skipif(memory._mallopt is None, reason="the C library is not glibc")
def test_the_heap_keeps_what_is_freed_between_tiles_and_gives_it_back_at_the_end():
    memory.trim()  # else the tile may find what earlier tests have left
    before, size = memory.anonymous_bytes(), 64 << 20
    with memory.held_heap():
        tile = torch.ones(size // 4)
        del tile
        assert memory.anonymous_bytes() - before > size // 2
    assert memory.anonymous_bytes() - before < size // 4


def test_a_large_tensor_keeps_its_memory_while_a_view_of_it_lives():
    volume = memory.empty((1, 4, 16, 16, 16), torch.float32)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    row = volume.fill_(3)[:, :, 2]
    del volume
    other = memory.empty((1, 4, 16, 16, 16), torch.float32).fill_(5)
    assert (row == 3).all() and (other == 5).all()


def test_a_step_keeps_nothing_but_its_input_and_weights():
    layers = [NormAct(GroupNorm(8, 4), "silu"), nn.Conv3d(8, 8, 3, padding=1)]
    x = torch.randn(1, 8, 12, 12, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        steps.run(layers, x, residual=torch.randn_like(x))
    volumes = [t for t in kept if t.numel() >= x.numel()]
    assert len(volumes) == 1 and torch.equal(volumes[0], x)


def test_checkpointing_changes_no_bit_of_the_fast_paths():
    results = []
    for mode in ("none", "block", "level"):
        torch.manual_seed(0)
        vae = CUSTOM().train()
        vae.set_checkpointing(mode)
        recon, posterior = vae(torch.randn(1, 1, *SHAPE[3]))
        (recon.square().mean() + posterior.kl()).backward()
        results.append([recon, *(p.grad for p in vae.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_hook_on_a_layer_is_called():
    block, calls = ResBlock(4, 4, 3, GROUPS, "silu"), []
    for layer in block.body:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    block(torch.randn(1, 4, *SHAPE[3]))
    assert calls == list(block.body)


def test_what_has_no_fast_path_runs_the_layers(monkeypatch):
    taken = count_fast_steps(monkeypatch)
    up = InterpUp(4, (3, 2, 2), 3)
    x = torch.randn(1, 4, 3, 4, 2)
    expected = up.conv(F.interpolate(x, scale_factor=(3.0, 2.0, 2.0)))
    assert distance(up(x), expected) < 1e-6
    taken.clear()
    layers = [
        nn.Conv3d(4, 4, 3, padding=1, groups=4),
        nn.Conv3d(4, 4, 3, padding=2, dilation=2),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(4, 4, 3, padding="same"),
        nn.Conv3d(4, 4, 3, padding=1).double(),
        nn.Conv3d(4, 4, 3, padding=1).to("meta"),
    ]
    for layer in layers:
        assert steps.run([layer], x.to(layer.weight)).shape == x.shape
    assert not taken


def test_the_plain_layers_can_be_differentiated_twice_and_the_fast_paths_say_no():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 6, 6, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(
            steps.run([layer], x).square().sum(), x, create_graph=True
        )
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty()
    with steps.plain():
        penalty()
    assert layer.weight.grad.abs().sum() > 0
