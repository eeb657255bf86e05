import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from toys import ToyBatch, on_ranks, tiny_vae, toy_trainer

from vae3d.losses import vae_loss
from vae3d.losses.kl import KL
from vae3d.losses.latents import (
    NoiseRobust,
    ScaleEquivariance,
    SpectrumMatching,
    StructuredChannels,
)
from vae3d.losses.reconstruction import L2, SSIM
from vae3d.losses.term import Decoding
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import DiagonalGaussian
from vae3d.spectrum import high_frequency_share, pooled_to, resized
from vae3d.training.distributed import World
from vae3d.training.task import VAETask, noise_of_sample

TERMS = [SpectrumMatching, ScaleEquivariance, NoiseRobust, StructuredChannels]


def decoding_of(z, decode=None):
    return Decoding(z, z, decode or (lambda z: z))


def smooth(*shape):
    x = torch.rand(shape)
    for axis in range(2, len(shape)):
        x = (x + x.roll(1, axis)) / 2
    return x


def batch_of(count=3, shape=(8, 4, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ToyBatch(torch.rand(count, 1, *shape, generator=generator), torch.arange(count))


# Spectrum matching


def reference_spectrum(x, bins):
    """Rings of the power of one sample `(C, *spatial)`, in float64 by SciPy's DCT."""
    power = (dctn(x, axes=range(1, x.ndim), norm="ortho") ** 2).mean(0)
    power[(0,) * power.ndim] = 0
    axes = np.meshgrid(*(np.arange(n) / n for n in power.shape), indexing="ij")
    radius = np.sqrt(sum(k**2 for k in axes))
    ring = np.minimum((radius / radius.max() * bins).astype(int), bins - 1)
    return np.array([power[ring == n].mean() if (ring == n).any() else 0 for n in range(bins)])


@pytest.mark.parametrize("cells", [(6, 5, 8), (7, 10)])
@pytest.mark.parametrize(("delta", "bins"), [(1.0, 16), (0.0, 5)])
def test_spectrum_matching_equals_its_definition_in_float64(cells, delta, bins):
    x = smooth(2, 1, *(4 * n for n in cells))
    z = torch.randn(2, 3, *cells)
    term = SpectrumMatching(delta=delta, bins=bins)
    got = term(x, None, decoding=decoding_of(z)).item()

    wanted = []
    for volume, latent in zip(x.double().numpy(), z.double().numpy(), strict=True):
        blocks = volume.reshape(1, *(n for size in cells for n in (size, 4)))
        pooled = blocks.mean(axis=tuple(range(2, blocks.ndim, 2)))
        target = reference_spectrum(pooled, bins) * np.arange(1, bins + 1) ** delta
        p, q = np.log1p(target), np.log1p(reference_spectrum(latent, bins))
        p, q = p / p.sum(), q / q.sum()
        wanted.append(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
    assert got == pytest.approx(np.mean(wanted), rel=1e-4)


def test_spectrum_matching_is_zero_for_a_latent_that_is_its_input_and_grows_with_noise():
    x = smooth(1, 1, 16, 12, 20)
    z = pooled_to(x, (8, 6, 10))
    term = SpectrumMatching(delta=0.0)
    gaps = [
        term(x, None, decoding=decoding_of(z + noise * torch.randn_like(z))).item()
        for noise in (0.0, 0.1, 1.0)
    ]
    assert gaps[0] == pytest.approx(0, abs=1e-6) and gaps[0] < gaps[1] < gaps[2]


def test_spectrum_matching_moves_the_encoder_and_never_the_decoder():
    vae, x = tiny_vae(), batch_of().image
    z = vae.encode(x).sample()
    SpectrumMatching()(x, None, decoding=decoding_of(z, vae.decode)).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.encoder[0].parameters())
    assert all(p.grad is None for p in vae.decoder.parameters())


def test_high_frequency_share_tells_noise_from_what_is_smooth():
    noise, flat = torch.randn(1, 2, 16, 16, 16), torch.ones(1, 1, 8, 8, 8)
    slow = torch.linspace(0, 1, 16).reshape(1, 1, 16, 1, 1).expand(1, 1, 16, 16, 16)
    assert high_frequency_share(noise).item() == pytest.approx(0.71, abs=0.05)  # white: its part
    assert high_frequency_share(slow).item() < 1e-3
    assert high_frequency_share(flat).item() < 1e-4, "nothing moves in it"


# Scale equivariance


def reference_resize(x, sizes):
    """Linear resampling of `(B, C, *spatial)` in float64 by NumPy's interp."""
    for axis, m in enumerate(sizes, start=2):
        n = x.shape[axis]
        at = (np.arange(m) + 0.5) * n / m - 0.5
        x = np.apply_along_axis(lambda line, at=at, n=n: np.interp(at, np.arange(n), line), axis, x)
    return x


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_scale_equivariance_equals_its_definition_in_float64(step):
    x, z = torch.rand(2, 1, 16, 12, 20), torch.randn(2, 1, 8, 6, 10)

    def decode(z):
        return 0.5 * z.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)

    got = ScaleEquivariance(distance=L2)(x, None, None, step, decoding=decoding_of(z, decode))
    by = random.Random(f"scale {step}").randint(2, 4)
    grid = [max(n // by, 1) for n in (8, 6, 10)]
    small = 0.5 * reference_resize(z.double().numpy(), grid)
    for axis in (2, 3, 4):
        small = small.repeat(2, axis)
    wanted = reference_resize(x.double().numpy(), [2 * n for n in grid])
    assert got.item() == pytest.approx(((small - wanted) ** 2).mean(), rel=1e-5)


def test_scales_from_two_to_four_are_drawn_by_the_step_alone():
    sizes = []

    def decode(z):
        sizes.append(tuple(z.shape[2:]))
        return z

    x = torch.rand(1, 1, 12, 12)
    for step in (*range(12), 0):
        ScaleEquivariance()(x, None, None, step, decoding=decoding_of(x, decode))
    assert {*sizes} == {(6, 6), (4, 4), (3, 3)} and sizes[-1] == sizes[0]


def test_half_size_is_the_mean_of_pairs_and_resizing_equals_torch():
    x = torch.rand(1, 1, 8, 6)
    torch.testing.assert_close(resized(x, (4, 3)), torch.nn.functional.avg_pool2d(x, 2))
    x = torch.rand(2, 3, 9, 8, 10)
    wanted = torch.nn.functional.interpolate(x, (3, 5, 7), mode="trilinear")
    torch.testing.assert_close(resized(x, (3, 5, 7)), wanted)


def test_scale_equivariance_moves_encoder_and_decoder():
    vae, x = tiny_vae(), batch_of().image
    z = vae.encode(x).sample()
    ScaleEquivariance()(x, None, None, decoding=decoding_of(z, vae.decode)).backward()
    for half in (vae.encoder, vae.decoder):
        assert all(p.grad is not None and p.grad.any() for p in half[0].parameters())


def test_scale_equivariance_takes_volumes_that_the_network_pads():
    vae, x = tiny_vae(), torch.rand(1, 1, 9, 4, 11)
    z = vae.encode(x).sample()  # of 10 x 4 x 12
    term = ScaleEquivariance(shrink=(2, 2))
    got = term(x, None, None, decoding=decoding_of(z, vae.decode))
    padded = torch.nn.functional.pad(x, (0, 1, 0, 0, 0, 1), mode="replicate")
    wanted = term(padded, None, None, decoding=decoding_of(z, vae.decode))
    assert got.item() == wanted.item()


def test_voxels_that_count_nothing_change_neither_scale_equivariance_nor_its_gradient():
    vae, x = tiny_vae(), torch.rand(1, 1, 8, 8, 8)
    weight = torch.ones_like(x)
    weight[..., :3] = 0

    def value_and_slope(x):
        z = vae.encode(batch_of(1, (8, 8, 8)).image).mean.detach().requires_grad_(True)
        loss = VAELoss(kl=partial(KL, weight=0.0), extra=[ScaleEquivariance])
        recon = vae.decode(z)
        terms = loss(x, recon, vae.encode(x), 0, weight=weight, decoding=decoding_of(z, vae.decode))
        return terms["scale_equivariance"], torch.autograd.grad(terms["loss"], z)[0]

    other = torch.where(weight > 0, x, 100 * torch.rand_like(x))
    for a, b in zip(value_and_slope(x), value_and_slope(other), strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_spectrum_matching_with_a_mask_is_a_one_line_error():
    x, z = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 4, 4, 4)
    loss = VAELoss(extra=[SpectrumMatching])
    with pytest.raises(ValueError, match="SpectrumMatching does not know what a mask is"):
        loss(x, x, DiagonalGaussian(z, z), 0, weight=torch.ones_like(x), decoding=decoding_of(z))


# What is decoded instead of the latent


def test_noise_robust_decodes_its_formula():
    z, drawn = torch.randn(3, 4, 5, 6, 7), {}

    def normal(shape, word):
        return drawn.setdefault(word, torch.randn(3, *shape))

    got = NoiseRobust(strength=2.5).disturb(z, normal)
    from scipy.stats import norm

    t = norm.cdf(drawn["share"].double().numpy()).reshape(3, 1, 1, 1, 1)
    wanted = (1 - t) * z.double().numpy() + t * 2.5 * drawn["noise"].double().numpy()
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert len({*t.flatten()}) == 3, "each sample has its own t"


def test_structured_channels_decode_a_prefix_of_each_sample_and_every_length_as_often():
    z = torch.ones(4000, 4, 2, 2)
    got = StructuredChannels(smallest=2).disturb(z, lambda shape, word: torch.randn(4000, *shape))
    kept = got[:, :, 0, 0]
    assert torch.equal(kept, kept.cummin(1).values), "a prefix"
    lengths = kept.sum(1).int().bincount(minlength=5) / 4000
    assert lengths.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3], abs=0.03)


def test_channels_that_are_left_out_get_no_gradient_and_the_others_do():
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    never = StructuredChannels().disturb(z, lambda shape, word: torch.full((1, *shape), -9.0))
    never.sum().backward()
    assert [bool(g.any()) for g in z.grad[0]] == [True, False, False, False]


@pytest.mark.parametrize("term", [NoiseRobust, StructuredChannels])
def test_the_latent_is_disturbed_in_training_alone_and_both_halves_learn_from_it(term):
    vae, batch = tiny_vae(), batch_of()
    task = VAETask(vae, VAELoss(kl=partial(KL, weight=0.0), extra=[term]), seed=3)
    plain = VAETask(vae, VAELoss(kl=partial(KL, weight=0.0)), seed=3)
    disturbed, ordinary = task(batch, 5), plain(batch, 5)
    assert disturbed["recon"] != ordinary["recon"]
    assert disturbed.keys() == ordinary.keys(), "it has no value of its own"
    disturbed["loss"].backward()
    for half in (vae.encoder, vae.decoder):
        assert half[0].weight.grad.any()
    with torch.no_grad():
        assert task.eval()(batch, 5)["recon"] == plain.eval()(batch, 5)["recon"]


def test_more_channels_to_keep_than_there_are_is_refused_before_anything_is_read():
    loss = VAELoss(extra=[partial(StructuredChannels, smallest=8)])
    loss.check((1, 8, 8, 8), (8, 4, 4, 4))
    with pytest.raises(ValueError, match=r"smallest is 8; the latent has 4 channels"):
        loss.check((1, 8, 8, 8), (4, 4, 4, 4))


# In training


def test_a_recipe_may_say_the_plain_names_since_the_loss_loads_their_module():
    assert vars(vae_loss)["latents"] is sys.modules[SpectrumMatching.__module__]


def test_with_all_of_them_off_a_step_is_what_it_was_to_the_bit():
    vae, batch = tiny_vae(), batch_of()
    got = VAETask(vae, VAELoss(), seed=7)(batch, 4)
    posterior = vae.encode(batch.image)
    noise = torch.stack(
        [noise_of_sample(posterior.mean.shape[1:], 7, 4, i, torch.device("cpu")) for i in range(3)]
    )
    recon = vae.crop(vae.decode(posterior.mean + posterior.std * noise), batch.image)
    wanted = VAELoss()(batch.image, recon, posterior, 4)
    assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in wanted.items()}


