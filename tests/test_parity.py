"""The presets compute what the libraries compute: same weights, same numbers, same gradients.

Every comparison runs in float64, where the two agree to the rounding of float64 and so are the same
function, and in float32.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from vae3d.models.presets import MaisiVAE, VAEModel
from vae3d.weights.convert import (
    export_diffusers,
    export_monai_state,
    from_monai_state,
    read_model,
    read_row,
)
from vae3d.weights.layouts import DIFFUSERS
from vae3d.weights.rebuild import Hints

monai_nets = pytest.importorskip("monai.networks.nets")
RTOL = {torch.float32: 1e-5, torch.float64: 1e-11}

BASE = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 3,
    "channels": (4, 8),
    "num_res_blocks": 1,
    "attention_levels": (False, False),
    "norm_num_groups": 4,
}
MONAI_CONFIGS = {
    "plain": {},
    "2d": {"spatial_dims": 2},
    "no bottleneck": {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False},
    "bottleneck in the encoder only": {"with_decoder_nonlocal_attn": False},
    "bottleneck in the decoder only": {"with_encoder_nonlocal_attn": False},
    "attention at the last level": {"attention_levels": (False, True)},
    "attention at every level, 2d": {"attention_levels": (True, True), "spatial_dims": 2},
    "attention without bottleneck": {
        "attention_levels": (False, True),
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    "two blocks with attention": {"attention_levels": (False, True), "num_res_blocks": 2},
    "no attention, 2d": {
        "spatial_dims": 2,
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    "no linear layer after attention": {"include_fc": False},
    "combined linear": {"use_combined_linear": True},
    "combined, no linear layer, 2d": {
        "use_combined_linear": True,
        "include_fc": False,
        "spatial_dims": 2,
    },
    "flash": {"use_flash_attention": True},
    "transposed": {"use_convtranspose": True},
    "transposed, 2d": {"use_convtranspose": True, "spatial_dims": 2},
    "blocks per level": {"num_res_blocks": (2, 1)},
    "three levels": {
        "channels": (4, 4, 8),
        "num_res_blocks": (1, 2, 1),
        "attention_levels": (False, False, False),
    },
    "one level": {"channels": (8,), "num_res_blocks": 2, "attention_levels": (False,)},
    "channels in and out": {"in_channels": 2, "out_channels": 3},
    "one latent channel": {"latent_channels": 1},
    "groups and eps": {"norm_num_groups": 2, "norm_eps": 1e-3},
    "checkpointed": {"use_checkpoint": True},
    "as wide as in practice": {"channels": (32, 64), "norm_num_groups": 32},
}


def shake(net):
    """Random weights everywhere: fresh norms are the identity and hide mistakes."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def volume(spatial_dims, channels=1, batch=2):
    return torch.randn(batch, channels, *(16, 8, 12)[:spatial_dims])


