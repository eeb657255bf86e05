"""Every block, down and up layer keeps its contract, because it is one."""

from functools import partial

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae3d.kernels.steps import run
from vae3d.models import upsample
from vae3d.models.attention import (
    Attention,
    BareLinearAttention,
    GlobalAttention,
    PatchAttention,
)
from vae3d.models.blocks import Block, ConvNeXtBlock, ResBlock
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.downsample import (
    ConvDown,
    Down,
    HaarDown,
    PoolDown,
    UnshuffleDown,
    haar,
    unshuffle,
)
from vae3d.models.norm import GroupNorm, NormAct, RMSNorm
from vae3d.models.spec import build
from vae3d.models.upsample import (
    HaarUp,
    InterpUp,
    ShuffleUp,
    TransposeUp,
    Up,
    interpolate,
    inverse_haar,
    shuffle,
)

NORM = partial(GroupNorm, num_groups=4)
SIZE = (8, 4, 12)
FACTORS = {2: [(2, 2), (1, 2), (2, 1)], 3: [(2, 2, 2), (2, 2, 1), (1, 1, 2)]}


def family(base):
    """All classes under `base`, at any depth, that are ours."""
    for cls in base.__subclasses__():
        if cls.__module__.startswith("vae3d."):
            yield cls
        yield from family(cls)


BLOCKS, DOWNS, UPS, ATTENTIONS = (list(family(base)) for base in (Block, Down, Up, Attention))
# The options that change what a class computes are walked like classes of their own.
DOWNS += [partial(ConvDown, padding="asymmetric")]
UPS += [
    partial(InterpUp, mode="linear"),
    partial(InterpUp, conv_after=False),
    partial(TransposeUp, kernel=3),
]
ATTENTIONS += [
    partial(GlobalAttention, num_heads=2, relative_position_bias=4),
    partial(GlobalAttention, out_proj=False),
    partial(PatchAttention, num_heads=2, window=3, shift=True, relative_position_bias=True),
]
LAYERS = BLOCKS + DOWNS + UPS + ATTENTIONS
SOCKETS = {"block": Block, "down": Down, "up": Up, "mid_attention": Attention}


def kind(cls):
    """The class of a class, or of a partial of one."""
    return getattr(cls, "func", cls)


def make(cls, spatial_dims=3, channels=16):
    if issubclass(kind(cls), Block):
        return cls(channels, channels, spatial_dims, NORM, "silu")
    if issubclass(kind(cls), Attention):
        return cls(channels, spatial_dims, NORM)
    return cls(channels, 2, spatial_dims)


def network(cls, **options):
    """A network with `cls` in its socket."""
    socket = next(name for name, base in SOCKETS.items() if issubclass(kind(cls), base))
    return CustomVAE(norm=NORM, num_res_blocks=1, **{socket: cls}, **options)