def fitted(world, batch_size, grad_accum):
    trainer = toy_trainer(
        "/nowhere", world, partial(VAELoss, extra=TERMS), batch_size=batch_size,
        grad_accum=grad_accum, max_steps=3, save_every=0,
    )  # fmt: skip
    trainer.fit()
    return trainer.tracker.losses(), list(trainer.task.network.parameters())


def test_micro_batches_and_ranks_train_by_all_of_them_as_one_large_batch_does():
    losses, weights = fitted(World(), 4, 1)
    for others in ([fitted(World(), 1, 4)], on_ranks(2, fitted, 1, 2)):
        for other, other_weights in others:
            assert other == pytest.approx(losses, rel=1e-5)
            for p, q in zip(other_weights, weights, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_under_autocast_the_second_decode_is_in_half_and_the_formulas_in_float32():
    vae, x = tiny_vae(), batch_of().image
    z = vae.encode(x).sample().detach()
    dtypes = []

    def decode(z):
        out = vae.decode(z)
        dtypes.append(out.dtype)
        return out

    loss = VAELoss(extra=[SpectrumMatching, ScaleEquivariance])
    exact = loss(x, x, vae.encode(x), 0, decoding=decoding_of(z, decode))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(x, x, vae.encode(x), 0, decoding=decoding_of(z, decode))
    assert dtypes == [torch.float32, torch.bfloat16]
    assert mixed["spectrum_matching"] == exact["spectrum_matching"]
    assert mixed["scale_equivariance"].item() == pytest.approx(
        exact["scale_equivariance"].item(), rel=0.05
    )


def test_training_by_spectrum_matching_closes_the_gap():
    loss = VAELoss(recon=L2, extra=[partial(SpectrumMatching, weight=1.0)])
    task, batch = VAETask(tiny_vae(), loss, seed=0), batch_of(2)
    optimizer = torch.optim.Adam(task.parameters(), 3e-2)
    gaps = []
    for _ in range(10):
        optimizer.zero_grad()
        terms = task(batch, 0)
        terms["loss"].backward()
        optimizer.step()
        gaps.append(terms["spectrum_matching"].item())
    assert gaps[-1] < 0.7 * gaps[0]


@pytest.mark.parametrize("distance", [SpectrumMatching, ScaleEquivariance, NoiseRobust])
def test_the_distance_of_scale_equivariance_compares_two_volumes(distance):
    with pytest.raises(ValueError, match=f"distance is {distance.__name__}, which does not"):
        ScaleEquivariance(distance=distance)


def test_what_changes_the_latent_is_no_reconstruction_term():
    with pytest.raises(ValueError, match="NoiseRobust compares nothing"):
        VAELoss(recon=NoiseRobust)


def test_a_window_larger_than_the_smallest_size_is_refused_before_anything_is_read():
    loss = VAELoss(extra=[partial(ScaleEquivariance, distance=partial(SSIM, window=5))])
    loss.check((1, 24, 24, 24), (4, 12, 12, 12))  # 24 / 4 voxels are left at least
    with pytest.raises(ValueError, match=r"ScaleEquivariance.distance at .* \(4, 4, 4\)"):
        loss.check((1, 16, 16, 16), (4, 8, 8, 8))
