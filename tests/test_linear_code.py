"""The linear code: training starts at block PCA, and every way through the network includes it."""

from functools import partial

import numpy as np
import pytest
import torch
import yaml
from toys import SHAPE, on_ranks, tiny_vae, toy_trainer

from vae3d.commands.train import train_3d
from vae3d.exact.executor import decode_exact, encode_exact
from vae3d.inference.baselines import BlockPCA
from vae3d.inference.metrics import psnr
from vae3d.inference.reconstruct import autoencode
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.linear_code import MAX_BLOCK
from vae3d.models.norm import NoNorm
from vae3d.models.posterior import FSQ, VQ, FixedStdHead, LogVarianceHead, SoftplusHead, vectors
from vae3d.models.presets import AutoencoderKL, MaisiVAE, MonaiVAE
from vae3d.training.checkpoint import load_checkpoint, load_model
from vae3d.training.linear_code import fit_linear_code
from vae3d.training.task import VAETask
from vae3d.weights.convert import export_state, inflate
from vae3d.weights.layouts import DIFFUSERS, MONAI


def smooth(channels=1, size=(16, 24, 20), seed=0):
    """A volume with structure: low frequencies and an edge."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, *(n // 4 for n in size), generator=generator)
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    x = torch.nn.functional.interpolate(coarse, size, mode=mode)[0]
    return x + (x > 0.6) * 0.5


class Reconstruct(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        return self.vae(x, sample_posterior=False)[0]


def fitted(x, **options):
    vae = tiny_vae(linear_code=True, **options).eval()
    fit_linear_code(vae, [x])
    return vae


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (3, {}),
        (3, {"factors": [[1, 1, 1], [2, 4, 1]]}),
        (3, {"in_channels": 2, "latent_channels": 3}),
        (3, {"latent_channels": 1, "posterior": partial(FixedStdHead, std=0.1)}),
        (3, {"posterior": SoftplusHead}),
        (3, {"quant_conv": False}),
        (2, {"spatial_dims": 2, "in_channels": 3}),
    ],
)
def test_a_fitted_network_begins_as_block_pca_with_white_latents(dims, options):
    x = smooth(options.get("in_channels", 1), (32, 48, 40)[:dims])
    vae = fitted(x, **options)
    with torch.no_grad():
        recon, posterior = vae(x[None], sample_posterior=False)
    pca = BlockPCA.fit([x], vae.factor, vae.latent_channels)
    assert psnr(recon[0], x, 1.0) == pytest.approx(psnr(pca(x), x, 1.0), abs=0.1)
    codes = posterior.mean.transpose(0, 1).flatten(1)
    assert codes.mean(1).abs().max() < 0.2
    assert codes.std(1).sub(1).abs().max() < 0.15


def test_latent_channels_beyond_a_blocks_values_begin_at_zero():
    x = smooth()
    vae = fitted(x, factors=[[1, 1, 1], [1, 2, 1]], latent_channels=5)
    recon, posterior = vae(x[None], sample_posterior=False)
    assert posterior.mean[:, 2:].abs().max() == 0
    assert torch.allclose(recon[0], x, atol=1e-5)


def test_every_weight_learns(tmp_path):
    x = smooth()
    vae = fitted(x).train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(3):  # the ends of the networks are zero, so that those behind learn after them
        recon, posterior = vae(x[None])
        optimizer.zero_grad()
        (torch.nn.functional.mse_loss(recon, x[None]) + 1e-4 * posterior.kl()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


@pytest.mark.parametrize("options", [{}, {"factors": [[2, 1, 1], [2, 2, 1]], "norm": NoNorm}])
def test_exact_and_full_pass_are_equal(options):
    x = smooth(size=(19, 24, 21))
    vae = fitted(x, **options)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.02 * torch.randn_like(p))
        recon, posterior = vae(x[None], sample_posterior=False)
    exact = encode_exact(vae, x, tile=(8, 8, 8))
    assert torch.allclose(exact.mean, posterior.mean[0], atol=1e-5)
    again = decode_exact(vae, exact.mean, size=x.shape[1:], tile=(8, 8, 8))
    assert torch.allclose(again, recon[0], atol=1e-5)


@pytest.mark.parametrize("head", [FSQ, partial(VQ, codebook=16)])
@pytest.mark.parametrize("dims", [2, 3])
def test_training_on_codes_begins_at_the_least_squares_of_a_linear_code(head, dims):
    size = (24, 32, 20)[:dims]
    vae = tiny_vae(posterior=head, linear_code=True, spatial_dims=dims, factors=((2,) * dims,) * 2)
    volumes = [smooth(size=size, seed=n) for n in range(6)]
    fit_linear_code(vae, volumes)
    x = torch.stack(volumes)
    recon, posterior = vae(x)
    error = recon - x
    # Better than the best constant by far, and no other linear map of the same values is better.
    assert error.square().mean() < 0.25 * (x - x.mean()).square().mean()
    error.square().mean().backward()
    scale = float(error.detach().abs().mean() * posterior.mean.detach().abs().mean())
    assert vae.linear_code.synthesis.weight.grad.abs().max() < 0.02 * scale
    assert posterior.use()[1] > 0.1
    if isinstance(vae.head, VQ):  # the codebook is the mean of what is nearest to each code
        rows, codes = vectors(posterior.encoded), posterior.codes.flatten()
        means = torch.stack([rows[codes == k].mean(0) for k in codes.unique()])
        assert torch.allclose(vae.head.codebook[codes.unique()], means, atol=0.1)


def test_patches_of_a_linear_code_alone_stitch_without_a_difference():
    x = smooth(size=(32, 32, 24))
    vae = fitted(x)
    full = autoencode(vae, x, "full")[0]
    patches = autoencode(vae, x, "patch", patch_size=(16, 16, 16), overlap=0.5)[0]
    assert torch.allclose(full, patches, atol=1e-5)


def test_precision_layout_copies_and_export_keep_the_numbers(tmp_path):
    x = smooth()[None]
    vae = fitted(x[0])
    expected = vae(x)[0].detach()
    assert torch.allclose(vae.to(memory_format=torch.channels_last_3d)(x)[0], expected, atol=1e-6)
    assert torch.allclose(vae.double()(x.double())[0].float(), expected, atol=1e-6)
    vae.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (vae(x)[0].float() - expected).abs().max() < 0.02
    vae.save_pretrained(tmp_path / "hub")
    assert torch.equal(CustomVAE.from_pretrained(tmp_path / "hub")(x)[0], vae(x)[0])
    exported = torch.export.export(Reconstruct(vae), (x,)).module()
    assert torch.allclose(exported(x), vae(x)[0], atol=1e-6)


def test_it_is_fitted_to_weights_in_any_layout_and_precision():
    x = smooth()
    expected = fitted(x).linear_code.state_dict()
    other = tiny_vae(linear_code=True).to(memory_format=torch.channels_last_3d).double()
    fit_linear_code(other, [x])
    for name, value in other.linear_code.state_dict().items():
        assert torch.equal(value.float(), expected[name])


@pytest.mark.parametrize("mode", ["block", "level"])
def test_checkpointing_changes_no_gradient(mode):
    x = smooth()
    gradients = []
    for checkpointing in ("none", mode):
        vae = fitted(x).train()
        vae.set_checkpointing(checkpointing)
        vae(x[None], sample_posterior=False)[0].square().mean().backward()
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def _rank_fits(world, x):
    vae = tiny_vae(linear_code=True, posterior=partial(VQ, codebook=8))
    fit_linear_code(vae, [x] if world.is_main else iter(()), world)
    return {**vae.linear_code.state_dict(), **vae.head.state_dict()}


def test_all_ranks_get_what_the_main_one_has_fitted():
    one, two = on_ranks(2, _rank_fits, smooth())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["analysis.weight"].std() > 0 and one["counts"].mean() == pytest.approx(1)


def _rank_trains(world, folder, sharding):
    task = VAETask(tiny_vae(linear_code=True), VAELoss(), seed=0)
    images = [smooth(size=SHAPE, seed=n) for n in range(4)]
    fit_linear_code(task.network, images, world)
    trainer = toy_trainer(folder, world, task=task, max_steps=3, sharding=sharding, batch_size=2)
    trainer.fit()
    return trainer.tracker.losses()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_ranks_train_it_as_one_process_does(tmp_path, sharding):
    task = VAETask(tiny_vae(linear_code=True), VAELoss(), seed=0)
    fit_linear_code(task.network, [smooth(size=SHAPE, seed=n) for n in range(4)])
    alone = toy_trainer(tmp_path / "one", task=task, max_steps=3, batch_size=4)
    alone.fit()
    for losses in on_ranks(2, _rank_trains, tmp_path / "two", sharding):
        assert losses == pytest.approx(alone.tracker.losses(), rel=1e-4)
    saved = load_checkpoint(tmp_path / "two" / "last.pt")
    assert (
        "linear_code.analysis.weight" in saved["model"]
        and "linear_code.synthesis.bias" in saved["ema"]
    )


def test_what_has_no_place_for_it_refuses_by_name():
    vae = tiny_vae(linear_code=True)
    for layout in (MONAI, DIFFUSERS):
        with pytest.raises(ValueError, match="linear_code"):
            export_state(vae, layout)
    with pytest.raises(ValueError, match="linear code"):
        inflate(tiny_vae(linear_code=True, spatial_dims=2))
    with pytest.raises(ValueError, match="output none"):
        tiny_vae(linear_code=True, output="tanh")
    with pytest.raises(ValueError, match="out_channels"):
        tiny_vae(linear_code=True, out_channels=2)
    with pytest.raises(ValueError, match=f"{MAX_BLOCK} is the most"):
        tiny_vae(linear_code=True, factors=[[4, 4, 4], [8, 4, 4]])


def test_the_published_networks_have_none():
    for vae in (
        MonaiVAE(channels=(4, 8), norm_num_groups=4, attention_levels=(False, False)),
        MaisiVAE(num_channels=(4, 8), norm_num_groups=4),
        AutoencoderKL(base_ch=4, ch_mult=(1, 2), num_groups=4),
        CustomVAE(channels=(4, 8), norm=NoNorm),
    ):
        assert vae.linear_code is None


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    for n in range(4):
        np.save(folder / f"v{n}.npy", smooth(size=(24, 24, 24), seed=n)[0].numpy())
    return folder


@pytest.mark.parametrize("patching", ["random_parts", "full", None])
def test_training_fits_it_once_and_a_resumed_run_never_again(
    volumes, tmp_path, patching, monkeypatch, capsys
):
    options = dict(
        model=partial(CustomVAE, channels=(4, 8), norm=NoNorm, linear_code=True,
                      posterior=partial(LogVarianceHead, init_logvar=-6.0)),
        patching=patching, patch_size=(16, 16, 16), patches_per_volume=2, lr=1e-5, amp="off",
        val_every=1, media_every=0, wandb="disabled", ema_decay=0.0,
    )  # fmt: skip
    from loaders import DataConfig

    data = DataConfig(str(volumes), cache_dir=str(tmp_path / "cache"), fractions=(0.5, 0.25, 0.25))
    assert train_3d(data, str(tmp_path / "run"), max_steps=1, **options) == 0
    vae = load_model(tmp_path / "run")
    x = smooth(size=(24, 24, 24), seed=9)
    x = x / x.max()
    pca = BlockPCA.fit([x], vae.factor, vae.latent_channels)
    recon = vae(x[None])[0][0]
    assert psnr(recon, x, 1.0) > psnr(pca(x), x, 1.0) - 2
    monkeypatch.setattr("vae3d.training.linear_code.fit_linear_code", None)  # never called again
    assert train_3d(data, str(tmp_path / "run"), max_steps=2, **options) == 0
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def run_of(volumes, folder, model, **options):
    """Train one step with `model` and return the network."""
    from loaders import DataConfig

    data = DataConfig(
        str(volumes), cache_dir=str(folder.parent / "cache"), fractions=(0.5, 0.25, 0.25)
    )
    options = dict(max_steps=1, val_every=0, media_every=0, wandb="disabled") | options
    sizes = dict(patch_size=(16, 16, 16), patches_per_volume=2)
    assert train_3d(data, str(folder), model, **sizes, **options) == 0
    return load_model(folder)


SMALL = partial(CustomVAE, channels=(4, 8), norm=NoNorm)


def test_training_gives_a_custom_vae_one_unless_it_is_told_not_to(volumes, tmp_path):
    assert run_of(volumes, tmp_path / "a", SMALL).linear_code is not None
    assert (
        yaml.safe_load((tmp_path / "a/config.yaml").read_text())["model"]["init_args"][
            "linear_code"
        ]
        is None
    )
    without = partial(SMALL, linear_code=False)
    assert run_of(volumes, tmp_path / "b", without).linear_code is None
    assert run_of(volumes, tmp_path / "c", partial(SMALL, output="tanh")).linear_code is None
    published = partial(MonaiVAE, channels=(4, 8), norm_num_groups=4,
                        attention_levels=(False, False))  # fmt: skip
    assert run_of(volumes, tmp_path / "d", published).linear_code is None
    assert run_of(volumes, tmp_path / "a", SMALL, max_steps=2).linear_code is not None


def test_weights_to_begin_with_say_whether_there_is_one(volumes, tmp_path):
    run_of(volumes, tmp_path / "with", SMALL)
    run_of(volumes, tmp_path / "without", partial(SMALL, linear_code=False))
    for name in ("with", "without"):
        begun = run_of(volumes, tmp_path / f"{name}_b", SMALL, init_from=str(tmp_path / name), lr=0)
        assert (begun.linear_code is not None) is (name == "with")
        expected = load_model(tmp_path / name).state_dict()
        assert all(torch.allclose(v, expected[k]) for k, v in begun.state_dict().items())


def test_a_run_from_before_it_was_the_default_goes_on_without_it(volumes, tmp_path):
    run_of(volumes, tmp_path / "old", partial(SMALL, linear_code=False))  # as runs were saved then
    again = run_of(volumes, tmp_path / "old", SMALL, max_steps=2)
    assert again.linear_code is None and load_checkpoint(tmp_path / "old")["step"] == 2


def test_fitting_reads_no_more_for_more_volumes():
    read = []

    def endless():
        while True:
            read.append(1)
            yield smooth()

    vae = tiny_vae(linear_code=True)
    fit_linear_code(vae, endless())
    assert len(read) == 512
