"""Weights move in and out: layouts, refusals, reports, 2D to 3D, folders and files."""

import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loaders import DataConfig
from vae3d.commands.convert import convert
from vae3d.commands.train import train_3d
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import NoNorm
from vae3d.models.presets import AutoencoderKL, MaisiVAE, MonaiVAE, T1LightVAE, VAEModel
from vae3d.training.checkpoint import load_checkpoint, load_model
from vae3d.weights.convert import (
    export_monai_state,
    export_state,
    inflate,
    load_weights,
    never_trained,
    read_model,
)
from vae3d.weights.hub import write_state
from vae3d.weights.layouts import COMPVIS, LAYOUTS
from vae3d.weights.rebuild import Hints

GROUPS = Hints(norm_num_groups=4)
MONAI = {
    "channels": (4, 8),
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "attention_levels": (False, True),
}
SD = {"base_ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4}


def shaken(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def same(a, b, x):
    with torch.no_grad():
        close(a(x)[0], b(x)[0])


def close(ours, theirs):
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


# ------------------------------------------------------------------------ CompVis reference


class CompVisBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, cin, 1e-6), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, cout, 1e-6), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class CompVisAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(4, c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class CompVisLinearAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.to_qkv, self.to_out = nn.Conv2d(c, 3 * c, 1, bias=False), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)
        context = k.softmax(dim=-1) @ v.transpose(1, 2)
        return self.to_out((context.transpose(1, 2) @ q).view_as(x))


ATTENTION = {"vanilla": CompVisAttention, "linear": CompVisLinearAttention, "none": None}


class Resample(nn.Module):
    def __init__(self, c, up, with_conv):
        super().__init__()
        self.up = up
        if with_conv:
            self.conv = nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x) if hasattr(self, "conv") else x
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class CompVisHalf(nn.Module):
    """Encoder or decoder with CompVis's names, written from the paper's description."""

    def __init__(self, cin, cout, widths, stem, blocks, attended, attn, decoder, with_conv):
        super().__init__()
        self.decoder, self.blocks = decoder, blocks
        levels = list(range(len(widths)))
        width = widths[-1] if decoder else stem
        self.conv_in = nn.Conv2d(cin, width, 3, padding=1)
        side = nn.ModuleList([nn.Module() for _ in levels])
        for level in reversed(levels) if decoder else levels:
            part = side[level]
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                part.block.append(CompVisBlock(width, widths[level]))
                width = widths[level]
                if level in attended and attn:
                    part.attn.append(attn(width))
            if decoder and level > 0:
                part.upsample = Resample(width, True, with_conv)
            if not decoder and level < levels[-1]:
                part.downsample = Resample(width, False, with_conv)
        self.mid = nn.Module()
        c = widths[-1]
        self.mid.block_1, self.mid.block_2 = CompVisBlock(c, c), CompVisBlock(c, c)
        self.mid.attn_1 = attn(c) if attn else nn.Identity()
        setattr(self, "up" if decoder else "down", side)
        self.norm_out = nn.GroupNorm(4, width, 1e-6)
        self.conv_out = nn.Conv2d(width, cout, 3, padding=1)

    def middle(self, h):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def forward(self, x):
        h = self.conv_in(x)
        h = self.middle(h) if self.decoder else h
        for part in reversed(self.up) if self.decoder else self.down:
            for n, block in enumerate(part.block):
                h = block(h)
                h = part.attn[n](h) if len(part.attn) else h
            for name in ("downsample", "upsample"):
                h = getattr(part, name)(h) if hasattr(part, name) else h
        h = h if self.decoder else self.middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class CompVisVAE(nn.Module):
    def __init__(
        self, widths=(4, 8), stem=4, attended=(), attn="vanilla", with_conv=True, z=3, e=2
    ):
        super().__init__()
        shared = (widths, stem)
        kind = ATTENTION[attn]
        self.encoder = CompVisHalf(1, 2 * z, *shared, 1, attended, kind, False, with_conv)
        self.decoder = CompVisHalf(z, 1, *shared, 2, attended, kind, True, with_conv)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * e, 1), nn.Conv2d(e, z, 1)

    def forward(self, x):
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return self.decoder(self.post_quant_conv(mean)), mean, logvar


COMPVIS_CONFIGS = {
    "plain": {},
    "attention at a level": {"attended": (1,)},
    "linear attention": {"attn": "linear", "attended": (1,)},
    "no attention": {"attn": "none"},
    "pooling": {"with_conv": False},
    "first level wider than the stem": {"widths": (8, 16)},
    "three levels": {"widths": (4, 8, 8), "attended": (2,)},
}


