"""`vae3d export`: programs of torch.export and ONNX give the network's numbers without vae3d."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from toys import tiny_vae

from vae3d.commands.export import export
from vae3d.inference.export import CONTRACT, compare, export_programs
from vae3d.models.attention import GlobalAttention, PatchAttention
from vae3d.models.downsample import HaarDown
from vae3d.models.presets import MonaiVAE
from vae3d.models.upsample import HaarUp


def numbers(vae, seed=0):
    """Random weights everywhere, so that no part is silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vae


@pytest.mark.slow
def test_a_folder_is_read_without_vae3d_and_agrees_at_other_sizes(tmp_path, capsys):
    vae = numbers(tiny_vae(linear_code=True, latent_scale=0.5))
    vae.contract = {"preprocess": {"intensity": "symmetric"}, "patch_size": [8, 4, 8]}
    vae.save_pretrained(tmp_path / "hub")
    export(str(tmp_path / "hub"), tmp_path / "out", formats=("torch",))
    assert "encoder.pt2: any size" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / CONTRACT).read_text())
    assert told["preprocess"] == {"intensity": "symmetric"} and told["factor"] == [2, 2, 2]
    assert told["latent_scale"] == 0.5
    x = torch.rand(3, 1, 12, 8, 10)
    posterior = vae.eval().encode(x)
    recon = vae.decode(posterior.mean)
    np.save(tmp_path / "x.npy", x.numpy())
    foreign = """
import sys, numpy, torch
sys.modules["vae3d"] = None
x = torch.from_numpy(numpy.load("x.npy"))
mean, logvar = torch.export.load("out/encoder.pt2").module()(x)
(recon,) = torch.export.load("out/decoder.pt2").module()(mean)
numpy.savez("theirs.npz", mean=mean.detach(), logvar=logvar.detach(), recon=recon.detach())
"""
    subprocess.run([sys.executable, "-c", foreign], cwd=tmp_path, check=True)
    theirs = np.load(tmp_path / "theirs.npz")
    for name, ours in {"mean": posterior.mean, "logvar": posterior.logvar, "recon": recon}.items():
        assert np.allclose(theirs[name], ours.detach().numpy(), atol=1e-5), name


def test_a_program_with_other_numbers_is_refused():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3))
    network.requires_grad_(False)
    x = torch.rand(2, 3)

    class Pair(torch.nn.Module):
        def forward(self, x):
            return (network(x),)

    assert compare("a.onnx", Pair(), lambda x: (network(x),), x) == 0
    with pytest.raises(ValueError, match=r"a\.onnx: differs from the network"):
        compare("a.onnx", Pair(), lambda x: (network(x) * 1.01,), x)
    with pytest.raises(ValueError, match=r"a\.onnx: gives"):
        compare("a.onnx", Pair(), lambda x: (network(x)[:1],), x)


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path):
    vae = tiny_vae()
    with pytest.raises(ValueError, match="no multiple of the model's factor"):
        export_programs(vae, tmp_path / "out", ["torch"], (8, 8, 9))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists"):
        export("nowhere", tmp_path / "taken")
    with pytest.raises(ValueError, match="formats is empty"):
        export("nowhere", tmp_path / "out", formats=())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


NETWORKS = {
    "haar": (lambda: tiny_vae(down=HaarDown, up=HaarUp), (16, 8, 12), "free"),
    "global attention": (lambda: tiny_vae(mid_attention=GlobalAttention), (8, 8, 12), "free"),
    "windows": (
        lambda: tiny_vae(mid_attention=partial(PatchAttention, window=2)), (8, 8, 12), "fixed",
    ),
    "2D": (lambda: tiny_vae(spatial_dims=2, in_channels=3), (16, 8), "free"),
    "anisotropic": (lambda: tiny_vae(factors=((1, 2, 2), (2, 2, 1))), (8, 8, 8), "free"),
    "MONAI": (
        lambda: MonaiVAE(spatial_dims=3, channels=(4, 8), num_res_blocks=1, latent_channels=3,
                         norm_num_groups=4, attention_levels=(False, True)),
        (8, 8, 12), None,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_is_exported_or_refused_by_name(tmp_path, name):
    make, size, sizes = NETWORKS[name]
    import onnxruntime

    vae = numbers(make())
    told = export_programs(vae, tmp_path / "out", ["torch", "onnx"], size)
    for file, program in told.items():
        assert program["largest_difference"] <= 1e-4, file
        assert sizes is None or program["sizes"] == sizes, file
    session = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx")
    x = torch.rand(1, vae.in_channels, *size)
    mean, _ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(mean, vae.encode(x).mean.numpy(), atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        CONTRACT, "decoder.onnx", "decoder.pt2", "encoder.onnx", "encoder.pt2",
    ]  # fmt: skip
