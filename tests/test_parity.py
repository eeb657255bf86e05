"""The presets compute what the libraries compute: same weights, same numbers, same gradients."""

import pytest
import torch

from vae3d.models.convert import (
    export_diffusers,
    export_monai_state,
    from_monai_state,
    read_model,
)
from vae3d.models.presets import MaisiVAE, VAEModel
from vae3d.models.rebuild import Hints

monai_nets = pytest.importorskip("monai.networks.nets")
RTOL = 1e-5

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


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=RTOL * theirs.abs().max().item())


def assert_gradients_agree(ours, theirs, rename):
    gradients = rename({k: p.grad for k, p in theirs.named_parameters()})
    scale = max(g.abs().max() for g in gradients.values())
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            gradients[name],
            rtol=0,
            atol=max(RTOL * gradients[name].abs().max().item(), 3e-6 * scale.item()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def compare_with_monai(ours, theirs, x):
    """Encode, decode, seeded forward, gradients, and the way back."""
    for a, b in zip(ours.encode(x), theirs.encode(x), strict=True):
        assert_close(a, b)
    z = torch.randn_like(theirs.encode(x)[0])
    assert_close(ours.decode(z), theirs.decode(z))
    results = []
    for net in (ours, theirs):
        torch.manual_seed(7)
        recon, mean, std = net(x)
        loss = recon.square().mean() + mean.square().mean() + std.mean()
        loss.backward()
        results.append((recon, mean, std))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    assert_gradients_agree(ours, theirs, lambda g: from_monai_state(ours, g))
    theirs.load_state_dict(export_monai_state(ours), strict=True)
    assert_close(ours.reconstruct(x), theirs.reconstruct(x))


@pytest.mark.parametrize("options", MONAI_CONFIGS.values(), ids=MONAI_CONFIGS.keys())
def test_vae_model_equals_monai(options):
    config = BASE | options
    theirs = shake(monai_nets.AutoencoderKL(**config))
    ours = VAEModel.from_config(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    count = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert count[0] == count[1]
    compare_with_monai(ours, theirs, volume(config["spatial_dims"], config["in_channels"]))


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
    results = []
    for recon, mean, std in (
        (lambda r, p: (r, p.mean, p.std))(*ours(x)),
        (theirs.reconstruct(x), *theirs.encode(x)),
    ):
        (recon.square().mean() + mean.square().mean() + std.mean()).backward()
        results.append((recon, mean, std))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    assert_gradients_agree(ours, theirs, lambda g: from_monai_state(ours, g))
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
    recon, posterior = ours(x)
    their_posterior = theirs.encode(x).latent_dist
    their_recon = theirs.decode(their_posterior.mean).sample
    for r, m, s in (
        (recon, posterior.mean, posterior.std),
        (their_recon, their_posterior.mean, their_posterior.std),
    ):
        (r.square().mean() + m.square().mean() + s.mean()).backward()
    assert_close(recon, their_recon)
    assert_close(posterior.mean, their_posterior.mean)
    assert_close(posterior.std, their_posterior.std)

    state, their_config = export_diffusers(ours)
    again = AutoencoderKL.from_config(their_config)
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert_close(again.decode(again.encode(x).latent_dist.mean).sample, their_recon)

    from vae3d.models.convert import read_row
    from vae3d.models.layouts import DIFFUSERS

    rows = DIFFUSERS.rows(ours)
    assert_gradients_agree(ours, theirs, lambda g: {row.ours: read_row(row, g) for row in rows})
