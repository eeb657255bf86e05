"""Presets: published sizes, their APIs, their recipes in configs/model, torch.export."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.export import Dim, export

from vae3d.config import parse
from vae3d.models.attention import Attention, GlobalAttention, LinearAttention, PatchAttention
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.presets import (
    LATENT_SCALE,
    AutoencoderKL,
    MaisiVAE,
    MonaiVAE,
    T1LightVAE,
    VAEModel,
    compute_kl_loss,
)
from vae3d.models.spec import build
from vae3d.weights.convert import export_diffusers, export_monai_state

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))
SD = {"base_ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4}
MONAI = {"channels": (4, 8), "num_res_blocks": 1, "norm_num_groups": 4}
TINY = {
    "CustomVAE": partial(
        CustomVAE,
        channels=(4, 8),
        norm=partial(GroupNorm, num_groups=4),
        num_res_blocks=1,
        mid_attention=GlobalAttention,
    ),
    "AutoencoderKL": partial(AutoencoderKL, **SD),
    "AutoencoderKL 3D": partial(AutoencoderKL, spatial_dims=3, **SD),
    "MonaiVAE": partial(MonaiVAE, **MONAI),
    "VAEModel": partial(VAEModel, use_convtranspose=True, **MONAI),
    "MaisiVAE": partial(MaisiVAE, num_channels=(4, 8), num_res_blocks=1, norm_num_groups=4),
    "T1LightVAE": partial(T1LightVAE, num_channels=(4, 8), norm_num_groups=4),
}


def count(vae):
    return sum(p.numel() for p in vae.parameters())


def on_meta(cls, **options):
    with torch.device("meta"):
        return cls(**options)


# --------------------------------------------------------------------------------- sizes


def test_published_parameter_counts():
    assert count(on_meta(AutoencoderKL, in_channels=3)) == 83_653_863
    assert round(count(on_meta(T1LightVAE)) / 1e6, 2) == 2.93
    assert round(count(on_meta(MaisiVAE)) / 1e6, 1) == 20.9


def test_no_preset_holds_a_parameter_that_the_reference_has_not():
    """Names and shapes of every recipe of a published network, at its full size."""
    monai = pytest.importorskip("monai.networks.nets")
    maisi = pytest.importorskip("monai.apps.generation.maisi.networks.autoencoderkl_maisi")
    diffusers = pytest.importorskip("diffusers")
    shared = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4}
    shared |= {"attention_levels": (False,) * 3, "norm_num_groups": 32}
    bare = {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
    references = {
        "maisi": partial(
            maisi.AutoencoderKlMaisi,
            **shared | bare,
            num_channels=(64, 128, 256),
            num_res_blocks=(2, 2, 2),
            include_fc=False,
        ),
        "monai": partial(
            monai.AutoencoderKL, **shared | bare, channels=(32, 64, 128), num_res_blocks=(2, 2, 2)
        ),
        "t1_light": partial(
            maisi.AutoencoderKlMaisi,
            **shared | bare,
            num_channels=(32, 64, 128),
            num_res_blocks=(1, 1, 1),
            include_fc=False,
        ),
        "stable_diffusion": partial(
            diffusers.AutoencoderKL,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ),
    }
    for path in RECIPES:
        if path.stem in references:
            ours, theirs = on_meta(recipe(path)), on_meta(references.pop(path.stem))
            names = export_monai_state(ours) if path.stem != "stable_diffusion" else None
            names = names or export_diffusers(ours)[0]
            shapes = [{k: v.shape for k, v in s.items()} for s in (names, theirs.state_dict())]
            assert shapes[0] == shapes[1]
            assert count(ours) == count(theirs)
    assert not references


def test_the_light_variant_maps_its_published_shape():
    vae = on_meta(T1LightVAE)
    posterior = vae.encode(torch.empty(1, 1, 112, 136, 112, device="meta"))
    assert posterior.mean.shape == (1, 4, 28, 34, 28)
    assert vae.decode(posterior.mean).shape == (1, 1, 112, 136, 112)


def test_stable_diffusion_halves_three_times_and_has_one_more_block_in_the_decoder():
    vae = on_meta(AutoencoderKL)
    assert vae.factor == (8, 8)
    posterior = vae.encode(torch.empty(1, 1, 256, 256, device="meta"))
    assert posterior.mean.shape == (1, 4, 32, 32)
    assert on_meta(AutoencoderKL, spatial_dims=3, base_ch=32).factor == (8, 8, 8)


@pytest.mark.parametrize(
    "cls", [CustomVAE, AutoencoderKL, MonaiVAE, VAEModel, MaisiVAE, T1LightVAE]
)
def test_default_constructors_run(cls):
    vae = on_meta(cls)
    x = torch.empty(1, vae.in_channels, *[32] * vae.spatial_dims, device="meta")
    assert vae(x)[0].shape == x.shape


@pytest.mark.parametrize("make", TINY.values(), ids=TINY.keys())
def test_no_layer_of_another_dimension_hides_in_a_network(make):
    vae = make()
    wrong = (nn.Conv3d, nn.ConvTranspose3d) if vae.spatial_dims == 2 else (nn.Conv2d,)
    assert not any(isinstance(layer, wrong) for layer in vae.modules())


# ----------------------------------------------------------------------------------- APIs


def test_attention_resolutions_are_feature_map_sizes():
    def attended(**options):
        vae = on_meta(AutoencoderKL, mid_attention=False, **options)
        return [
            any(isinstance(layer, Attention) for layer in level)
            for level in list(vae.encoder.levels())[1:-2]
        ]

    assert attended(attn_resolutions=(32, 64)) == [False, False, True, True]
    assert attended(attn_resolutions=(16,), resolution=64) == [False, False, True, False]
    with pytest.raises(ValueError, match="for the downsample factor 8 write 32"):
        attended(attn_resolutions=(8,))
    with pytest.raises(ValueError, match="100 is no feature-map size"):
        attended(attn_resolutions=(100,))


def test_normalized_latents_come_back_denormalized():
    vae, x = AutoencoderKL(**SD).eval(), torch.randn(1, 1, 8, 12)
    assert AutoencoderKL.LATENT_SCALE == LATENT_SCALE == 0.18215
    z = vae.encode(x, normalize=True)
    torch.testing.assert_close(z, vae.encode(x).mean * LATENT_SCALE)
    torch.testing.assert_close(vae.decode(z, denorm=True), vae(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.encode_stage_2_inputs(x), z)


def test_single_z_tanh_and_attention_types():
    x = torch.randn(1, 1, 8, 8)
    single = AutoencoderKL(double_z=False, tanh_out=True, **SD)
    assert single.encoder[-1].out_channels == 4
    assert single(x)[0].abs().max() <= 1
    for kind, attentions in (("vanilla", 1), ("linear", 1), ("none", 0)):
        vae = AutoencoderKL(attn_type=kind, **SD)
        assert sum(isinstance(layer, Attention) for layer in vae.encoder) == attentions
        assert vae(x)[0].shape == x.shape


def test_monai_api_returns_what_monai_returns():
    config = {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 3,
        "channels": [4, 8],
        "norm_num_groups": 4,
        "attention_levels": [False, False],
    }
    vae, x = VAEModel.from_config(config), torch.randn(2, 1, 9, 8)
    recon, mean, std = vae(x)
    assert recon.shape == x.shape
    assert mean.shape == std.shape == (2, 3, 5, 4)
    assert compute_kl_loss(mean, std) > 0
    z = vae.encode_stage_2_inputs(x)
    assert vae.decode_stage_2_outputs(z).shape == (2, 1, 10, 8)
    torch.testing.assert_close(vae.reconstruct(x), vae.reconstruct(x))
    with pytest.raises(ValueError, match="unknown keys channel;"):
        VAEModel.from_config(config | {"channel": 3})
    with pytest.raises(ValueError, match="lacks spatial_dims"):
        VAEModel.from_config({k: v for k, v in config.items() if k != "spatial_dims"})
    with pytest.raises(ValueError, match="lacks latent_channels"):
        MaisiVAE.from_config({"spatial_dims": 3, "in_channels": 1, "out_channels": 1})


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_what_a_configuration_leaves_out_is_as_in_monai(spatial_dims):
    nets = pytest.importorskip("monai.networks.nets")
    assert set(VAEModel.__signature__.parameters) == set(
        inspect.signature(nets.AutoencoderKL).parameters
    )
    with torch.device("meta"):
        ours = VAEModel.from_config({"spatial_dims": spatial_dims})
        theirs = nets.AutoencoderKL(spatial_dims=spatial_dims)
    shapes = [
        {name: value.shape for name, value in state.items()}
        for state in (export_monai_state(ours), theirs.state_dict())
    ]
    assert shapes[0] == shapes[1]


def test_one_draw_of_the_global_generator_per_forward():
    vae, x = VAEModel(**MONAI), torch.randn(1, 1, 8, 8, 8)
    torch.manual_seed(4)
    _, mean, std = vae(x)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    z = mean + torch.randn_like(std) * std
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(4)
    assert torch.equal(vae.encode_stage_2_inputs(x), z)


def test_the_posterior_of_vae_model_is_monais_pair_and_ours():
    posterior = VAEModel(**MONAI).encode(torch.randn(1, 1, 8, 8, 8))
    mean, std = posterior
    assert posterior[0] is mean is posterior.mean
    torch.testing.assert_close(std, posterior.std)
    torch.testing.assert_close(posterior.kl("sum"), compute_kl_loss(mean, std))


def test_use_checkpoint_sets_checkpointing():
    assert MonaiVAE(use_checkpoint=True, **MONAI).encoder.checkpointing == "level"
    assert MonaiVAE(**MONAI).encoder.checkpointing == "none"


@pytest.mark.parametrize("make", TINY.values(), ids=TINY.keys())
def test_every_preset_trains_all_its_parameters(make):
    vae = make()
    x = torch.randn(2, 1, *(9, 12, 5)[: vae.spatial_dims])  # 9 and 5 are no multiples of 2
    recon = vae(x)[0]
    recon.square().mean().backward()
    assert recon.shape == x.shape
    assert all(p.grad is not None for p in vae.parameters())


# -------------------------------------------------------------------------------- recipes


def recipe(path):
    """The network that `train_3d.py --model path` builds."""

    def train(model: Callable[[], CustomVAE] = CustomVAE):
        """Train.

        Args:
            model: Network.
        """

    return parse(train, ["--model", str(path)])["model"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_complete_explained_and_builds(path):
    vae = on_meta(recipe(path))
    text = path.read_text()
    written = yaml.safe_load(text)["init_args"]
    assert set(written) == set(vae.spec["init_args"]) - set(vae.not_in_spec)
    lines = text.splitlines()
    keys = [n for n, line in enumerate(lines) if line.startswith("  ") and line[2] not in "# "]
    assert all(lines[n - 1].startswith("  #") for n in keys)
    on_meta(partial(build, vae.spec))


@pytest.mark.slow
@pytest.mark.parametrize("make", TINY.values(), ids=TINY.keys())
def test_every_preset_trains_and_comes_back_from_its_checkpoint(make, tmp_path):
    from loaders import DataConfig
    from train_3d import train_3d
    from vae3d.training.checkpoint import load_model

    (tmp_path / "data").mkdir()
    for n in range(3):
        np.save(tmp_path / "data" / f"{n}.npy", np.random.default_rng(n).random((16, 16, 16)))
    vae = make()
    train_3d(
        DataConfig(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")),
        str(tmp_path / "run"),
        make,
        patch_size=(8,) * vae.spatial_dims,
        max_steps=2,
        val_every=2,
        media_every=0,
        threads=0,
        wandb="disabled",
        device="cpu",
    )
    again = load_model(tmp_path / "run")
    vae.settle_linear_code()  # as training does
    assert type(again) is type(vae)
    assert again.spec == vae.spec


# --------------------------------------------------------------------------------- export


class Encode(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        posterior = self.vae.encode(x)
        return posterior.mean, posterior.std


class Decode(Encode):
    def forward(self, x):
        return (self.vae.decode(x),)


QUICK = ("MaisiVAE",)  # the others take several seconds each
EXPORTED = TINY | {
    "relative bias": partial(
        TINY["CustomVAE"],
        mid_attention=partial(GlobalAttention, num_heads=2, relative_position_bias=(4, 4, 4)),
    ),
    "linear attention": partial(TINY["CustomVAE"], mid_attention=LinearAttention),
    "windows": partial(
        TINY["CustomVAE"],
        mid_attention=partial(PatchAttention, window=2, shift=True, relative_position_bias=True),
    ),
}
HALVES = pytest.mark.parametrize("half", [Encode, Decode])


def export_for_any_size(net, device="cpu", window=1):
    """The exported half, and a function that makes inputs of a latent size in windows."""
    vae = net.vae
    encode = isinstance(net, Encode) and not isinstance(net, Decode)
    channels = vae.in_channels if encode else vae.latent_channels
    units = [window * (f if encode else 1) for f in vae.factor]
    sizes = {axis: unit * Dim(f"n{axis}", min=2, max=64) for axis, unit in enumerate(units, 2)}

    def make(*size):
        shape = (n * unit for n, unit in zip(size, units, strict=False))
        return torch.randn(1, channels, *shape, device=device)

    return export(net, (make(8, 8, 8),), dynamic_shapes=(sizes,)).module(), make


@HALVES
@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, make in EXPORTED.items()
    ],
)
def test_encoder_and_decoder_export_for_any_size(name, make, half):
    net = half(make().eval())
    exported, inputs = export_for_any_size(net, window=2 if name == "windows" else 1)
    for x in (inputs(5, 9, 6), inputs(3, 2, 4)):
        with torch.no_grad():
            for a, b in zip(exported(x), net(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@HALVES
def test_windows_export_for_a_size_that_they_do_not_divide(half):
    net = half(EXPORTED["windows"]().eval())
    x = torch.randn(1, 1, 14, 10, 6) if half is Encode else torch.randn(1, 4, 7, 5, 3)
    exported = export(net, (x,)).module()
    with torch.no_grad():
        for a, b in zip(exported(x), net(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@HALVES
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_exports_for_any_size(path, half):
    net = half(on_meta(recipe(path)).eval())
    exported, inputs = export_for_any_size(net, device="meta")
    x = inputs(3, 5, 4)
    for a, b in zip(exported(x), net(x), strict=True):
        assert a.shape == b.shape
