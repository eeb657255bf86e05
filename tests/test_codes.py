"""Latents of codes, FSQ and VQ: as the field computes them, in training and in every way out."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from toys import SHAPE, ToyBatch, ToyLoader, on_ranks, tiny_vae, toy_trainer

from loaders import DataConfig, read_volume
from vae3d.commands.decode import decode
from vae3d.commands.encode import encode
from vae3d.commands.evaluate import evaluate
from vae3d.commands.report import report
from vae3d.commands.sample import sample
from vae3d.commands.train import train_3d
from vae3d.commands.train_ldm import UNet, train_ldm
from vae3d.exact.executor import encode_exact
from vae3d.inference.diffusability import diffusability
from vae3d.inference.export import CONTRACT, export_programs
from vae3d.inference.metrics import code_summary
from vae3d.inference.reconstruct import Coding, autoencode
from vae3d.losses.commitment import Commitment
from vae3d.losses.kl import KL
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import NoNorm
from vae3d.models.posterior import FSQ, VQ, use_of, vectors
from vae3d.stage2.latents import LatentStore, read_latent, write_latent
from vae3d.tracking.probes import LatentProbes
from vae3d.training.checkpoint import load_checkpoint, load_model
from vae3d.training.task import VAETask
from vae3d.weights.convert import export_state, inflate
from vae3d.weights.layouts import MONAI

SMALL_VQ = partial(VQ, codebook=16)
HEADS = [partial(FSQ, levels=(8, 5, 5, 5)), partial(FSQ, levels=(5, 3)), SMALL_VQ]
SIZES = [(3, 5), (3, 2, 4)]


def made(head, channels=4):
    torch.manual_seed(0)
    head = head()
    head.fit(channels)
    return head


def coded(head=SMALL_VQ, **options):
    return tiny_vae(posterior=head, **options)


def task_of(head=SMALL_VQ, loss=VAELoss, **options):
    return VAETask(coded(head, **options), loss(), seed=0)


def normal(shape, word):
    """Numbers of one sample, the same at each call."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(len(word)))


# As others compute them


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 3), (4, 6, 9)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_fsq_is_that_of_the_public_implementation(levels, groups, size):
    theirs = pytest.importorskip("vector_quantize_pytorch").FSQ(
        list(levels), num_codebooks=groups, keep_num_codebooks_dim=True
    )
    ours = made(partial(FSQ, levels=levels), groups * len(levels))
    x = 2 * torch.randn(2, groups * len(levels), *size)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    posterior, (values, codes) = ours(x), theirs(y)
    torch.testing.assert_close(posterior.mean, values, rtol=0, atol=1e-6)
    assert torch.equal(posterior.codes, codes.movedim(-1, 1).long())
    torch.testing.assert_close(ours.values(posterior.codes), theirs.indices_to_codes(codes))
    towards = torch.randn_like(values)
    (posterior.mean * towards).sum().backward()
    (values * towards).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("size", SIZES)
def test_vq_is_that_of_the_public_implementation_and_so_is_its_codebook_step_by_step(size):
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.VectorQuantize(
        4, 16, decay=0.9, threshold_ema_dead_code=0, rotation_trick=False, channel_last=False,
        accept_image_fmap=len(size) == 2, accept_3d_fmap=len(size) == 3,
    )  # fmt: skip
    ours = made(partial(VQ, codebook=16, ema=0.9, reseed=0))
    book = theirs._codebook
    for mine, other in ((ours.codebook, book.embed), (ours.sums, book.embed_avg)):
        mine.copy_(other[0])
    ours.counts.copy_(book.cluster_size[0])
    for step in range(3):
        x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(step))
        x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
        posterior = ours(x)
        ours.observe(posterior, normal)
        values, codes, commitment = theirs(y)
        torch.testing.assert_close(posterior.mean, values)
        assert torch.equal(posterior.codes, codes[:, None])
        loss = Commitment()(None, None, posterior)
        torch.testing.assert_close(loss, commitment.squeeze())
        towards = torch.randn_like(values)
        ((posterior.mean * towards).sum() + loss).backward()
        ((values * towards).sum() + commitment.sum()).backward()
        torch.testing.assert_close(x.grad, y.grad)
        ours.after_step()
        for mine, other in (
            (ours.counts, book.cluster_size),
            (ours.sums, book.embed_avg),
            (ours.codebook, book.embed),
        ):
            torch.testing.assert_close(mine, other[0])