@pytest.mark.parametrize("options", COMPVIS_CONFIGS.values(), ids=COMPVIS_CONFIGS.keys())
def test_compvis_weights_give_compvis_numbers_and_go_back(options):
    theirs = shaken(CompVisVAE(**options))
    ours, report = read_model(theirs.state_dict(), GROUPS)
    assert report.layout == "CompVis"
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(2, 1, 16, 8)
    recon, posterior = ours(x)
    recon_theirs, mean, logvar = theirs(x)
    close(recon, recon_theirs)
    close(posterior.mean, mean)
    close(posterior.logvar, logvar)
    back = export_state(ours, COMPVIS)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


def test_from_ddconfig_equals_compvis(tmp_path):
    theirs = shaken(CompVisVAE(attended=(1,)))
    state = {f"first_stage_model.{k}": v for k, v in theirs.state_dict().items()}
    state["model.diffusion_model.w"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    ddconfig = {
        "ch": 4,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": [16],
        "resolution": 32,
        "z_channels": 3,
        "double_z": True,
        "in_channels": 1,
        "out_ch": 1,
        "dropout": 0.0,
        "attn_type": "vanilla",
        "resamp_with_conv": True,
    }
    ours = AutoencoderKL.from_ddconfig(
        ddconfig, embed_dim=2, ckpt_path=str(tmp_path / "sd.ckpt"), num_groups=4
    ).eval()
    same(ours, theirs, torch.randn(1, 1, 8, 12))
    assert ours.spec["init_args"].get("ckpt_path") is None
    torch.save(
        {"state_dict": state | {"first_stage_model.extra.w": torch.zeros(1)}}, tmp_path / "e"
    )
    options = {"embed_dim": 2, "ckpt_path": str(tmp_path / "e"), "num_groups": 4}
    with pytest.raises(ValueError, match=r"unexpected: extra\.w"):
        AutoencoderKL.from_ddconfig(ddconfig, **options)
    again = AutoencoderKL.from_ddconfig(ddconfig, ignore_keys=["extra."], **options)
    same(again.eval(), ours, torch.randn(1, 1, 8, 12))
    with pytest.raises(ValueError, match="unknown keys chh"):
        AutoencoderKL.from_ddconfig(ddconfig | {"chh": 3}, embed_dim=2)


# ------------------------------------------------------------------- GenerativeModels, MONAI


def as_generative_02(state, trained=False):
    """Names of GenerativeModels 0.2, with its `proj_attn` that no forward pass applies."""
    old = {}
    for name, value in state.items():
        name = name.replace(".attn.to_", ".to_").replace("postconv.", "conv.")
        old[name] = value
        if name.endswith(".to_v.weight"):
            layer = nn.Linear(*value.shape[::-1])
            old[name.replace("to_v", "proj_attn")] = layer.weight.detach() * (3 if trained else 1)
            old[name.replace("to_v.weight", "proj_attn.bias")] = layer.bias.detach()
    return old


def as_generative_01(state):
    """Names of GenerativeModels 0.1: attention made of 1x1 convolutions."""
    new = {"attn.to_q": "q.conv", "attn.to_k": "k.conv", "attn.to_v": "v.conv"}
    new |= {"attn.out_proj": "proj_out.conv", "postconv.conv": "conv.conv"}
    old = {}
    for name, value in state.items():
        pattern = "|".join(re.escape(key) for key in new)
        renamed = re.sub(pattern, lambda m: new[m[0]], name)
        attention = ".attn." in name and name.endswith("weight")
        old[renamed] = value[..., None, None, None] if attention else value
    return old


def monai_reference(**options):
    """MONAI's own network, and its state dict."""
    nets = pytest.importorskip("monai.networks.nets")
    config = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3}
    return shaken(nets.AutoencoderKL(**config, **MONAI, **options))


def test_generative_02_weights_compute_without_proj_attn():
    theirs = monai_reference(include_fc=False)
    ours, report = read_model(as_generative_02(theirs.state_dict()), GROUPS)
    assert report.layout == "GenerativeModels 0.2"
    assert any("proj_attn" in line and "never" in line for line in report.lines)
    x = torch.randn(1, 1, 8, 12, 16)
    with torch.no_grad():
        close(ours(x)[0], theirs.reconstruct(x))


def test_proj_attn_that_looks_trained_is_asked_about():
    state = as_generative_02(monai_reference(include_fc=False).state_dict(), trained=True)
    with pytest.raises(ValueError, match="--proj_attn drop"):
        read_model(state, GROUPS)
    dropped, _ = read_model(state, Hints(norm_num_groups=4, proj_attn="drop"))
    applied, _ = read_model(state, Hints(norm_num_groups=4, proj_attn="apply"))
    x = torch.randn(1, 1, 8, 8, 8)
    assert (dropped(x)[0] - applied(x)[0]).abs().max() > 0.01


