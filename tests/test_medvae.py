"""MedVAE's weights: its networks compute what ours do of them, 2D and 3D, and take ours back."""

import importlib
import importlib.util
import re
import sys

import pytest
import torch

from vae3d.commands.convert import convert
from vae3d.models.presets import AutoencoderKL, MonaiVAE
from vae3d.training.checkpoint import load_model
from vae3d.weights.convert import export_compvis, export_state, load_weights, read_model
from vae3d.weights.layouts import COMPVIS, MEDVAE
from vae3d.weights.rebuild import Hints

GROUPS = Hints(norm_num_groups=2)
TINY = {"base_ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 2, "z_channels": 3}
DDCONFIG = {
    "ch": 32,
    "out_ch": 1,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 1,
    "resolution": 32,
    "z_channels": 3,
    "double_z": True,
}


@pytest.fixture
def medvae(monkeypatch):
    """MedVAE's modules by name, without its `__init__`, whose libraries its networks need not."""
    spec = importlib.util.find_spec("medvae")
    if spec is None:
        pytest.skip("pip install --no-deps medvae")
    monkeypatch.setitem(sys.modules, "medvae", importlib.util.module_from_spec(spec))
    return lambda name: importlib.import_module(f"medvae.{name}")


def shaken(net):
    """All weights away from their start, where low-rank updates are zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def close(ours, theirs):
    """Each tensor within 1e-5 of the largest value."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", ["2D", "2D with low-rank updates", "3D"])
def test_medvaes_weights_give_its_numbers_and_go_back(medvae, tmp_path, name):
    networks = medvae("models")
    network = networks.AutoencoderKL_3D if name == "3D" else networks.AutoencoderKL_2D
    theirs = network(DDCONFIG, embed_dim=2)
    if "low-rank" in name:
        tuned = {"ResnetBlock", "AttnBlock"}
        medvae("utils.lora").inject_trainable_lora_extended(theirs, tuned, r=4)
    torch.save({"state_dict": shaken(theirs).state_dict(), "epoch": 3}, tmp_path / "vae.ckpt")
    convert(tmp_path / "vae.ckpt", tmp_path / "ours.pt")
    ours = load_model(tmp_path / "ours.pt")
    convert(tmp_path / "ours.pt", tmp_path / "back.ckpt", to="compvis")
    again = network(DDCONFIG, embed_dim=2, apply_channel_ds=False).eval()
    written = torch.load(tmp_path / "back.ckpt")
    again.load_state_dict(written["state_dict"], strict=True)
    x = torch.rand(1, 1, *(16, 8, 12)[: 3 if name == "3D" else 2])
    with torch.no_grad():
        posterior = theirs.encode(x)
        z, logvar, recon = posterior.mode(), posterior.logvar, theirs.decode(posterior.mode())
        mine, other = ours.encode(x), again.encode(x)
        close([mine.mean, mine.logvar, ours.decode(z)], [z, logvar, recon])
        close([other.mode(), other.logvar, again.decode(z)], [z, logvar, recon])
    built = network(written["ddconfig"], written["embed_dim"], apply_channel_ds=False)
    assert str(built) == str(again)


def as_medvae(vae, tuned=True):
    """Weights of ours under MedVAE's names, with what it holds beside the autoencoder."""
    state = dict(export_state(vae, COMPVIS))
    layers = [
        name.removesuffix(".weight")
        for name in state
        if re.search(r"\.(conv[12]|nin_shortcut|q|k|v|proj_out)\.weight", name) and tuned
    ]
    for layer in layers:
        whole = state.pop(f"{layer}.weight")
        up = torch.randn(whole.shape[0], 2, *(1,) * (whole.dim() - 2))
        down = torch.randn(2, *whole.shape[1:])
        added = torch.stack([(up[:, r].unsqueeze(1) * down[r]).squeeze(1) for r in (0, 1)]).sum(0)
        state[f"{layer}.conv.weight"] = whole - added
        state[f"{layer}.conv.bias"] = state.pop(f"{layer}.bias")
        state[f"{layer}.lora_up.weight"], state[f"{layer}.lora_down.weight"] = up, down
    kernel = (1,) * vae.spatial_dims
    for name in ("channel_ds.0", "channel_ds.2", "channel_ds.4", "channel_proj"):
        state[f"{name}.weight"] = torch.randn(4, 4, *kernel)
    return state


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("tuned", [False, True])
def test_low_rank_updates_are_added_and_what_only_classifies_is_left_out(spatial_dims, tuned):
    vae = shaken(AutoencoderKL(**TINY, spatial_dims=spatial_dims))
    ours, report = read_model(as_medvae(vae, tuned), GROUPS)
    assert report.layout == "MedVAE" and type(ours) is AutoencoderKL
    assert "left out, features of a latent" in report.lines[0] and "channel_ds.0" in report.lines[0]
    assert report.lines[1:-1] == ["low-rank updates added to their convolutions (30)"] * tuned
    x = torch.rand(1, 1, *(8,) * spatial_dims)
    close(ours(x)[:1], vae(x)[:1])


def test_medvaes_weights_start_a_network_below_any_prefix(tmp_path):
    vae = shaken(AutoencoderKL(**TINY))
    state = {f"module.model.{name}": value for name, value in as_medvae(vae).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vae.ckpt")
    filled = AutoencoderKL(**TINY).eval()
    assert load_weights(filled, tmp_path / "vae.ckpt").layout == MEDVAE.name
    x = torch.rand(1, 1, 8, 8)
    close(filled(x)[:1], vae(x)[:1])


def test_a_low_rank_update_that_is_incomplete_or_of_another_layer_is_named():
    state = as_medvae(AutoencoderKL(**TINY))
    layer = "decoder.mid.attn_1.q"
    for part in ("lora_up", "lora_down", "conv"):
        name = f"{layer}.{part}.weight"
        with pytest.raises(ValueError, match=re.escape(layer)):
            read_model({k: v for k, v in state.items() if k != name}, GROUPS)
        for wrong in (torch.zeros(()), torch.zeros(3), torch.zeros(3, 5, 1, 1), torch.zeros(8, 8)):
            with pytest.raises(ValueError, match=re.escape(layer)):
                read_model(state | {name: wrong}, GROUPS)


def test_what_compvis_cannot_build_is_not_written_for_it(tmp_path):
    for vae, told in (
        (MonaiVAE(channels=(4, 8), norm_num_groups=4), "MonaiVAE is not CompVis's network"),
        (AutoencoderKL(**TINY), "num_groups=2"),
        (AutoencoderKL(base_ch=32, ch_mult=(1,), use_quant_conv=False), "use_quant_conv=False"),
        (AutoencoderKL(base_ch=32, ch_mult=(1,), mid_attention=False), "attention"),
    ):
        vae.save_pretrained(tmp_path / "vae")
        with pytest.raises(ValueError, match=told):
            convert(tmp_path / "vae", tmp_path / "out.ckpt", to="compvis")
    with pytest.raises(ValueError, match=r"--to compvis writes a \.ckpt file"):
        convert(tmp_path / "vae", tmp_path / "out.pt", to="compvis")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae"]


def test_a_checkpoint_for_compvis_builds_the_network_again():
    vae = shaken(AutoencoderKL(base_ch=32, ch_mult=(1, 1), resolution=32, attn_resolutions=(16,)))
    written = export_compvis(vae)
    again = AutoencoderKL.from_ddconfig(written["ddconfig"], written["embed_dim"])
    assert again.spec["init_args"] == vae.spec["init_args"] | {"out_channels": 1}
