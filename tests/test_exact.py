"""The exact mode equals the full forward pass, whatever the layers, the tiles and the budget."""

import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vae3d.exact import executor
from vae3d.exact.executor import (
    HANDLERS,
    Executor,
    decode_exact,
    encode_exact,
    fold_nearest,
)
from vae3d.exact.nodes import Source, Stored, leaves_of
from vae3d.kernels import steps, winograd
from vae3d.kernels.moments import Moments
from vae3d.kernels.steps import plain
from vae3d.models import attention, blocks, downsample, norm, presets, upsample
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import FSQ, PosteriorHead
from vae3d.models.reach import OVERRIDES

GROUPS = partial(norm.GroupNorm, num_groups=4)
SHAPE = {3: (14, 9, 11), 2: (22, 17)}
TILE = {3: (3, 5, 64), 2: (5, 7)}


def subclasses(base):
    """Every class of our own that derives from `base`, at any depth."""
    for cls in base.__subclasses__():
        if cls.__module__.startswith("vae3d."):
            yield cls
        yield from subclasses(cls)


def tiny(dims=3, **options):
    options = {"channels": (4, 8), "num_res_blocks": 1, "norm": GROUPS, **options}
    return trained(CustomVAE(spatial_dims=dims, latent_channels=2, **options))


def trained(vae):
    """Weights off their start, so that no zero or one hides a mistake."""
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in vae.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return vae.eval()


def tiny_preset(preset, dims):
    """A published layout at its smallest."""
    if preset is presets.T1LightVAE:
        pytest.skip("fixed to 3D and 100 million parameters; MaisiVAE has the same layers")
    if preset is presets.AutoencoderKL:
        return preset(1, 1, 16, 8, (1, 2), 1, (), 2, 2, spatial_dims=dims, num_groups=4)
    widths = "num_channels" if issubclass(preset, presets.MaisiVAE) else "channels"
    return preset(
        spatial_dims=dims,
        num_res_blocks=1,
        attention_levels=(False, True),
        latent_channels=2,
        norm_num_groups=4,
        **{widths: (4, 8)},
    )