def ids(value):
    options = getattr(value, "keywords", {})
    name = getattr(kind(value), "__name__", str(value))
    return " ".join([name, *(f"{k}={v}" for k, v in options.items())])


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("cls", BLOCKS, ids=ids)
def test_a_block_changes_channels_and_keeps_the_grid(cls, spatial_dims):
    x = torch.randn(2, 8, *(5, 4, 7)[:spatial_dims])
    for width in (8, 16):
        assert cls(8, width, spatial_dims, NORM, "silu")(x).shape == (2, width, *x.shape[2:])


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("cls", DOWNS + UPS, ids=ids)
def test_a_resampling_layer_scales_each_axis_by_its_factor(cls, spatial_dims):
    x = torch.randn(2, 16, *SIZE[:spatial_dims])
    for factor in FACTORS[spatial_dims]:
        layer = cls(16, factor, spatial_dims)
        assert layer.factor == factor
        sizes = zip(x.shape[2:], factor, strict=True)
        expected = [n // f if issubclass(kind(cls), Down) else n * f for n, f in sizes]
        assert layer(x).shape == (2, 16, *expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("cls", ATTENTIONS, ids=ids)
def test_attention_keeps_channels_and_any_grid(cls, spatial_dims):
    layer = make(cls, spatial_dims)
    for size in (SIZE, (5, 3, 7), (1, 1, 1)):
        x = torch.randn(2, 16, *size[:spatial_dims])
        assert layer(x).shape == x.shape


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("cls", LAYERS, ids=ids)
def test_every_parameter_and_the_input_get_a_gradient(cls, spatial_dims):
    layer = make(cls, spatial_dims)
    x = torch.randn(2, 16, *SIZE[:spatial_dims], requires_grad=True)
    (layer(x) * torch.randn_like(layer(x))).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("cls", LAYERS, ids=ids)
def test_bf16_is_close_to_float32_and_stays_bf16(cls, spatial_dims):
    layer, x = make(cls, spatial_dims), torch.randn(2, 16, *SIZE[:spatial_dims])
    expected = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("cls", [c for c in LAYERS if c is not BareLinearAttention], ids=ids)
def test_half_precision_survives_large_values(cls):
    layer, x = make(cls).half(), 300 * torch.randn(1, 16, *SIZE)
    assert layer(x.half()).isfinite().all()


@pytest.mark.parametrize("cls", LAYERS, ids=ids)
def test_checkpointing_changes_no_bit(cls):
    vae = network(cls, channels=(8, 16))
    x, results = torch.randn(1, 1, 8, 12, 8), []
    for mode in ("none", "block", "level"):
        vae.set_checkpointing(mode)
        vae.zero_grad()
        torch.manual_seed(3)
        recon, posterior = vae(x)
        (recon.square().mean() + posterior.kl()).backward()
        results.append([recon, *(p.grad.clone() for p in vae.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("cls", LAYERS, ids=ids)
def test_any_size_goes_through_a_network_of_it(cls, spatial_dims):
    vae = network(cls, spatial_dims=spatial_dims, channels=(8, 8))
    x = torch.randn(1, 1, *(7, 5, 9)[:spatial_dims])
    assert vae(x)[0].shape == x.shape


@pytest.mark.parametrize("cls", LAYERS, ids=ids)
def test_a_network_of_it_is_rebuilt_from_its_recipe(cls):
    vae = network(cls, channels=(8, 8)).eval()
    again = build(vae.spec).eval()
    again.load_state_dict(vae.state_dict())
    x = torch.randn(1, 1, 8, 4, 6)
    assert torch.equal(again(x)[0], vae(x)[0])


def test_down_and_up_layers_of_dc_ae_equal_those_of_diffusers():
    dc = pytest.importorskip("diffusers.models.autoencoders.autoencoder_dc")
    for ours, theirs in (
        (UnshuffleDown(8, 2, 2), dc.DCDownBlock2d(8, 8, downsample=True)),
        (ShuffleUp(8, 2, 2), dc.DCUpBlock2d(8, 8)),
    ):
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 8, 6, 10)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


def test_zero_init_starts_a_block_as_its_shortcut():
    x = torch.randn(1, 8, 4, 4, 4)
    for cls in (ResBlock, ConvNeXtBlock):
        assert torch.equal(cls(8, 8, 3, NORM, "silu", zero_init=True)(x), x)


def test_dropout_acts_in_training_only():
    for cls in BLOCKS:
        block, x = cls(8, 8, 3, NORM, "silu", dropout=0.5), torch.randn(1, 8, 4, 4, 4)
        assert not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), block(x))


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel=4 must be odd"):
        ConvNeXtBlock(8, 8, 3, NORM, "silu", kernel=4)


def test_a_per_voxel_norm_makes_a_block_see_its_neighbors_only():
    block = ResBlock(4, 4, 2, RMSNorm, "silu").eval()
    x = torch.randn(1, 4, 16, 16)
    y = x.clone()
    y[..., 0] += 1
    changed = (block(x) != block(y)).any(1).any(1)[0]
    assert changed[:3].all()
    assert not changed[3:].any()


# ------------------------------------------------------------------------------------ down


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
def test_strided_convolution_divides_the_size_for_every_padding(factor):
    x = torch.randn(1, 4, 5 * factor, 3 * factor)
    for padding in ("symmetric", "asymmetric"):
        assert ConvDown(4, factor, 2, padding)(x).shape == (1, 4, 5, 3)


def test_asymmetric_padding_adds_zeros_at_the_far_end_of_shrunk_axes():
    down, x = ConvDown(4, (2, 1, 2), 3, "asymmetric"), torch.randn(1, 4, 6, 5, 8)
    padded = F.pad(x, (0, 1, 1, 1, 0, 1))
    expected = F.conv3d(padded, down.conv.weight, down.conv.bias, stride=(2, 1, 2))
    torch.testing.assert_close(down(x), expected)


def test_strided_convolution_sees_every_voxel():
    for factor in (2, 3, 4, 5):
        for padding in ("symmetric", "asymmetric"):
            x = torch.randn(1, 1, 4 * factor, 4 * factor, requires_grad=True)
            ConvDown(1, factor, 2, padding)(x).sum().backward()
            assert (x.grad != 0).all()


def test_pooling_averages_cells():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert PoolDown(1, (2, 2), 2)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_unshuffle_and_shuffle_are_inverse():
    for spatial_dims, factors in FACTORS.items():
        for factor in factors:
            x = torch.randn(2, 3, *SIZE[:spatial_dims])
            assert torch.equal(shuffle(unshuffle(x, factor), factor), x)
    assert torch.equal(unshuffle(x := torch.randn(2, 3, 4, 4), (2, 2)), F.pixel_unshuffle(x, 2))


def test_unshuffle_needs_enough_channels():
    with pytest.raises(ValueError, match="multiples of 8"):
        UnshuffleDown(4, (2, 2, 2), 3)


def test_residual_resampling_starts_from_parameter_free_shortcuts():
    down, up = UnshuffleDown(8, 2, 3), ShuffleUp(8, 2, 3)
    for layer in (down, up):
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(down(up(x)), x)  # nearest, then the mean of equal voxels
    torch.testing.assert_close(down(x), F.avg_pool3d(x, 2))


def test_haar_is_orthonormal_and_inverts():
    for spatial_dims, factors in FACTORS.items():
        for factor in factors:
            x = torch.randn(2, 3, *SIZE[:spatial_dims])
            bands = haar(x, factor)
            torch.testing.assert_close(bands.norm(), x.norm())
            torch.testing.assert_close(inverse_haar(bands, factor), x)


def test_haar_has_no_factor_3():
    for cls in (HaarDown, HaarUp):
        with pytest.raises(ValueError, match="factors 1 and 2"):
            cls(4, 3, 3)


# -------------------------------------------------------------------------------------- up


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_interpolation_past_the_reach_of_one_kernel_is_done_in_parts(mode, monkeypatch):
    x = torch.randn(2, 5, 4, 6)
    expected = interpolate(x, (2, 3), mode)
    largest, grow = 0, F.interpolate

    def watched(part, **options):
        nonlocal largest
        out = grow(part, **options)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(F, "interpolate", watched)
    monkeypatch.setattr(upsample, "MAX_ELEMENTS", expected.numel() // 2)
    assert torch.equal(interpolate(x, (2, 3), mode), expected)
    assert largest <= expected.numel() // 2


@pytest.mark.slow
@pytest.mark.parametrize("part", ["norm and convolution", "down", "nearest", "linear"])
def test_tensors_past_2_to_the_31_elements_give_the_numbers_of_their_parts(part):
    """Kernels that count voxels in 32 bits fail or err in the far end of such tensors."""
    if psutil.virtual_memory().available < 15e9:
        pytest.skip("needs 15 GB of free memory")
    layer, channels, length = {
        "norm and convolution": (
            nn.Sequential(
                NormAct(GroupNorm(2, num_groups=1), "silu"), nn.Conv3d(2, 1, 3, padding=1)
            ),
            2,
            1030,
        ),
        "down": (ConvDown(1, 2, 3), 1, 2060),
        "nearest": (InterpUp(1, 2, 3), 1, 258),
        "linear": (InterpUp(2, 2, 3, mode="linear", conv_after=False), 2, 130),
    }[part]
    layer.bfloat16()
    with torch.no_grad():
        x = torch.empty(
            *(1, channels, length, 1024, 1024),
            dtype=torch.bfloat16,
            memory_format=torch.channels_last_3d,
        )
        plane = torch.randn(channels, 1024, 1024)  # everywhere the same, so that parts see the same
        for row in x[0].unbind(1):
            row.copy_(plane)
        apply = partial(run, layer) if isinstance(layer, nn.Sequential) else layer
        y = apply(x)
        assert max(x.numel(), y.numel()) > 2**31
        far = apply(x[:, :, -16:].clone())
    rows = 4  # far from the face that the cut made
    torch.testing.assert_close(y[:, :, -rows:], far[:, :, -rows:], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kernel", [None, 2, 3, 4, 5])
def test_transposed_convolution_multiplies_the_size_for_every_kernel(kernel):
    x = torch.randn(1, 4, 3, 5, 2)
    assert TransposeUp(4, 2, 3, kernel)(x).shape == (1, 4, 6, 10, 4)


def test_transposed_convolution_covers_every_voxel_or_is_refused():
    with pytest.raises(ValueError, match="leaves holes"):
        TransposeUp(4, 3, 3, kernel=2)
    assert TransposeUp(4, (2, 2, 1), 3, kernel=3)(torch.randn(1, 4, 3, 3, 3)).shape[2:] == (6, 6, 3)