def distance(a, b):
    """Largest difference as a part of the largest value of `b`."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_close(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert distance(ours, theirs) <= RTOL[ours.dtype]


def compare(ours, theirs, run, x, rename):
    """Values and gradients of `run(net, x)` in float64 and in float32, gradients layer by layer.

    Those of float32 are compared with the reference's in float64, whose own rounding would else
    count as ours (it is of the same size).
    """
    exact = run_both(in_float64(ours), in_float64(theirs), run, x, rename)
    single = run_both(ours, theirs, run, x, rename)
    for values, grads, their_values, their_grads in (exact, single):
        for a, b in zip(values, their_values, strict=True):
            assert_close(a, b)
        assert grads.keys() == their_grads.keys() == {name for name, _ in ours.named_parameters()}
        truth = by_layer(exact[3])
        for layer, gradient in by_layer(grads).items():
            expected = truth[layer]
            error = ((gradient - expected).norm() / expected.norm()).item()
            assert error <= RTOL[next(iter(grads.values())).dtype], (layer, error)


def by_layer(gradients):
    """One vector per layer, of its weight and bias.

    By itself a bias before a norm of single channels has a gradient of zero, and with norms of few
    channels it nearly cancels: then its digits in float32 are rounding errors, of both libraries.
    """
    layers = {}
    for name, gradient in gradients.items():
        layers.setdefault(name.rpartition(".")[0], []).append(gradient.double().flatten())
    return {name: torch.cat(parts) for name, parts in layers.items()}


def in_float64(net):
    """A copy in float64. MAISI's norm casts to float32, so torch's takes its place."""
    net = copy.deepcopy(net).double()
    for layer in net.modules():
        if type(layer).__name__ == "MaisiGroupNorm3D":
            layer.forward = partial(nn.GroupNorm.forward, layer)
    return net


def run_both(ours, theirs, run, x, rename):
    """Values and gradients of `ours`, then of `theirs` under our names."""
    results = []
    for net in (ours, theirs):
        values = run(net, x.to(next(net.parameters())))
        sum(v.square().mean() + v.mean() for v in values).backward()
        results += [values, {name: p.grad for name, p in net.named_parameters()}]
        net.zero_grad()
    return *results[:3], rename(results[3])


def compare_with_monai(ours, theirs, x):
    """Both ways of conversion; encode, decode, all gradients, a seeded forward pass."""
    noise = torch.randn_like(theirs.encode(x)[0])

    def run(net, x):
        mean, std = net.encode(x)
        return mean, std, net.decode(mean + std * noise.to(x)), net.decode(noise.to(x))

    compare(ours, theirs, run, x, lambda g: from_monai_state(ours, g))
    shake(ours)
    theirs.load_state_dict(export_monai_state(ours), strict=True)
    results = []
    for net in (ours, theirs):
        torch.manual_seed(7)
        results.append([*net(x), net.reconstruct(x), net.encode_stage_2_inputs(x), torch.rand(9)])
    for a, b in zip(*results, strict=True):
        assert distance(a, b) <= 2 * RTOL[a.dtype]  # either may be off by one


@pytest.mark.parametrize("options", MONAI_CONFIGS.values(), ids=MONAI_CONFIGS.keys())
def test_vae_model_equals_monai(options):
    config = BASE | options
    theirs = shake(monai_nets.AutoencoderKL(**config))
    ours = VAEModel.from_config(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    count = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert count[0] == count[1]
    compare_with_monai(ours, theirs, volume(config["spatial_dims"], config["in_channels"]))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_laid_out_as_monais(spatial_dims, batch, dtype):
    """Attention leaves channels innermost, norms may undo it, and noise fills memory in order."""
    x = torch.rand(batch, 1, *(16, 8, 12)[:spatial_dims]).to(dtype)
    for mid, *levels, blocks in itertools.product(
        (False, True), (False, True), (False, True), (1, 2)
    ):
        config = BASE | {
            "spatial_dims": spatial_dims,
            "attention_levels": levels,
            "num_res_blocks": blocks,
            "with_encoder_nonlocal_attn": mid,
            "with_decoder_nonlocal_attn": False,
        }
        theirs = monai_nets.AutoencoderKL(**config).to(dtype)
        ours = VAEModel.from_config(config).to(dtype)
        with torch.no_grad():
            std, our_std = theirs.encode(x)[1], ours.encode(x)[1]
        torch.manual_seed(7)
        expected = torch.randn_like(std).float()
        torch.manual_seed(7)
        noise = ours.sampling(0 * our_std, torch.ones_like(our_std))
        torch.testing.assert_close(noise.float(), expected, rtol=0.01, atol=0.01, msg=str(config))


@pytest.mark.parametrize("options", MONAI_CONFIGS.values(), ids=MONAI_CONFIGS.keys())
def test_monai_networks_are_rebuilt_from_their_weights(options):
    config = BASE | options
    theirs = shake(monai_nets.AutoencoderKL(**config)).eval()
    hints = Hints(norm_num_groups=config["norm_num_groups"], norm_eps=config.get("norm_eps", 1e-6))
    ours, report = read_model(theirs.state_dict(), hints)
    assert report.layout == "MONAI"
    x = volume(config["spatial_dims"], config["in_channels"])
    with torch.no_grad():
        assert_close(ours(x)[0], theirs.reconstruct(x))


def test_odd_sizes_are_padded_where_monai_drops_voxels():
    config = BASE | {"spatial_dims": 2, "channels": (4, 4, 8), "attention_levels": (False,) * 3}
    theirs = shake(monai_nets.AutoencoderKL(**config)).eval()
    hints = Hints(norm_num_groups=config["norm_num_groups"])
    ours = read_model(theirs.state_dict(), hints)[0].eval()
    shapes = {}
    for size in ((9, 11), (8, 12)):
        x = torch.rand(1, config["in_channels"], *size)
        with torch.no_grad():
            latents = ours.encode(x).mean, theirs.encode(x)[0]
            recons = ours(x, sample_posterior=False)[0], theirs.reconstruct(x)
        pairs = (latents, recons)
        shapes[size] = [tuple(tuple(y.shape[2:]) for y in pair) for pair in pairs]
    assert shapes[9, 11] == [((3, 3), (2, 2)), ((9, 11), (8, 8))]
    assert shapes[8, 12] == [((2, 3), (2, 3)), ((8, 12), (8, 12))]
    assert_close(recons[0], recons[1])


MAISI_CONFIGS = {
    "plain": {},
    "transposed": {"use_convtranspose": True},
    "bottleneck and attention": {
        "attention_levels": (False, True),
        "with_encoder_nonlocal_attn": True,
        "with_decoder_nonlocal_attn": True,
        "include_fc": True,
    },
    "blocks per level": {"num_res_blocks": (1, 2)},
}


@pytest.mark.parametrize("options", MAISI_CONFIGS.values(), ids=MAISI_CONFIGS.keys())
def test_maisi_vae_equals_maisi(options):
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    config = BASE | {"num_res_blocks": (1, 1)} | options
    config["num_channels"] = config.pop("channels")
    theirs = shake(AutoencoderKlMaisi(**config, num_splits=1)).eval()
    ours = MaisiVAE.from_config(config | {"num_splits": 1, "norm_float16": False}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = volume(3)
    z = torch.randn(2, config["latent_channels"], 8, 4, 6)

    def run(net, x):
        mean, std = (lambda p: (p.mean, p.std) if net.__class__ is MaisiVAE else p)(net.encode(x))
        return mean, std, net.decode(mean), net.decode(z.to(mean))

    compare(ours, theirs, run, x, lambda g: from_monai_state(ours, g))
    theirs.load_state_dict(export_monai_state(ours), strict=True)
    rebuilt, report = read_model(
        theirs.state_dict(),
        Hints(norm_num_groups=4, use_convtranspose=config.get("use_convtranspose", False)),
    )
    assert report.layout == "MAISI"
    with torch.no_grad():
        assert_close(rebuilt(x)[0], theirs.reconstruct(x))


DIFFUSERS_CONFIGS = {
    "plain": {},
    "attention at a level": {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "two blocks": {"layers_per_block": 2},
    "no attention": {"mid_block_add_attention": False},
    "no quant conv": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 2,
    },
    "channels in and out": {"in_channels": 3, "out_channels": 2},
}


@pytest.mark.parametrize("options", DIFFUSERS_CONFIGS.values(), ids=DIFFUSERS_CONFIGS.keys())
def test_autoencoder_kl_equals_diffusers(options):
    from diffusers import AutoencoderKL

    config = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 4,
        **options,
    }
    theirs = shake(AutoencoderKL(**config))
    ours, report = read_model(theirs.state_dict(), Hints(norm_num_groups=4))
    assert report.layout == "diffusers"
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = volume(2, config["in_channels"])
    z = torch.randn(2, ours.latent_channels, 8, 4)

    def run(net, x):
        posterior = net.encode(x)
        posterior = posterior if net.__class__ is type(ours) else posterior.latent_dist
        recon, other = net.decode(posterior.mean), net.decode(z.to(x))
        if net.__class__ is not type(ours):
            recon, other = recon.sample, other.sample
        return posterior.mean, posterior.std, recon, other

    rows = DIFFUSERS.rows(ours)
    compare(ours, theirs, run, x, lambda g: {row.ours: read_row(row, g) for row in rows})
    state, their_config = export_diffusers(shake(ours))
    again = AutoencoderKL.from_config(their_config)
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        for a, b in zip(run(ours, x), run(again, x), strict=True):
            assert_close(a, b)