def assert_exact(vae, x=None, within=1e-4, **options):
    """Both halves, compared as parts of the output's range."""
    dims = vae.spatial_dims
    x = torch.rand(vae.in_channels, *SHAPE[dims]) if x is None else x
    x = x.to(vae.last_layer.dtype)
    options.setdefault("tile", TILE[dims])
    with torch.no_grad():
        moments = vae.head(vae.quant_conv(vae.encoder(vae.pad(x[None]))))
        decoded = vae.output(vae.decoder(vae.post_quant_conv(moments.mean)))[0]
    posterior = encode_exact(vae, x, **options)
    recon = decode_exact(vae, moments.mean[0], **options)
    logvars = (p.clamp_min(-99) for p in (posterior.logvar, moments.logvar[0]))  # none of codes
    latents = [(posterior.mean, moments.mean[0]), tuple(logvars)]
    for ours, full in (*latents, (recon, decoded)):
        assert ours.shape == full.shape
        spread = max(float(full.max() - full.min()), 1e-3)
        assert float((ours - full).abs().max()) <= within * spread


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("socket", "choice"),
    [
        (socket, cls)
        for socket, base in (
            ("norm", norm.Norm),
            ("block", blocks.Block),
            ("down", downsample.Down),
            ("up", upsample.Up),
            ("mid_attention", attention.Attention),
            ("posterior", PosteriorHead),
        )
        for cls in subclasses(base)
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_every_built_in_layer_equals_the_full_pass(socket, choice, dims):
    choice = {norm.GroupNorm: GROUPS, FSQ: partial(FSQ, levels=(7, 5))}.get(choice, choice)
    if choice is upsample.ShuffleUp or choice is downsample.UnshuffleDown:
        options = {"channels": (8, 8)}
    else:
        options = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer of ours may be run in full for want of a handler
        assert_exact(tiny(dims, **{**options, socket: choice}))


@pytest.mark.parametrize(
    "options",
    [
        {"up": partial(upsample.InterpUp, mode="linear")},
        {"up": partial(upsample.InterpUp, conv_after=False)},
        {"up": partial(upsample.TransposeUp, kernel=3)},
        {"up": partial(upsample.TransposeUp, kernel=4)},
        {"down": partial(downsample.ConvDown, padding="asymmetric")},
        {"mid_attention": partial(attention.GlobalAttention, num_heads=2, out_proj=False)},
        {"mid_attention": partial(attention.GlobalAttention, relative_position_bias=(4, 4, 4))},
        {"mid_attention": partial(attention.PatchAttention, window=3, shift=True)},
        {"mid_attention": partial(attention.PatchAttention, window=(2, 3, 4), num_heads=2)},
        {"mid_attention": partial(attention.LinearAttention, num_heads=2), "norm": norm.RMSNorm},
        {"block": partial(blocks.ResBlock, dropout=0.5)},
        {"attention": attention.GlobalAttention, "attention_levels": (False, True)},
        {"factors": ((1, 1, 1), (3, 2, 1))},
        {"factors": ((2, 1, 2), (1, 2, 2)), "up": partial(upsample.InterpUp, mode="linear")},
        {"channels": (8, 4), "decoder_res_blocks": 2},
        {"in_channels": 2, "out_channels": 3, "output": "tanh"},
        {"act": "gelu", "act_before_out": False, "quant_conv": False},
    ],
    ids=str,
)
def test_options_of_layers_equal_the_full_pass(options):
    assert_exact(tiny(**options))


@pytest.mark.parametrize("tile", [(1, 3, 4), (2, 64, 3), (64, 64, 64), (5, 4, 9), None])
def test_the_tile_size_does_not_matter(tile):
    assert_exact(tiny(mid_attention=attention.GlobalAttention), tile=tile)


def test_a_float64_model_is_exact_in_float64():
    assert_exact(tiny(mid_attention=attention.GlobalAttention).double(), within=1e-12)


@pytest.mark.parametrize("memory_gb", [1.0, 4e-4, 2e-4])
def test_the_budget_does_not_matter(memory_gb):
    vae = tiny(channels=(4, 8, 8), mid_attention=attention.GlobalAttention)
    assert_exact(vae, torch.rand(1, 24, 12, 16), tile=None, memory_gb=memory_gb)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("preset", list(subclasses(CustomVAE)), ids=lambda c: c.__name__)
def test_every_preset_equals_the_full_pass(preset, dims):
    vae = tiny_preset(preset, dims)
    assert_exact(trained(vae))


@pytest.mark.parametrize("groups", [2, 4])
def test_convolutions_in_groups_equal_the_plain_layers_at_size(groups):
    """128 channels: a group is as wide as what Winograd's sums would take without groups."""
    vae = tiny(channels=(128,), num_res_blocks=1, encoder_mid=False, decoder_mid=False)
    grouped = [
        (layer, name)
        for layer in vae.modules()
        for name, conv in layer.named_children()
        if isinstance(conv, torch.nn.Conv3d) and conv.weight.shape[:3] == (128, 128, 3)
    ]
    assert len(grouped) == 4
    for layer, name in grouped:
        setattr(layer, name, torch.nn.Conv3d(128, 128, 3, padding=1, groups=groups))
    x = torch.rand(1, 24, 20, 18)
    assert_exact(vae, x, tile=None, memory_gb=0.02)
    with torch.no_grad():
        full = vae(x[None], sample_posterior=False)[0]
        with plain():
            expected = vae(x[None], sample_posterior=False)[0]
    torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-4)


def test_statistics_hold_the_variance_between_tiles():
    x = torch.randn(1, 4, 12, 10, 8) + 1000 * torch.arange(12.0).reshape(1, 1, 12, 1, 1)
    moments = Moments(4)
    for rows in x.split([1, 5, 4, 2], dim=2):
        moments.update(rows)
    mean, variance = moments.of_groups(2)
    grouped = x.double().reshape(2, -1)
    torch.testing.assert_close(mean[::2], grouped.mean(1))
    torch.testing.assert_close(variance[::2], grouped.var(1, correction=0), rtol=1e-6, atol=0)


def test_statistics_keep_their_digits_far_from_zero():
    x = torch.randn(1, 2, 40, 40, 40) + 1e4
    moments = Moments(2)
    for rows in x.split(3, dim=2):
        moments.update(rows)
    _, variance = moments.of_groups(2)
    truth = x.double().flatten(2)[0].var(1, correction=0)
    torch.testing.assert_close(variance, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 3), (4, 1, 1)])
def test_folded_upsampling_is_nearest_then_convolution(factor):
    x, conv = torch.rand(1, 3, 4, 5, 3), nn.Conv3d(3, 2, 3, padding=1)
    folded = fold_nearest(conv.weight.detach(), factor)
    ours = nn.functional.conv_transpose3d(x, folded, conv.bias, factor, 1)
    full = conv(nn.functional.interpolate(x, scale_factor=[float(f) for f in factor]))
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)