def test_a_fresh_linear_layer_is_told_from_a_trained_one():
    for channels in (8, 64, 256):
        layer = nn.Linear(channels, channels)
        assert never_trained(layer.weight)
        assert not never_trained(layer.weight * 1.5)
        assert not never_trained(layer.weight * 0.5)


def test_generative_01_weights_compute_with_their_projection():
    theirs = monai_reference()
    ours, report = read_model(as_generative_01(theirs.state_dict()), GROUPS)
    assert report.layout == "GenerativeModels 0.1"
    x = torch.randn(1, 1, 8, 12, 16)
    with torch.no_grad():
        close(ours(x)[0], theirs.reconstruct(x))


def test_maisi_and_monai_weights_are_told_apart():
    maisi = MaisiVAE(num_channels=(4, 8), norm_num_groups=4, num_res_blocks=1)
    ours, report = read_model(export_monai_state(maisi), GROUPS)
    assert (report.layout, type(ours)) == ("MAISI", MaisiVAE)
    with pytest.raises(RuntimeError, match="Missing key"):
        MonaiVAE(
            channels=(4, 8),
            norm_num_groups=4,
            num_res_blocks=1,
            latent_channels=4,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        ).load_state_dict(export_monai_state(maisi))


# ------------------------------------------------------------------------------- refusals