# The contract


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_values_are_each_others_inverse_and_of_nothing_else_is_there_a_draw(head, size):
    head = made(head)
    x = torch.randn(2, 4, *size, requires_grad=True)
    posterior = head(x)
    assert torch.equal(head.values(posterior.codes), posterior.mean)
    assert torch.equal(head.codes(posterior.mean), posterior.codes)
    assert torch.equal(posterior.sample(), posterior.mode()) and not posterior.std.any()
    assert posterior.codes.min() >= 0 and posterior.codes.max() < head.num_codes
    posterior.mean.sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no KL divergence"):
        posterior.kl()


def test_codes_of_any_latent_are_the_nearest_of_all():
    z = torch.randn(1, 2, 6, 5) * 2
    for head in (made(partial(FSQ, levels=(5, 4)), 2), made(SMALL_VQ, 2)):
        every = head.values(torch.arange(head.num_codes).view(1, 1, -1))[0]
        nearest = (vectors(z)[:, :, None] - every).square().sum(1).argmin(1)
        assert torch.equal(head.codes(z).flatten(), nearest)


@pytest.mark.parametrize("head", HEADS)
def test_codes_do_not_depend_on_autocast_nor_on_the_precision_of_the_network(head):
    x = torch.randn(1, 4, 6, 6, 6).bfloat16()
    plain = made(head)
    expected = plain(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        posterior = plain(x)
    assert torch.equal(posterior.codes, expected.codes)
    assert posterior.mean.dtype == torch.float32 and torch.equal(posterior.mean, expected.mean)
    half = plain.half()
    assert torch.equal(half.codes(half.values(expected.codes)), expected.codes)


def test_perplexity_and_usage_are_those_of_the_definition():
    codes = torch.tensor([0, 0, 1, 3]).view(1, 1, 2, 2)
    perplexity, usage = use_of(torch.cat([codes, torch.zeros_like(codes)], 1), 8)
    entropy = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))
    assert float(perplexity) == pytest.approx((np.exp(entropy) + 1) / 2)
    assert float(usage) == pytest.approx((3 / 8 + 1 / 8) / 2)
    row = code_summary(codes[0], 8, num_values=16)
    assert row["bits_per_voxel"] == pytest.approx(4 * 3 / 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"posterior": FSQ, "latent_channels": 6}, "FSQ.levels .* latent_channels is 6"),
        ({"posterior": partial(FSQ, levels=(8, 2))}, "3 or more"),
        ({"posterior": partial(FSQ, levels=(100, 100, 100, 100))}, "100000000 codes"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        tiny_vae(**options)


def test_layouts_of_others_have_no_place_for_a_codebook():
    with pytest.raises(ValueError, match=r"head\.codebook"):
        export_state(coded(), MONAI)
    flat = coded(spatial_dims=2, norm=NoNorm).eval()
    x = torch.rand(1, 1, 8, 8)
    volume = inflate(flat).eval().encode(x[..., None].expand(-1, -1, -1, -1, 8))
    assert torch.equal(volume.codes[..., 2], flat.encode(x).codes)


def test_a_target_for_the_spread_of_codes_is_refused():
    loss = partial(VAELoss, kl=partial(KL, target_std=1.0))
    with pytest.raises(ValueError, match=r"loss.kl.target_std .* VQ has codes"):
        task_of(loss=loss)
    assert task_of(partial(FSQ, levels=(5,)), loss=VAELoss)


# Training


@pytest.mark.parametrize("head", [partial(FSQ, levels=(5, 5)), SMALL_VQ])
def test_there_is_no_kl_and_commitment_of_a_learned_codebook_alone(head):
    task = task_of(head)
    terms = task(next(ToyLoader().stream()), 0)
    learned = isinstance(task.network.head, VQ)
    assert {"perplexity", "usage"} <= set(terms) and not any(n.startswith("kl") for n in terms)
    assert ("commitment" in terms) is learned
    expected = terms["recon"] + (0.25 * terms["commitment"] if learned else 0)
    torch.testing.assert_close(terms["loss"].detach(), expected)
    gaussian = VAETask(tiny_vae(), VAELoss(), seed=0)(next(ToyLoader().stream()), 0)
    assert "kl" in gaussian and not {"commitment", "perplexity"} & set(gaussian)
    terms["loss"].backward()
    for name, p in task.network.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def books(trainer):
    return {k: v.clone() for k, v in trainer.task.network.head.state_dict().items()}


def assert_near(ours, other):
    for name, value in ours.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def fitted(folder, world=None, batch_size=4, grad_accum=1, sharding="ddp"):
    trainer = toy_trainer(
        folder, world, task=task_of(), batch_size=batch_size, grad_accum=grad_accum, max_steps=3,
        sharding=sharding,
    )  # fmt: skip
    trainer.fit()
    return trainer.tracker.losses(), books(trainer)


def on_a_rank(world, folder, sharding):
    return fitted(folder, world, batch_size=1, grad_accum=2, sharding=sharding)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_micro_batches_and_ranks_move_the_codebook_as_one_large_batch(tmp_path, sharding):
    losses, book = fitted(tmp_path / "whole")
    assert (book["counts"] > 0).all()  # those that died live again
    others = on_ranks(2, on_a_rank, tmp_path / "ranks", sharding)
    if sharding == "ddp":
        others.append(fitted(tmp_path / "parts", batch_size=1, grad_accum=4))
    for their_losses, their_book in others:
        assert their_losses == pytest.approx(losses, rel=1e-4)
        assert_near(their_book, book)


def test_a_resumed_run_has_the_codebook_bit_by_bit_and_so_has_the_average(tmp_path):
    steps = partial(toy_trainer, lr_schedule="constant")
    steps(tmp_path / "whole", task=task_of(), max_steps=4).fit()
    steps(tmp_path / "cut", task=task_of(), max_steps=2).fit()
    again = steps(tmp_path / "cut", task=task_of(), max_steps=4)
    again.load_state_dict(load_checkpoint(tmp_path / "cut" / "last.pt"))
    again.fit()
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut")]
    for part in ("model", "ema"):
        one, two = (state[part] for state in states)
        assert "head.codebook" in one and all(torch.equal(v, two[k]) for k, v in one.items())
    # What validates under the average is what is loaded of it.
    vae = coded().eval()
    vae.load_state_dict(states[1]["ema"])
    x = torch.rand(1, 1, *SHAPE)
    with again.averaged() as network:
        assert torch.equal(network(x)[0], vae(x)[0])


@pytest.mark.parametrize("mode", ["block", "level"])
def test_what_is_computed_again_is_not_counted_again(mode):
    heads = []
    for checkpointing in ("none", mode):
        task = task_of()
        task.network.set_checkpointing(checkpointing)
        task(next(ToyLoader().stream()), 0)["loss"].backward()
        task.after_step()
        heads.append(task.network.head.state_dict())
    assert all(torch.equal(v, heads[1][k]) for k, v in heads[0].items())


def test_looking_freezing_and_what_is_not_finite_leave_the_codebook_alone():
    task = task_of()
    before = {k: v.clone() for k, v in task.network.head.state_dict().items()}

    def step(image):
        task(ToyBatch(image, torch.arange(len(image))), 0)
        task.after_step()
        return all(torch.equal(v, before[k]) for k, v in task.network.head.state_dict().items())

    x = torch.rand(2, 1, *SHAPE)
    assert step(x * torch.nan)
    task.network.eval()
    task.network(x)
    assert step(x)
    task.network.train()
    task.network.freeze("encoder")
    assert step(x)
    task = task_of()
    assert not step(x)


def test_dead_codes_begin_at_latents_of_the_step_far_from_the_others_first():
    head = made(partial(VQ, codebook=8, ema=0.5, reseed=0.1), 1)
    head.codebook.copy_(torch.arange(8.0)[:, None] + 100)
    x = torch.cat([torch.zeros(1, 1, 60), torch.full((1, 1, 4), 50.0)], 2)

    def step(x):
        head.observe(head(x), normal)
        head.after_step()

    step(x)
    (mean,) = set(head.codebook.flatten().tolist()) - {0.0, 50.0}  # of all, nearest to one code
    assert mean == pytest.approx(3.125, abs=1e-3)
    for _ in range(8):
        step(x)
    assert torch.allclose(head(x).mean, x, atol=1e-2)
    few = made(partial(VQ, codebook=8), 1)  # fewer latents than codes: the others stay
    few.observe(few(torch.tensor([[[5.0, 7.0]]])), normal)
    old = few.codebook.clone()
    few.after_step()
    assert few.codebook.isfinite().all() and (few.codebook == old).sum() == 5


def test_reseeding_can_be_left_out():
    head = made(partial(VQ, codebook=8, reseed=0.0), 2)
    old = head.codebook.clone()
    posterior = head(torch.randn(1, 2, 3, 3))
    head.observe(posterior, normal)
    head.after_step()
    met = posterior.codes.unique()
    unmet = [n for n in range(8) if n not in met]
    assert unmet and torch.equal(head.codebook[unmet], old[unmet])
    assert not torch.equal(head.codebook[met], old[met])


@pytest.mark.parametrize(
    "head", [SMALL_VQ, pytest.param(partial(FSQ, levels=(5, 5)), marks=pytest.mark.slow)]
)
def test_training_learns_through_the_codes(tmp_path, head):
    loader = ToyLoader(samples=1, batch_size=1)
    x = torch.linspace(-1, 1, 12).expand(8, 4, 12).sin()
    loader.images = x[None, None].contiguous()
    trainer = toy_trainer(tmp_path, task=task_of(head), loader=loader, max_steps=25)
    trainer.fit()
    losses = trainer.tracker.losses("train/recon")
    assert losses[-1] < losses[0] / 2
    assert trainer.tracker.rows[25]["train/perplexity"] > 2


# Whole volumes, files, programs


@pytest.mark.parametrize("head", [partial(FSQ, levels=(8, 5, 5, 5)), SMALL_VQ])
def test_every_mode_gives_codes_and_exact_those_of_the_full_pass(head):
    vae = coded(head).eval()
    x = torch.rand(1, 19, 16, 13)
    full, mean, logvar = autoencode(vae, x, "full")
    exact = encode_exact(vae, x, tile=(4, 8, 8))
    assert torch.equal(exact.mean, mean) and torch.equal(exact.logvar, logvar)
    assert torch.allclose(autoencode(vae, x, "exact")[0], full, atol=1e-5)
    patches = autoencode(vae, x, "patch", patch_size=(8, 8, 8))[1]
    assert torch.equal(vae.snapped(patches[None])[0], patches)
    assert (patches == mean).float().mean() > 0.3
    near = mean + 1e-4  # of a second stage, say
    coding = Coding("full")
    assert torch.equal(coding.decode(vae, near, x.shape[1:]), full)
    assert torch.equal(vae.decode_stage_2_outputs(near[None]), vae.decode(mean[None]))
    row = diffusability(vae, coding, x, mean, logvar, [1.0])
    assert all(map(np.isfinite, row.values())) and not {"noise_share", "kurtosis"} & set(row)


def test_a_2d_network_codes_the_slices_of_a_volume():
    vae = coded(spatial_dims=2).eval()
    x = torch.rand(1, 12, 8, 5)
    how = dict(slice_axis=2, patch_size=(8, 8))
    full, exact, patch = (autoencode(vae, x, m, **how)[1] for m in ("full", "exact", "patch"))
    assert torch.equal(full, exact)
    for latent in (full, patch):
        assert torch.equal(vae.snapped(latent[None])[0], latent)


@pytest.mark.slow
@pytest.mark.parametrize("head", [partial(FSQ, levels=(8, 5, 5, 5)), SMALL_VQ])
def test_programs_take_and_give_codes(tmp_path, head):
    vae = coded(head, linear_code=True).eval()
    export_programs(vae, tmp_path / "out", ["torch", "onnx"], (8, 4, 8))
    told = json.loads((tmp_path / "out" / CONTRACT).read_text())
    assert told["num_codes"] == vae.head.num_codes
    assert {entry["sizes"] for entry in told["programs"].values()} == {"free"}
    x = torch.rand(1, 1, 12, 8, 8)
    load = torch.export.load
    (codes,) = load(tmp_path / "out" / "encoder.pt2").module()(x)
    assert torch.equal(codes, vae.encode(x).codes)
    (recon,) = load(tmp_path / "out" / "decoder.pt2").module()(codes)
    assert torch.allclose(recon, vae(x)[0], atol=1e-5)


def test_latent_files_hold_codes_and_are_whole_or_refused(tmp_path):
    head = made(SMALL_VQ, 2)
    posterior = head(torch.randn(1, 2, 4, 3, 5))
    path = tmp_path / "a.safetensors"
    info = {"subject": "a", "split": None, "labels": {}, "affine": np.eye(4).tolist(),
            "spacing_mm": [1, 1, 1]}  # fmt: skip
    mean, codes = posterior.mean[0], posterior.codes[0]
    write_latent(path, mean, posterior.logvar[0], info, codes)
    latent = read_latent(path)
    assert torch.equal(latent.mean, mean) and torch.equal(latent.codes.long(), codes)
    assert latent.codes.dtype == torch.int32 and (latent.logvar == -torch.inf).all()
    assert torch.equal(latent.draw(), mean)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        read_latent(path)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    generator = np.random.default_rng(0)
    for n in range(4):
        coarse = torch.from_numpy(generator.random((1, 1, 5, 6, 4)))
        x = torch.nn.functional.interpolate(coarse, (18, 24, 14), mode="trilinear")
        np.save(folder / f"v{n}.npy", x[0, 0].float().numpy())
    return folder


@pytest.fixture(scope="module", params=["VQ", pytest.param("FSQ", marks=pytest.mark.slow)])
def run(request, volumes, tmp_path_factory):
    """A trained run; tests write elsewhere."""
    head = {"FSQ": FSQ, "VQ": SMALL_VQ}[request.param]
    folder = tmp_path_factory.mktemp("run")
    data = DataConfig(str(volumes), str(folder / "cache"), fractions=(0.5, 0.25, 0.25))
    assert train_3d(
        data, str(folder / "run"), partial(CustomVAE, channels=(4, 8), norm=NoNorm, posterior=head),
        patch_size=(8, 8, 8), patches_per_volume=2, max_steps=2, log_every=1, val_every=0,
        media_every=0, wandb="disabled", device="cpu", amp="bf16", lr=1e-3,
    ) == 0  # fmt: skip
    return folder


def test_a_run_logs_the_use_of_its_codes_and_reports_no_advice_on_scale_or_kl(run, tmp_path):
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert {"train/perplexity", "train/usage"} <= keys and not [k for k in keys if "kl" in k]
    report([str(run / "run")], out=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<b>Codes</b>" in page and "<code>--loss.kl" not in page


def test_probes_look_at_codes_and_at_no_spread(tmp_path):
    probes = LatentProbes([torch.rand(1, *SHAPE) for _ in range(2)])
    measured = probes.measure(coded().eval())
    assert set(measured.numbers) == {"latent/perplexity", "latent/usage"}
    assert 1 <= measured.numbers["latent/perplexity"] <= 16
    assert set(probes.draw(measured, tmp_path)) == {"latent/between", "latent/slices"}


def test_encode_writes_codes_and_decode_reads_them_as_evaluate_reconstructs(
    run, volumes, tmp_path, capsys
):
    where = dict(checkpoint=str(run / "run"), out_dir=str(tmp_path / "z"))
    encode(**where, mode="exact", device="cpu", measured_scale=True)
    vae = load_model(run / "run")
    assert f"codes out of {vae.head.num_codes}" in capsys.readouterr().out
    latent = read_latent(tmp_path / "z" / "v1.safetensors")
    assert torch.equal(vae.head.values(latent.codes[None].long())[0], latent.mean)
    store = LatentStore(tmp_path / "z")
    assert store.read(0).shape[0] == 2 * vae.latent_channels
    decode(str(tmp_path / "z"), str(run / "run"), str(tmp_path / "d"), device="cpu")
    x = np.load(volumes / "v1.npy")
    out = tmp_path / "e"
    evaluate(
        str(run / "run"), DataConfig(str(volumes), str(run / "cache")), str(out), split="all",
        device="cpu", mode="full", media=False,
    )  # fmt: skip
    theirs = read_volume(out / "recon" / "v1.nii.gz").data[0]
    assert np.allclose(read_volume(tmp_path / "d" / "v1.nii.gz").data[0], theirs, atol=1e-4)
    row = json.loads((out / "rows" / "v1.json").read_text())["row"]
    bits = latent.codes.numel() * np.log2(vae.head.num_codes) / x.size
    assert row["bits_per_voxel"] == pytest.approx(bits)
    assert {"code_perplexity", "code_usage"} <= set(row) and not {"kl", "latent_std"} & set(row)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_codes"] == vae.head.num_codes and "latent_bits" not in summary
    page = (out / "report.html").read_text()
    assert "<b>Codes</b>" in page and "<code>--loss.kl" not in page
    assert "linear_code true" not in page


def test_diffusion_learns_codes_and_what_it_draws_is_decoded_from_codes(run, tmp_path):
    encode(str(run / "run"), str(tmp_path / "z"), device="cpu")
    options = dict(wandb="disabled", device="cpu", val_every=0, media_every=0)
    unet = UNet((4, 8), 1, (False, True), (0, 4), 4)
    where = str(tmp_path / "z"), str(tmp_path / "ldm")
    assert train_ldm(*where, unet, batch_size=2, max_steps=2, **options) == 0
    sample(ldm=where[1], out_dir=str(tmp_path / "new"), n=1, steps=2, media=False, device="cpu")
    (drawn,) = (tmp_path / "new").rglob("sample_*.nii.gz")
    assert np.isfinite(read_volume(drawn).data).all()


def test_codes_beyond_the_codebook_are_refused_by_name(run, tmp_path):
    encode(str(run / "run"), str(tmp_path / "z"), device="cpu")
    path = tmp_path / "z" / "v0.safetensors"
    latent = read_latent(path)
    write_latent(path, latent.mean, latent.logvar, latent.info, latent.codes + 10**6)
    with pytest.raises(ValueError, match=r"v0.safetensors: has codes beyond the"):
        decode(str(path), str(run / "run"), str(tmp_path / "d"), device="cpu")


def test_plan_and_the_facts_of_a_run_count_codes(tmp_path, capsys):
    from vae3d.commands.plan import plan

    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "{class_path: CustomVAE, init_args: {channels: [4, 8], norm: NoNorm, latent_channels: 8,"
        " posterior: {class_path: FSQ, init_args: {levels: [4, 4, 4, 4]}}}}"
    )
    plan(str(recipe), patch_size=(8, 8, 8), device="cpu")
    assert "2 codes of 256 a latent voxel, 2 bit a voxel" in capsys.readouterr().out


def test_a_folder_of_save_pretrained_has_the_codebook(tmp_path):
    vae = coded().eval()
    vae.save_pretrained(tmp_path)
    again = CustomVAE.from_pretrained(tmp_path)
    x = torch.rand(1, 1, *SHAPE)
    assert torch.equal(again(x)[0], vae(x)[0])