class Blur(nn.Module):
    """Somebody's own layer."""

    def __init__(self, channels, factor, spatial_dims, halo=None):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 5, padding=2)
        if halo is not None:
            self.halo = halo

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"kernel_size": 4}])
def test_padding_by_name_is_that_of_the_layer(options):
    class Named(blocks.Block):
        def __init__(self, channels, out_channels, spatial_dims, norm, act):
            conv = nn.Conv3d(
                channels, out_channels, **{"kernel_size": 3, "padding": "same", **options}
            )
            super().__init__(nn.Sequential(conv), None)

    assert_exact(tiny(block=Named))


@pytest.mark.parametrize("mode", ["circular", "replicate", "reflect"])
def test_padding_that_is_not_zeros_runs_at_once_with_a_message(mode):
    class Padded(blocks.Block):
        def __init__(self, channels, out_channels, spatial_dims, norm, act):
            conv = nn.Conv3d(channels, out_channels, 3, padding=1, padding_mode=mode)
            super().__init__(nn.Sequential(conv), None)

    with pytest.warns(UserWarning, match=f"padding is {mode}"):
        assert_exact(tiny(block=Padded))


def test_a_custom_module_that_declares_its_halo_is_tiled():
    vae = tiny()
    vae.decoder.insert(2, Blur(8, 1, 3, halo=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(vae)


def test_a_custom_module_without_a_halo_is_run_in_full_with_a_message():
    vae = tiny()
    vae.decoder.insert(2, Blur(8, 1, 3))
    with pytest.warns(UserWarning, match="Blur on the whole volume"):
        assert_exact(vae)


def test_a_subclass_that_overrides_a_layer_is_not_taken_for_its_base():
    class Doubled(blocks.ResBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.warns(UserWarning, match="Doubled"):
        assert_exact(tiny(block=Doubled))


def test_a_dilated_transposed_convolution_is_run_in_full():
    vae = tiny(up=upsample.TransposeUp)
    (up,) = [layer for layer in vae.decoder if isinstance(layer, upsample.TransposeUp)]
    up.conv = nn.ConvTranspose3d(8, 8, 2, 2, padding=1, dilation=3)
    with pytest.warns(UserWarning, match="its dilation is"):
        assert_exact(vae)


def test_handlers_name_what_a_subclass_may_not_override():
    for cls in HANDLERS:
        assert any(hasattr(cls, name) for name in OVERRIDES)


def test_memory_maps_go_in_and_out(tmp_path):
    vae = tiny()
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1, 16, 12, 10))
    x[:] = np.random.default_rng(0).random(x.shape)
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, (1, 15, 12, 9))
    posterior = encode_exact(vae, x, tile=(4, 12, 10))
    assert decode_exact(vae, posterior.mean, out=out, size=(15, 12, 9)) is out
    with torch.no_grad():
        full = vae(torch.from_numpy(np.array(x))[None])[0][0, :, :15, :, :9]
    np.testing.assert_allclose(out, full, rtol=0, atol=1e-5 * float(full.abs().max()))


def test_parameters_and_input_are_left_alone():
    vae, x = tiny(mid_attention=attention.GlobalAttention), torch.rand(1, *SHAPE[3])
    before, weights = x.clone(), {k: v.clone() for k, v in vae.state_dict().items()}
    encode_exact(vae, x, tile=TILE[3])
    assert torch.equal(x, before)
    assert all(torch.equal(v, weights[k]) for k, v in vae.state_dict().items())


@pytest.fixture
def held_bytes(monkeypatch):
    """What all stored tensors hold, noted at each write."""
    stores, held = [], []
    make, part = Stored.__init__, Stored.part

    def made(self, *args):
        make(self, *args)
        stores.append(self)

    def written(self, *args):
        memory = part(self, *args)
        held.append(sum(s.held_bytes() for s in stores))
        return memory

    monkeypatch.setattr(Stored, "__init__", made)
    monkeypatch.setattr(Stored, "part", written)
    return held


@pytest.mark.parametrize("memory_gb", [8e-4, 4e-4])
def test_what_is_stored_stays_within_the_budget(memory_gb, held_bytes, monkeypatch):
    monkeypatch.setattr(executor, "GRAIN", 0)  # these volumes are not much larger than a page
    decode_exact(tiny(channels=(8, 8)), torch.rand(2, 16, 8, 8), memory_gb)
    assert 0 < max(held_bytes) <= memory_gb * 2**30


