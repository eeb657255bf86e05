"""Weights with their contract: folders of save_pretrained, the hub's cache, files to latents."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from toys import tiny_vae

import vae3d
from loaders import Preprocess, Volume, read_volume, write_volume
from vae3d.commands.convert import convert
from vae3d.commands.decode import decode
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.commands.sample import sample
from vae3d.models.posterior import LogVarianceHead
from vae3d.stage2.latents import read_latent
from vae3d.training.checkpoint import checkpoint_of, load_model, load_vae, write_atomic

NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
PREPARED = Preprocess(percentiles=(0.0, 100.0), intensity="symmetric")


def trained_vae(**options):
    """A network that knows how its volumes are prepared."""
    vae = tiny_vae(**options).eval()
    vae.contract = {
        "preprocess": PREPARED.to_dict(),
        "data": {"nan": "fill"},
        "patch_size": [8, 8, 8],
        "step": 1200,
        "subjects": 40,
        "measured": {"best val/mae": 0.0123},
        "license": "cc-by-4.0",
    }
    return vae


@pytest.fixture
def scans(tmp_path):
    """Two scans in LPS with voxels of 1 x 2 x 1.5 mm and intensities of hundreds."""
    affine = np.array([[-1, 0, 0, 90], [0, -2, 0, 40], [0, 0, 1.5, -7], [0, 0, 0, 1.0]])
    folder = tmp_path / "scans"
    for n in range(2):
        data = 900 * np.random.default_rng(n).random((1, 9, 12, 7), np.float32) - 100
        write_volume(folder / f"{n}.nii.gz", Volume(data, affine))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a folder into the hub's cache, as a download would have; nothing can be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_OFFLINE", True)

    def put(repo, folder):
        commit = "0" * 40
        home = cache / f"models--{repo.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        shutil.copytree(folder, home / "snapshots" / commit)

    return put


def test_the_contract_travels_through_folders_and_checkpoints(tmp_path):
    vae = trained_vae()
    vae.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert Preprocess.from_dict(config["preprocess"]) == PREPARED
    convert(tmp_path / "a", tmp_path / "b.pt")
    convert(tmp_path / "b.pt", tmp_path / "c")
    for again in (
        load_model(tmp_path / "b.pt"),
        load_model(tmp_path / "c"),
        load_model(tmp_path / "c" / "model.safetensors"),
        vae3d.CustomVAE.from_pretrained(tmp_path / "c"),
    ):
        assert again.contract == vae.contract
        assert all(map(torch.equal, again.state_dict().values(), vae.state_dict().values()))
    other = Preprocess(intensity="zscore")
    convert(tmp_path / "b.pt", tmp_path / "d", preprocess=other)
    assert load_model(tmp_path / "d").contract["preprocess"] == other.to_dict()


def test_a_run_tells_its_contract(tmp_path):
    vae = tiny_vae()
    state = checkpoint_of(vae.spec, vae.state_dict(), {})
    del state["contract"]
    state |= {"step": 7, "preprocess": PREPARED.to_dict(), "best": 0.5}
    state["split"]["train"] = ["a", "b"]
    write_atomic(tmp_path / "last.pt", state)
    contract = load_vae(tmp_path).contract
    assert contract["preprocess"] == PREPARED.to_dict() and contract["measured"]
    assert (contract["step"], contract["subjects"]) == (7, 2)


def test_the_model_card_says_what_is_known_and_nothing_else(tmp_path):
    vae = trained_vae()
    vae.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    for known in ("license: cc-by-4.0", "symmetric", "volumes: 40", "0.0123", "(B, 1, X, Y, Z)"):
        assert known in card
    tiny_vae().save_pretrained(tmp_path / "b", model_card_kwargs={"license": "mit"})
    bare = (tmp_path / "b" / "README.md").read_text()
    assert "license: mit" in bare and "Measured" not in bare and "Trained" not in bare
    assert "[More Information Needed]" not in card + bare


def test_the_model_card_takes_the_figures_of_an_evaluation(tmp_path, scans):
    vae = trained_vae()
    vae.save_pretrained(tmp_path / "vae")
    data = EvaluationData(str(scans), str(tmp_path / "cache"))
    evaluate(str(tmp_path / "vae"), data, str(tmp_path / "out"), mode="full", media=False)
    convert(tmp_path / "vae", tmp_path / "b", evaluation=tmp_path / "out", license="mit")
    psnr = json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]["psnr"]["mean"]
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"psnr: {psnr:.4g}" in card and "license: mit" in card
    with pytest.raises(ValueError, match=r"out: measured .*vae/model\.safetensors, not"):
        convert(tmp_path / "b", tmp_path / "c", evaluation=tmp_path / "out")


def test_a_file_goes_to_a_latent_and_back_with_intensities_and_affine(tmp_path, scans):
    class Same:
        """Codes nothing away, so that what comes back is what went in."""

        spatial_dims, in_channels, factor, contract = 3, 1, (1, 1, 1), trained_vae().contract
        out_channels, head = 1, LogVarianceHead()

        def parameters(self):
            return iter([torch.zeros(1)])

        def encode(self, x):
            return type("Posterior", (), {"mean": x, "logvar": torch.zeros_like(x)})

        def decode(self, z):
            return z

    source = read_volume(scans / "0.nii.gz")
    latent = vae3d.encode_file(Same(), scans / "0.nii.gz")
    assert (latent.mean.min(), latent.mean.max()) == (-1, 1)
    again = vae3d.decode_file(Same(), latent)
    np.testing.assert_allclose(again.affine, source.affine)
    np.testing.assert_allclose(again.data, source.intensities(), atol=1e-3)
    write_volume(tmp_path / "again.nii.gz", again)


def test_encode_file_is_what_the_commands_do(tmp_path, scans):
    vae = trained_vae()
    vae.save_pretrained(tmp_path / "vae")
    encode(
        str(tmp_path / "vae"), str(tmp_path / "z"), VolumeSource(str(scans), str(tmp_path / "c"))
    )
    latent = vae3d.encode_file(vae, scans / "1.nii.gz")
    theirs = read_latent(tmp_path / "z" / "1.safetensors")
    assert torch.equal(latent.mean, theirs.mean) and torch.equal(latent.logvar, theirs.logvar)
    assert latent.info["affine"] == theirs.info["affine"]
    decode(str(tmp_path / "z"), checkpoint=str(tmp_path / "vae"), out_dir=str(tmp_path / "out"))
    of_command = read_volume(tmp_path / "out" / "1.nii.gz")
    for one in (latent, theirs):
        np.testing.assert_array_equal(vae3d.decode_file(vae, one).data, of_command.data)
    by_patches = vae3d.encode_file(vae, scans / "1.nii.gz", mode="patch")
    assert by_patches.info["made_by"]["patch_size"] == [8, 8, 8]


def test_weights_that_do_not_tell_their_contract_ask_for_it(tmp_path, scans):
    vae = tiny_vae().eval()
    with pytest.raises(ValueError, match=r"do not tell how .*vae\.contract"):
        vae3d.encode_file(vae, scans / "0.nii.gz")
    vae.save_pretrained(tmp_path / "vae")
    run = partial(evaluate, str(tmp_path / "vae"), out_dir=str(tmp_path / "out"), mode="full")
    data = EvaluationData(str(scans), str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"do not tell how .*--data\.preprocess"):
        run(data)
    data.preprocess = PREPARED
    run(data, media=False, limit=1)
    assert (tmp_path / "out" / "summary.json").is_file()


@pytest.mark.parametrize("address", ["me/vae", "hf://me/vae"])
def test_every_command_takes_a_repository_of_the_hub(tmp_path, scans, hub, address, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = trained_vae()
    vae.save_pretrained(tmp_path / "saved")
    hub("me/vae", tmp_path / "saved")
    data = EvaluationData(str(scans), str(tmp_path / "cache"))
    evaluate(address, data, str(tmp_path / "out"), mode="full", media=False, limit=1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["step"] == 1200 and summary["data_range"] == [-1, 1]
    with pytest.raises(ValueError, match=r"vae3d encode .* give --latents"):
        sample(address, out_dir=str(tmp_path / "samples"))
    latents = str(tmp_path / "z")
    encode(address, latents, VolumeSource(str(scans), str(tmp_path / "cache")))
    decode(latents, checkpoint=address, out_dir=str(tmp_path / "decoded"))
    assert len(list((tmp_path / "decoded").iterdir())) == 2
    sample(address, out_dir=str(tmp_path / "samples"), latents=latents, n=1, prior="gaussian")
    made_by = json.loads((tmp_path / "z" / "latents.json").read_text())
    assert "snapshots" in json.dumps(made_by)  # a name that loads again, not that of a blob
    if address.startswith("hf:"):
        convert(address, tmp_path / "vae.pt")
        assert load_model(tmp_path / "vae.pt").contract == vae.contract


# What the published VAEs differ in, but for their size.
PUBLISHED = {
    "SD 1": {"latent_channels": 4, "scaling_factor": 0.18215},
    "SDXL": {"latent_channels": 4, "scaling_factor": 0.13025},
    "SD3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, **NO_QUANT},
    "FLUX": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **NO_QUANT},
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("place", ["", "/vae", "/vae/diffusion_pytorch_model.safetensors"])
def test_diffusers_weights_come_from_the_hub_and_go_back(tmp_path, hub, name, place):
    diffusers = pytest.importorskip("diffusers")
    options = PUBLISHED[name] | {"norm_num_groups": 2, "block_out_channels": (4, 8)}
    theirs = diffusers.AutoencoderKL(
        **options,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    theirs.save_pretrained(tmp_path / "repo" / ("vae" if place else ""))
    hub("lab/model", tmp_path / "repo")
    convert(f"hf://lab/model{place}", tmp_path / "ours.pt")
    ours = load_model(tmp_path / "ours.pt")
    assert ours.latent_scale == options["scaling_factor"]
    assert ours.latent_shift == options.get("shift_factor", 0.0)
    convert(tmp_path / "ours.pt", tmp_path / "back", to="diffusers")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back").eval()
    assert back.config.shift_factor == theirs.config.shift_factor
    x = torch.rand(1, 3, 16, 8)
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mean
        for again in (ours.encode(x).mean, back.encode(x).latent_dist.mean):
            torch.testing.assert_close(again, z, rtol=0, atol=1e-5)
        for again in (ours.decode(z), back.decode(z).sample):
            torch.testing.assert_close(again, theirs.decode(z).sample, rtol=0, atol=1e-5)


def test_a_single_file_of_maisi_comes_from_the_hub(tmp_path, hub):
    net = pytest.importorskip("monai.apps.generation.maisi.networks.autoencoderkl_maisi")
    theirs = net.AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=(4, 8),
        num_res_blocks=(1, 1), attention_levels=(False, False), norm_num_groups=2, num_splits=1,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, norm_float16=False,
    ).eval()  # fmt: skip
    (tmp_path / "repo" / "models").mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path / "repo" / "models" / "autoencoder.pt")
    hub("lab/maisi", tmp_path / "repo")
    address = "hf://lab/maisi/models/autoencoder.pt"
    convert(address, tmp_path / "ours.pt", norm_num_groups=2)
    x = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        ours, reference = load_model(tmp_path / "ours.pt")(x)[0], theirs.reconstruct(x)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


def test_causal_vaes_of_videos_are_refused_by_name(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    wan = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True]
    )
    wan.save_pretrained(tmp_path / "wan")
    for path in (tmp_path / "wan", next((tmp_path / "wan").glob("*.safetensors"))):
        with pytest.raises(ValueError, match="Wan"):
            convert(path, tmp_path / "out")
    torch.save(wan.state_dict(), tmp_path / "wan.pt")
    with pytest.raises(ValueError, match="causal VAE of videos"):
        convert(tmp_path / "wan.pt", tmp_path / "out")


def test_what_the_hub_has_not_is_one_line(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for address in ("me/none", "hf://me/none", "hf://me/none/file.pt"):
        with pytest.raises(ValueError, match="not on the Hugging Face Hub") as error:
            load_model(address)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="runs/a: no such checkpoint"):
        load_model("runs/a")
    with pytest.raises(ValueError, match="not on the Hugging Face Hub"):
        convert("hf://me/none", tmp_path / "out")
    with pytest.raises(ValueError, match="an address of the hub is"):
        convert("hf://me", tmp_path / "out")


def test_a_recipe_out_of_range_builds_nothing(tmp_path):
    tiny_vae().save_pretrained(tmp_path)
    recipe = json.loads((tmp_path / "config.json").read_text())
    recipe["init_args"]["num_res_blocks"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="num_res_blocks is 1000000000; give"):
        vae3d.CustomVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("recipe", ["{", "[]", "3", '{"class_path": 3}', "[" * 5000])
def test_a_damaged_recipe_is_one_line(tmp_path, recipe):
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(recipe)
    for command in (load_model, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError) as error:
            command(tmp_path / "vae")
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "entry",
    [
        {"preprocess": {"spacing_mm": "x"}},
        {"preprocess": {"percentiles": 3}},
        {"preprocess": {"no": 1}},
        {"preprocess": [1]},
        {"data": 5},
        {"patch_size": ["a"]},
        {"step": "x"},
    ],
    ids=str,
)
def test_a_damaged_contract_is_one_line(tmp_path, scans, entry):
    vae = trained_vae()
    vae.save_pretrained(tmp_path / "vae")
    recipe = vae.spec | vae.contract | entry
    (tmp_path / "vae" / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError) as error:
        vae3d.encode_file(load_model(tmp_path / "vae"), scans / "0.nii.gz")
    assert "\n" not in str(error.value)
    data = EvaluationData(str(scans), str(tmp_path / "cache"))
    with pytest.raises(ValueError):
        evaluate(str(tmp_path / "vae"), data, str(tmp_path / "out"), mode="full")


def test_a_layout_of_others_is_refused_for_weights_of_vae3d(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="is of vae3d, not of --layout MONAI; leave that out"):
        convert(str(tmp_path / "vae"), tmp_path / "out", layout="MONAI")
    assert not (tmp_path / "out").exists()