def test_loading_is_strict_about_missing_unexpected_and_misshaped_keys():
    vae = VAEModel(**MONAI)
    state = export_monai_state(vae)
    first = next(iter(state))
    missing = {k: v for k, v in state.items() if k != first}
    with pytest.raises(RuntimeError, match="Missing key"):
        vae.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Missing key"):
        vae.load_state_dict({k: v for k, v in state.items() if not k.startswith("encoder")})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        vae.load_state_dict(state | {"decoder.blocks.99.conv.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        vae.load_state_dict(state | {first: torch.zeros(3, 3)})
    result = vae.load_state_dict(missing, strict=False)
    assert result.missing_keys == ["encoder.0.weight"]


def test_converting_names_every_key_that_does_not_fit(tmp_path):
    vae = AutoencoderKL(**SD)
    state = export_state(vae, COMPVIS)
    state["decoder.up.0.block.7.conv1.weight"] = state.pop("decoder.conv_out.bias")
    torch.save(state, tmp_path / "w.pt")
    pattern = "missing: decoder.conv_out.bias; unexpected: decoder.up.0.block.7.conv1.weight"
    with pytest.raises(ValueError, match=pattern):
        load_weights(vae, str(tmp_path / "w.pt"))
    with pytest.raises(
        ValueError,
        match=r"misshaped: .*encoder\.conv_in\.weight \(4, 2, 3, 3\), not \(4, 1, 3, 3\)",
    ):
        torch.save(export_state(AutoencoderKL(in_channels=2, **SD), COMPVIS), tmp_path / "v.pt")
        load_weights(vae, str(tmp_path / "v.pt"))


def test_discriminators_are_left_out_with_a_line(tmp_path):
    vae = shaken(AutoencoderKL(**SD))
    state = {f"module.{k}": v for k, v in export_state(vae, COMPVIS).items()}
    state["module.loss.discriminator.w"] = torch.zeros(2)
    ours, report = read_model({"state_dict": state, "epoch": 3}, GROUPS)
    assert "loss.discriminator.w" in "".join(report.lines)
    same(ours, vae, torch.randn(1, 1, 8, 8))


def test_the_number_of_groups_is_asked_for():
    state = export_monai_state(MonaiVAE(**MONAI))
    with pytest.raises(ValueError, match="--norm_num_groups"):
        read_model(state)


@pytest.mark.parametrize("layout", ["CompVis", "diffusers", "MONAI", "MAISI"])
def test_a_file_that_lacks_any_one_weight_is_refused(layout):
    vae = {
        "MONAI": partial(MonaiVAE, **MONAI),
        "MAISI": partial(MaisiVAE, num_channels=(4, 8), num_res_blocks=1, norm_num_groups=4),
    }.get(layout, partial(AutoencoderKL, attn_resolutions=(128,), **SD))()
    state = export_state(vae, LAYOUTS[layout])
    read_model(state, GROUPS)
    for name in state:
        with pytest.raises(ValueError) as error:
            read_model({k: v for k, v in state.items() if k != name}, GROUPS)
        assert "\n" not in str(error.value)


def test_bare_weights_of_ours_need_their_recipe(tmp_path):
    vae = AutoencoderKL(**SD)
    with pytest.raises(ValueError, match="without the recipe"):
        read_model(vae.state_dict())
    torch.save({k: v for k, v in vae.state_dict().items() if k != "encoder.0.bias"}, tmp_path / "w")
    with pytest.raises(ValueError, match=r"missing: encoder\.0\.bias"):
        load_weights(vae, str(tmp_path / "w"))


def below(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPINGS = {
    "ddp": partial(below, "module."),
    "compile": partial(below, "_orig_mod."),
    "compile in ddp": partial(below, "module._orig_mod."),
    "compiled halves": lambda state: {
        re.sub(r"^(encoder|decoder)\.", r"\1._orig_mod.", name): v for name, v in state.items()
    },
    "lightning": lambda state: {
        "state_dict": below("model.", state) | {"loss.scale.w": torch.ones(1)},
        "epoch": 3,
    },
    "net": partial(below, "net."),
    "autoencoder": lambda state: {"state_dict": below("autoencoder.", state), "epoch": 3},
    "a prefix of one's own": partial(below, "lab.vae_3d."),
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {0: {}}}},
    "number beside": lambda state: {**state, "scale_factor": torch.tensor(0.9)},
    "number beside the dictionary": lambda state: {"model": state, "scale_factor": torch.ones(1)},
}


@pytest.mark.parametrize("layout", ["vae3d", "MONAI", "diffusers"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_below_what_trainers_wrap_round_them(tmp_path, layout, wrapping):
    if layout == "diffusers":
        make, options = partial(AutoencoderKL, **SD), {"norm_num_groups": 4}
    else:
        make, options = partial(MonaiVAE, **MONAI), {"norm_num_groups": 4}
    vae = shaken(make())
    state = vae.state_dict() if layout == "vae3d" else export_state(vae, LAYOUTS[layout])
    path, out = tmp_path / "w.pt", tmp_path / "vae.pt"
    torch.save(WRAPPINGS[wrapping](state), path)
    filled = make()
    report = load_weights(filled, path)
    convert(path, out, **({"model": make} if layout == "vae3d" else options))
    for again in (filled.eval(), load_model(out)):
        same(again, vae, torch.randn(1, 1, *(8,) * vae.spatial_dims))
    if "number" in wrapping:
        assert "left out" in report.lines[0] and "scale_factor" in report.lines[0]


def test_weights_without_their_recipe_say_what_they_are_and_what_works(tmp_path, capsys):
    vae = shaken(MonaiVAE(**MONAI))
    path = tmp_path / "w.pt"
    torch.save(below("module.", vae.state_dict()), path)
    for refuse in (load_model, load_checkpoint, lambda path: convert(path, tmp_path / "vae.pt")):
        with pytest.raises(ValueError) as error:
            refuse(path)
        message = str(error.value)
        assert message.startswith(f"{path}: {len(vae.state_dict())} weights of vae3d without")
        assert f"vae3d convert {path} vae.pt --model" in message and "\n" not in message
    for suffix in ("pt", "safetensors"):
        write_state(tmp_path / f"monai.{suffix}", export_monai_state(vae))
        with pytest.raises(ValueError, match=f"weights of MONAI; .*vae3d convert .*monai.{suffix}"):
            load_checkpoint(tmp_path / f"monai.{suffix}")


def test_the_recipe_is_given_on_the_command_line(tmp_path, capsys):
    from vae3d.cli import main

    vae = shaken(CustomVAE(channels=(32, 32), num_res_blocks=1))
    torch.save(below("module.", vae.state_dict()), tmp_path / "w.pt")
    options = "--model CustomVAE --model.channels [32,32] --model.num_res_blocks 1"
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "vae.pt"), *options.split()])
    assert not stop.value.code, capsys.readouterr().err
    same(load_model(tmp_path / "vae.pt"), vae, torch.randn(1, 1, 8, 8, 8))


def test_two_networks_in_a_file_are_asked_about(tmp_path):
    vae = shaken(MonaiVAE(**MONAI))
    theirs = export_monai_state(vae)
    for number, state in enumerate(
        ({"model": theirs, "ema": theirs}, below("net.", theirs) | below("net_ema.", theirs))
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"holds 2 autoencoders .*--ignore_keys") as error:
            convert(path, tmp_path / "out", norm_num_groups=4)
        named = re.search(r"'\[(.*)\]'", str(error.value))[1]
        assert "ema" in named
        convert(path, tmp_path / f"out{number}", norm_num_groups=4, ignore_keys=(named,))
        same(load_model(tmp_path / f"out{number}"), vae, torch.randn(1, 1, 8, 8, 8))