@pytest.mark.slow
def test_every_way_to_save_memory_gives_the_full_pass(monkeypatch):
    """Stored with or without the shortcut, computed again, or in a file, as the budget asks."""
    monkeypatch.setattr(executor, "GRAIN", 0)
    seen, choose = set(), Executor.to_store

    def watched(self, node):
        moved, size, place = choose(self, node)
        seen.add((len(moved), isinstance(place, Path)))
        return moved, size, place

    monkeypatch.setattr(Executor, "to_store", watched)
    vae = tiny(channels=(8, 16), factors=((1, 1, 1), (2, 2, 2)), num_res_blocks=2)
    x = torch.rand(1, 24, 16, 12)
    for memory_gb in (1, 2e-3, 1e-3, 7e-4, 5e-4, 3e-4, 1e-4):
        assert_exact(vae, x, tile=None, memory_gb=memory_gb)
    assert seen == {(0, False), (1, False), (2, False), (1, True)}


@pytest.mark.parametrize(
    "tile, used",
    [((1, 5, 64), {2}), ((2, 64, 64), {2, 4}), ((5, 4, 6), {2, 4}), ((64,) * 3, {2, 4})],
)
def test_winograds_sums_serve_tiles_of_any_size(tile, used, monkeypatch):
    ways = {2: winograd.convolve_two, 4: winograd.convolve_four}
    calls = set()

    def watched(rows, *args):
        calls.add(rows)
        ways[rows](*args)

    monkeypatch.setattr(winograd, "PAYS_FROM", 8)
    monkeypatch.setattr(winograd, "convolve_two", partial(watched, 2))
    monkeypatch.setattr(winograd, "convolve_four", partial(watched, 4))
    with steps.plain():
        assert_exact(tiny(channels=(8, 16)), tile=tile)
    assert calls == used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_gives_the_result_of_the_cpu():
    vae, x = tiny(), torch.rand(1, *SHAPE[3])
    mean = encode_exact(vae, x, tile=TILE[3]).mean
    recon = decode_exact(vae, mean, tile=TILE[3])
    there = encode_exact(vae.cuda(), x, tile=TILE[3]).mean.cpu()
    recon_there = decode_exact(vae, mean, tile=TILE[3])
    torch.testing.assert_close(there, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recon_there, recon, rtol=1e-4, atol=1e-5)


def test_nothing_is_stored_when_all_is_done(held_bytes):
    vae, z = tiny(), torch.rand(2, 6, 4, 4)
    run = Executor(0.1, tile=(4, 4, 4))
    node = Source(z, z.shape[1:], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        node = run.walk(vae.decoder, run.walk(vae.post_quant_conv, node))
        for _ in run.slabs(node):
            pass
    assert max(held_bytes) > 0
    assert not run.live and all(leaf.held_bytes() == 0 for leaf in leaves_of(node))


@pytest.mark.parametrize("memory_gb", [0, -1, float("nan"), float("inf")])
def test_a_budget_must_be_a_positive_number(memory_gb):
    with pytest.raises(ValueError, match="memory_gb"):
        encode_exact(tiny(), torch.rand(1, 8, 8, 8), memory_gb)


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (1, 8, 8), (1, 1, 8, 8, 8), (1, 8, 0, 8)])
def test_volumes_and_latents_of_other_axes_are_refused(shape):
    vae = tiny()
    with pytest.raises(ValueError, match="volume has shape"):
        encode_exact(vae, torch.rand(shape))
    with pytest.raises(ValueError, match="latent has shape"):
        decode_exact(vae, torch.rand(3, *shape[1:]))


def test_no_voxel_of_a_decoded_volume_is_left_unwritten():
    vae = tiny()
    z = encode_exact(vae, torch.rand(1, 15, 12, 9)).mean
    assert decode_exact(vae, z, size=(15, 12, 9)).shape == (1, 15, 12, 9)
    for size in ((40, 12, 9), (15, 12), (15, 0, 9)):
        with pytest.raises(ValueError, match="what the latent decodes to"):
            decode_exact(vae, z, size=size)
    for shape in ((3, 15, 12, 9), (1, 30, 12, 9)):
        with pytest.raises(ValueError, match="out has shape"):
            decode_exact(vae, z, size=(15, 12, 9), out=torch.empty(shape))


def test_a_device_without_float64_is_refused_by_name():
    parameter = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mps does not have; use --device cpu, or --mode patch"):
        executor._home(SimpleNamespace(parameters=lambda: iter([parameter])))
