"""Latent probes measure what they say, draw it, and leave no trace in training."""

from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.posterior import DiagonalGaussian
from vae3d.tracking import probes as module
from vae3d.tracking.probes import DRAWS, NOISE, LatentProbes, cut_patch


class Halves(torch.nn.Module):
    """A VAE that anyone can compute: every second voxel is the mean, decoding repeats it."""

    def __init__(self, logvar=-2.0):
        super().__init__()
        self.logvar = torch.nn.Parameter(torch.tensor(logvar))

    def encode(self, x):
        mean = x[(..., *(slice(None, None, 2),) * (x.ndim - 2))]
        return DiagonalGaussian(mean, torch.full_like(mean, float(self.logvar)))

    def decode(self, z):
        return torch.nn.functional.interpolate(z, scale_factor=2)


def volumes(*shape, count=2, channels=1):
    return [torch.rand(channels, *shape) for _ in range(count)]


def tiny_vae(dims):
    return CustomVAE(
        spatial_dims=dims,
        channels=(4, 8),
        num_res_blocks=1,
        latent_channels=3,
        norm=partial(GroupNorm, num_groups=4),
    ).eval()


def test_numbers_are_those_of_the_latents():
    a, b = volumes(8, 6, 4)
    measured = LatentProbes([a, b]).measure(Halves(logvar=-2.0))
    means = torch.stack([a, b])[..., ::2, ::2, ::2]
    kl = 0.5 * (means**2 + np.exp(-2) - 1 + 2)
    assert measured.numbers["latent/kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert measured.numbers["latent/posterior_std"] == pytest.approx(np.exp(-1), rel=1e-5)
    assert measured.numbers["latent/mean_std"] == pytest.approx(float(means.std()), rel=1e-4)
    assert measured.numbers["latent/channels"] == measured.numbers["latent/active_channels"] == 1


def test_each_channel_has_a_histogram_of_means_of_stds_and_of_kl():
    """Three side by side, each with its own values: bars stand where the values are."""
    values = np.array([np.full(50, 2.0), np.full(50, -2.0)])
    std = np.array([np.full(50, 0.5), np.full(50, 1.0)])
    kl = np.array([np.full(50, 3.0), np.full(50, 0.0)])
    measured = module.Measured({}, [], [], [], [], [], values, std, kl)
    picture = module.draw_channels(measured).astype(int)
    rows = [slice(34 + r * 122, 34 + r * 122 + 84) for r in range(2)]
    columns = [slice(10 + k * 240, 10 + k * 240 + 230) for k in range(3)]

    def bar(row, column, color):
        """Middle of what has a color, as a part of the panel's width."""
        panel = picture[rows[row], columns[column]]
        near = np.abs(panel - color).max(-1) < 8
        assert near.any(), f"no bar in row {row}, column {column}"
        return np.median(np.nonzero(near)[1]) / 230

    ends = {0: (-4, 4), 1: (0, 1), 2: (0, 3)}
    for row, color in enumerate((module.BARS, module.DEAD)):  # the second channel has no KL
        for column, kind in enumerate((values, std, kl)):
            low, high = ends[column]
            place = (kind[row, 0] - low) / (high - low)
            assert bar(row, column, color) == pytest.approx(place, abs=0.03)


def test_a_collapsed_channel_is_not_active():
    measured = LatentProbes([torch.zeros(1, 8, 8, 8)]).measure(Halves(logvar=0.0))
    assert measured.numbers["latent/active_channels"] == 0
    assert measured.numbers["latent/kl"] == 0


def test_noise_grows_and_the_way_leads_from_one_volume_to_the_other():
    a, b = volumes(8, 6, 4)
    measured = LatentProbes([a, b]).measure(Halves())
    plain, *noisy = measured.noise
    away = [np.abs(n - plain).mean() for n in noisy]
    np.testing.assert_allclose(np.array(away) / away[-1], np.array(NOISE[1:]) / 2, rtol=1e-4)
    repeated = a[0, ::2, ::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    np.testing.assert_allclose(measured.between[0], repeated[..., 1], atol=1e-6)
    ends = measured.between[0] * 0.4 + measured.between[-1] * 0.6
    np.testing.assert_allclose(measured.between[3], ends, atol=1e-6)


def test_fitted_draws_have_the_mean_and_covariance_of_the_latents():
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, -1.0, 0.1]])
    values = root @ torch.randn(3, 20000, generator=generator) + torch.tensor([[5.0], [0.0], [-3]])
    center, found = module._fit(values)
    torch.testing.assert_close(center, values.mean(1))
    torch.testing.assert_close(found @ found.T, torch.cov(values), rtol=1e-4, atol=1e-4)
    constant, zero = module._fit(torch.ones(1, 10))
    assert constant.tolist() == [1.0] and zero.abs().max() == 0


class OnMPS(torch.Tensor):
    """A tensor that cannot be float64 where it is."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_fit_is_made_on_the_cpu_where_the_device_has_no_float64():
    values = torch.randn(3, 50)
    found = module._fit(values.as_subclass(OnMPS))
    for ours, theirs in zip(found, module._fit(values), strict=True):
        assert torch.equal(ours, theirs)


def test_measuring_is_repeatable_and_leaves_the_random_state_alone():
    probes, vae = LatentProbes(volumes(8, 8, 8)), Halves()
    before = torch.get_rng_state()
    one, two = probes.measure(vae), probes.measure(vae)
    assert torch.equal(before, torch.get_rng_state())
    assert all((p == q).all() for p, q in zip(one.prior, two.prior, strict=True))
    assert vae.logvar.grad is None


@pytest.mark.parametrize("shape", [(12, 8, 10), (12, 10)])
def test_all_pictures_are_drawn_for_2d_and_3d(tmp_path, shape):
    probes = LatentProbes(volumes(*shape), spacing_mm=(1.0, 1.0, 2.0))
    measured = probes.measure(tiny_vae(len(shape)))
    files = probes.draw(measured, tmp_path)
    assert sorted(files) == [
        f"latent/{name}" for name in ("between", "channels", "draws", "noise", "slices")
    ]
    for panel, path in files.items():
        picture = iio.imread(path)
        assert path.name == panel.replace("/", "_") + ".png"
        assert picture.std() > 5, f"{panel} is empty"
    assert len(measured.prior) == len(measured.fitted) == DRAWS
    assert len(measured.latents) == 3
    assert measured.values.shape == measured.std.shape == measured.kl.shape
    assert len(measured.kl) == 3
    assert 0 < measured.nbytes < 1e6


def test_one_volume_is_enough_but_there_is_no_way_to_another(tmp_path):
    probes = LatentProbes(volumes(8, 8, 8, count=1))
    measured = probes.measure(Halves())
    assert measured.between == [] and "latent/between" not in probes.draw(measured, tmp_path)
    with pytest.raises(ValueError, match="at least one volume"):
        LatentProbes([])


def test_patches_lie_round_the_anatomy_and_inside_the_volume():
    x = torch.zeros(1, 20, 20, 9)
    x[0, 16:19, 1:4, 4] = 1
    patch = cut_patch(x, (8, 8, 16))
    assert patch.shape == (1, 8, 8, 9) and patch.sum() == x.sum()
    with pytest.raises(ValueError, match="patch_size"):
        cut_patch(x, (8, 8))


def test_whole_volumes_of_different_sizes_are_cut_to_the_smallest():
    probes = LatentProbes([torch.rand(1, 12, 8, 6), torch.rand(1, 8, 10, 6)])
    assert [tuple(p.shape) for p in probes.patches] == [(1, 8, 8, 6)] * 2