def test_ignored_keys_are_named_as_in_the_file_or_without_its_prefixes():
    state = {
        f"first_stage_model.{k}": v for k, v in export_state(AutoencoderKL(**SD), COMPVIS).items()
    }
    state["first_stage_model.extra.w"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected: extra\.w"):
        read_model(state, GROUPS)
    for prefix in ("extra.", "first_stage_model.extra"):
        _, report = read_model(state, GROUPS, ignore_keys=(prefix,))
        assert "first_stage_model.extra.w" in report.lines[0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no known layout"):
        read_model({"layer1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="no weights of an autoencoder"):
        read_model({"epoch": 3})


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_is_refused_in_one_line(tmp_path, capsys):
    torch.save({"w": Code()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="refused") as error:
        convert(tmp_path / "evil.pt", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "must never run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_the_users_mistake(tmp_path):
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match=name):
            convert(tmp_path / name, tmp_path / "out")


def test_flipped_bits_in_a_file_of_weights_are_found(tmp_path):
    torch.save({"w": torch.zeros(5000)}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt: .*the checksum of its entry"):
        convert(tmp_path / "w.pt", tmp_path / "out")


def test_configurations_of_other_networks_are_refused(tmp_path):
    for text, message in (
        ("{", "not JSON"),
        ('{"_class_name": "VQModel"}', "is of a VQModel"),
        ('{"_class_name": "AutoencoderKL", "act_fn": "gelu"}', "act_fn gelu"),
        ('{"_class_name": "AutoencoderKL"}', "none of diffusion_pytorch_model"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path, tmp_path / "out")


# -------------------------------------------------------------------------------- command


def test_monai_to_ours_and_back_through_files(tmp_path, capsys):
    vae = shaken(MonaiVAE(**MONAI))
    torch.save(export_monai_state(vae), tmp_path / "monai.pt")
    convert(tmp_path / "monai.pt", tmp_path / "ours", norm_num_groups=4)
    assert "MONAI weights" in capsys.readouterr().out
    x = torch.randn(1, 1, 8, 12, 8)
    same(CustomVAE.from_pretrained(tmp_path / "ours"), vae, x)
    convert(tmp_path / "ours", tmp_path / "back.safetensors", to="monai")
    convert(tmp_path / "back.safetensors", tmp_path / "again", norm_num_groups=4)
    same(CustomVAE.from_pretrained(tmp_path / "again"), vae, x)
    with pytest.raises(ValueError, match="exists"):
        convert(tmp_path / "monai.pt", tmp_path / "ours", norm_num_groups=4)


def test_diffusers_folders_carry_their_configuration(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = shaken(
        diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            scaling_factor=0.3,
            shift_factor=0.1,
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = CustomVAE.from_pretrained(tmp_path / "ours")
    assert (ours.latent_scale, ours.latent_shift) == (0.3, 0.1)
    x = torch.randn(1, 3, 8, 12)
    latent = theirs.encode(x).latent_dist.mean
    torch.testing.assert_close(ours.encode(x, normalize=True), (latent - 0.1) * 0.3)
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(back.decode(latent).sample, ours.decode(latent))


@pytest.mark.slow
def test_a_converted_checkpoint_is_one_that_evaluate_takes(tmp_path):
    from evaluate import evaluate

    vae = shaken(T1LightVAE(num_channels=(4, 8), norm_num_groups=4))
    torch.save(export_monai_state(vae), tmp_path / "maisi.pt")
    convert(tmp_path / "maisi.pt", tmp_path / "vae.pt", norm_num_groups=4)
    same(load_model(tmp_path / "vae.pt"), vae, torch.randn(1, 1, 8, 8, 8))
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", np.random.default_rng(0).random((16, 12, 20)))
    evaluate(
        str(tmp_path / "vae.pt"),
        str(tmp_path / "data"),
        str(tmp_path / "out"),
        mode="full",
        media=False,
    )
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2


def test_generative_models_transposed_convolutions_have_kernel_3():
    theirs = monai_reference(include_fc=False, use_convtranspose=True)
    up = next(i for i, b in enumerate(theirs.decoder.blocks) if hasattr(b, "deconv"))
    theirs.decoder.blocks[up] = nn.Sequential()
    kernel_3 = nn.ConvTranspose3d(8, 8, 3, 2, padding=1, output_padding=1)
    theirs.decoder.blocks[up].deconv = kernel_3
    state = {k.replace(".deconv.", ".conv.conv."): v for k, v in theirs.state_dict().items()}
    hints = Hints(norm_num_groups=4, use_convtranspose=True)
    ours, _ = read_model(as_generative_02(state), hints)
    x = torch.randn(1, 1, 8, 12, 16)
    with torch.no_grad():
        close(ours(x)[0], theirs.reconstruct(x))


def test_attention_of_old_diffusers_is_renamed():
    diffusers = pytest.importorskip("diffusers")
    theirs = shaken(diffusers.AutoencoderKL(in_channels=1, out_channels=1, norm_num_groups=4))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = "|".join(map(re.escape, old))
    state = {re.sub(pattern, lambda m: old[m[0]], k): v for k, v in theirs.state_dict().items()}
    assert any(".query." in name for name in state)
    ours, _ = read_model(state, GROUPS)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(x).latent_dist.mean).sample
        torch.testing.assert_close(ours(x)[0], expected, rtol=0, atol=1e-4)


def test_what_weights_of_ours_say_themselves_is_not_to_be_said(tmp_path):
    vae = MonaiVAE(**MONAI)
    vae.save_pretrained(tmp_path / "a")
    write_state(tmp_path / "w.pt", vae.state_dict())
    for option in ({"norm_num_groups": 4}, {"proj_attn": "drop"}, {"latent_scale": 2.0}):
        (name,) = option
        with pytest.raises(ValueError, match=f"leave out --{name}; .*/a is of vae3d and says it"):
            convert(tmp_path / "a", tmp_path / "out", **option)
        with pytest.raises(ValueError, match=f"leave out --{name}; --model says it"):
            convert(tmp_path / "w.pt", tmp_path / "out", model=partial(MonaiVAE), **option)
    with pytest.raises(ValueError, match=r"--ignore_keys: .*/a is of vae3d"):
        convert(tmp_path / "a", tmp_path / "out", ignore_keys=("quant_conv",))
    convert(tmp_path / "a", tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"missing: quant_conv\.bias"):
        load_weights(vae, tmp_path / "a.pt", ignore_keys=("quant_conv.bias",))
    assert not (tmp_path / "out").exists()


def test_2d_weights_become_a_3d_network_on_the_command_line(tmp_path):
    vae = shaken(AutoencoderKL(**SD))
    torch.save(export_state(vae, COMPVIS), tmp_path / "sd.pt")
    convert(tmp_path / "sd.pt", tmp_path / "volume", norm_num_groups=4, inflate="center")
    assert CustomVAE.from_pretrained(tmp_path / "volume").factor == (2, 2, 2)
    with pytest.raises(ValueError, match="only a 2D network"):
        convert(tmp_path / "volume", tmp_path / "again", inflate="mean")


def test_what_the_target_library_has_not_is_refused_and_nothing_is_written(tmp_path):
    CustomVAE(channels=(32,), num_res_blocks=1).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="not MONAI's network"):
        convert(tmp_path / "ours", tmp_path / "monai.pt", to="monai")
    with pytest.raises(ValueError, match="2D AutoencoderKL"):
        convert(tmp_path / "ours", tmp_path / "diffusers", to="diffusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


# ------------------------------------------------------------------------- starting from weights


def test_load_model_takes_a_folder_of_save_pretrained(tmp_path):
    vae = shaken(T1LightVAE(num_channels=(4, 8), norm_num_groups=4))
    vae.save_pretrained(tmp_path / "t1")
    again = load_model(tmp_path / "t1")
    assert type(again) is T1LightVAE
    assert not again.training
    same(again, vae, torch.randn(1, 1, 8, 8, 8))


def test_weights_that_do_not_fit_their_recipe_are_told_in_one_line(tmp_path):
    vae = MonaiVAE(**MONAI)
    state = vae.state_dict() | {"extra": torch.zeros(1), "decoder.0.bias": torch.zeros(3)}
    del state["encoder.0.bias"]
    vae.save_pretrained(tmp_path / "folder")
    write_state(tmp_path / "folder" / "model.safetensors", state)
    torch.save(
        {"format": 1, "step": 0, "spec": vae.spec, "model": state, "ema": None}, tmp_path / "c.pt"
    )
    for path in (tmp_path / "folder", tmp_path / "c.pt"):
        with pytest.raises(ValueError) as error:
            load_model(path)
        assert re.search(
            r"do not fit this network: missing: encoder\.0\.bias; unexpected: extra;"
            r" misshaped: decoder\.0\.bias \(3,\), not \(8,\)$",
            str(error.value),
        )


def test_2d_weights_in_a_3d_network_are_told_how_to_become_3d(tmp_path):
    torch.save(export_state(AutoencoderKL(**SD), COMPVIS), tmp_path / "sd.ckpt")
    with pytest.raises(ValueError, match="vae3d convert --inflate center"):
        AutoencoderKL(spatial_dims=3, ckpt_path=str(tmp_path / "sd.ckpt"), **SD)


@pytest.fixture
def training(tmp_path):
    """`train_3d` on three tiny volumes at a learning rate of zero, so that weights stay."""
    from train_3d import train_3d

    (tmp_path / "data").mkdir()
    for n in range(3):
        volume = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(n))
        np.save(tmp_path / "data" / f"{n}.npy", volume.numpy())
    return partial(
        train_3d,
        DataConfig(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")),
        str(tmp_path / "run"),
        patch_size=(8, 8, 8),
        lr=0.0,
        val_every=0,
        media_every=0,
        threads=0,
        wandb="disabled",
        device="cpu",
    )


@pytest.mark.parametrize("source", ["MONAI", "checkpoint", "folder"])
def test_training_starts_from_weights_and_resumes_without_them(training, tmp_path, source):
    vae = shaken(MonaiVAE(**MONAI))
    start = (
        tmp_path / {"MONAI": "monai.safetensors", "checkpoint": "vae.pt", "folder": "vae"}[source]
    )
    if source == "MONAI":
        write_state(start, export_monai_state(vae))
    else:
        vae.save_pretrained(tmp_path / "saved")
        convert(tmp_path / "saved", start)
    training(model=partial(MonaiVAE, **MONAI), init_from=str(start), max_steps=1)
    checkpoint = load_checkpoint(tmp_path / "run")
    for name, value in vae.state_dict().items():
        assert torch.equal(checkpoint["model"][name], value)
        assert torch.equal(checkpoint["ema"][name], value)
    shutil.rmtree(start) if start.is_dir() else start.unlink()
    training(model=partial(MonaiVAE, **MONAI), init_from=str(start), max_steps=2)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 2


def test_training_tells_what_it_left_out_of_its_start(training, tmp_path, capsys):
    state = below("module.", MonaiVAE(**MONAI).state_dict())
    torch.save({"model": state, "scale_factor": torch.ones(1)}, tmp_path / "w.pt")
    training(model=partial(MonaiVAE, **MONAI), init_from=str(tmp_path / "w.pt"), max_steps=1)
    assert "left out, beside the weights (1): scale_factor" in capsys.readouterr().out


def test_a_start_that_does_not_fit_or_is_missing_is_told_in_one_line(training, tmp_path):
    write_state(tmp_path / "w.pt", export_monai_state(MonaiVAE(**MONAI | {"latent_channels": 2})))
    for path, message in (
        (tmp_path / "w.pt", "misshaped: decoder.blocks.0.conv.weight"),
        (tmp_path / "none.pt", "no such checkpoint"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            training(model=partial(MonaiVAE, **MONAI), init_from=str(path), max_steps=1)
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("**/*.pt"))


def test_a_run_forced_on_with_another_network_is_told_in_one_line(training):
    training(model=partial(MonaiVAE, **MONAI), max_steps=1)
    other = MONAI | {"latent_channels": 2}
    with pytest.raises(ValueError, match="weights of the checkpoint do not fit") as error:
        training(model=partial(MonaiVAE, **other), max_steps=2, force=True)
    assert "misshaped: decoder.0.weight" in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- 2D to 3D


@pytest.mark.parametrize("options", [{}, {"attn_resolutions": (128,)}, {"resamp_with_conv": False}])
def test_a_volume_constant_along_the_new_axis_reproduces_the_2d_result(options):
    flat = shaken(AutoencoderKL(**SD, **options))
    volume = inflate(flat)
    x = torch.randn(1, 1, 12, 8)
    with torch.no_grad():
        recon, posterior = flat(x)
        recon_3d, posterior_3d = volume(x[..., None].expand(-1, -1, -1, -1, 6))
    for a, b in ((recon, recon_3d), (posterior.mean, posterior_3d.mean)):
        torch.testing.assert_close(b, a[..., None].expand_as(b), rtol=0, atol=1e-4)


def test_mean_inflation_reproduces_the_2d_result_away_from_the_new_faces():
    flat = shaken(CustomVAE(spatial_dims=2, channels=(4, 4), norm=NoNorm))
    volume = inflate(flat, "mean")
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        a, b = flat(x)[0], volume(x[..., None].expand(-1, -1, -1, -1, 120))[0]
    torch.testing.assert_close(b[..., 60], a, rtol=0, atol=1e-4)
    assert (b[..., 0] - a).abs().max() > 1e-3


def test_a_missing_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json of vae3d there"):
        CustomVAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        convert(tmp_path / "missing", tmp_path / "out")


def test_save_pretrained_pushes_to_the_hub_through_its_mixin(tmp_path, monkeypatch):
    import huggingface_hub.hub_mixin

    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **options):
            pushed.update(options, files=sorted(p.name for p in folder_path.iterdir()))

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    vae = T1LightVAE(num_channels=(4, 8), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "t1", push_to_hub=True, repo_id="me/t1")
    assert pushed["repo_id"] == "me/t1"
    assert {"config.json", "model.safetensors"} <= set(pushed["files"])


def test_names_of_monai_load_into_a_nested_model():
    outer = nn.ModuleDict({"vae": VAEModel(**MONAI)})
    state = {f"vae.{k}": v for k, v in export_monai_state(shaken(VAEModel(**MONAI))).items()}
    outer.load_state_dict(state)
    back = export_monai_state(outer["vae"])
    assert all(torch.equal(back[k.removeprefix("vae.")], v) for k, v in state.items())


def test_from_pretrained_builds_what_was_saved_and_checks_its_class(tmp_path):
    vae = shaken(T1LightVAE(num_channels=(4, 8), norm_num_groups=4))
    vae.save_pretrained(tmp_path / "t1")
    again = CustomVAE.from_pretrained(tmp_path / "t1")
    assert type(again) is T1LightVAE
    assert not again.training
    same(again, vae, torch.randn(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="not a AutoencoderKL"):
        AutoencoderKL.from_pretrained(tmp_path / "t1")


def test_init_from_leaves_out_what_ignore_keys_names_and_says_so(tmp_path):
    source, target = CustomVAE(channels=(32,)), CustomVAE(channels=(32,))
    write_state(tmp_path / "w.safetensors", source.state_dict())
    before = {name: value.clone() for name, value in target.state_dict().items()}
    keep = ("quant_conv", "decoder.*.bias")
    report = load_weights(target, tmp_path / "w.safetensors", keep=keep)
    kept = {n for n in before if n.startswith("quant_conv") or re.match(r"decoder\..*\.bias", n)}
    for name, value in target.state_dict().items():
        wanted = before if name in kept else source.state_dict()
        assert torch.equal(value, wanted[name]), name
    (line,) = report.lines
    assert re.match(rf"kept as they are in the network \({len(kept)}\): decoder\.0\.bias, ", line)
    assert len(kept) > 5 and line.count("bias") == 5 and line.endswith(", ...")
    with pytest.raises(ValueError, match=r"--ignore_keys nothing: no weight is called that"):
        load_weights(target, tmp_path / "w.safetensors", keep=("nothing",))


def test_ignore_keys_names_the_networks_weights_whatever_the_layout(tmp_path):
    theirs, ours = shaken(MonaiVAE(**MONAI)), MonaiVAE(**MONAI)
    write_state(tmp_path / "monai.safetensors", export_monai_state(theirs))
    before = ours.state_dict()["post_quant_conv.weight"].clone()
    report = load_weights(ours, tmp_path / "monai.safetensors", keep=("post_quant_conv",))
    assert torch.equal(ours.state_dict()["post_quant_conv.weight"], before)
    first = "encoder.0.weight"
    assert torch.equal(ours.state_dict()[first], theirs.state_dict()[first])
    assert any("post_quant_conv.weight" in line for line in report.lines)


def test_ignore_keys_lets_a_network_of_another_width_begin_with_the_rest(tmp_path):
    """Two channels instead of one: the first and the last convolution are new."""
    source, wide = CustomVAE(channels=(32,)), CustomVAE(channels=(32,), in_channels=2)
    write_state(tmp_path / "w.safetensors", source.state_dict())
    with pytest.raises(ValueError, match="misshaped"):
        load_weights(wide, tmp_path / "w.safetensors")
    last = len(wide.decoder) - 1
    load_weights(wide, tmp_path / "w.safetensors", keep=("encoder.0.", f"decoder.{last}."))
    assert torch.equal(wide.state_dict()["quant_conv.bias"], source.state_dict()["quant_conv.bias"])


@pytest.mark.slow
def test_a_linear_code_that_ignore_keys_leaves_out_begins_at_the_components(training, tmp_path):
    """As that of a new network: weights at random would spoil what the others learned."""
    model = partial(CustomVAE, channels=(32,), latent_channels=2, factors=[(2, 2, 2)])
    training(model=model, max_steps=1)
    first = (tmp_path / "run").rename(tmp_path / "first")
    training(model=model, max_steps=1, init_from=str(first), ignore_keys=("linear_code",))
    fitted, again = (load_model(p).linear_code.state_dict() for p in (first, tmp_path / "run"))
    assert all(torch.allclose(again[name], fitted[name], atol=1e-6) for name in fitted)


def test_training_tells_which_weights_it_did_not_take(training, tmp_path, capsys):
    write_state(tmp_path / "w.pt", MonaiVAE(**MONAI).state_dict())
    options = dict(model=partial(MonaiVAE, **MONAI), init_from=str(tmp_path / "w.pt"), max_steps=1)
    training(**options, ignore_keys=("quant_conv",))
    told = capsys.readouterr().out
    assert "kept as they are in the network (2): quant_conv.bias, quant_conv.weight" in told
    with pytest.raises(ValueError, match=r"--ignore_keys \['x'\] needs --init_from"):
        train_3d("d", str(tmp_path / "other"), ignore_keys=("x",))
