import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vae3d.inference.baselines import BlockPCA, pooled
from vae3d.inference.metrics import (
    METRICS,
    by_channel,
    in_one_unit,
    latent_summary,
    lattice_score,
    mae,
    ms_ssim,
    psnr,
    seam_score,
    ssim,
)
from vae3d.inference.stitching import stitch, tile_faces


@pytest.fixture
def pair():
    x = torch.rand(1, 40, 25, 22)
    x = F.avg_pool3d(F.pad(x[None], (1,) * 6, mode="replicate"), 3, 1)[0]
    return x, x + 0.05 * torch.randn_like(x)


@pytest.mark.parametrize("width", [1.0, 4071.0])
def test_ssim_equals_scikit_image(pair, width):
    from skimage.metrics import structural_similarity

    x, y = (v * width for v in pair)
    theirs = structural_similarity(
        x[0].double().numpy(),
        y[0].double().numpy(),
        data_range=width,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    assert ssim(x, y, width) == pytest.approx(theirs, abs=1e-6)


def test_ssim_equals_monai(pair):
    from monai.metrics import SSIMMetric

    x, y = pair
    theirs = SSIMMetric(spatial_dims=3, data_range=1.0)(y[None].double(), x[None].double())
    assert ssim(x, y, 1.0) == pytest.approx(float(theirs), abs=1e-4)


def test_ssim_of_a_2d_image_equals_scikit_image(pair):
    from skimage.metrics import structural_similarity

    x, y = (v[..., 5] for v in pair)
    theirs = structural_similarity(
        x[0].double().numpy(),
        y[0].double().numpy(),
        data_range=1.0,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    assert ssim(x, y, 1.0) == pytest.approx(theirs, abs=1e-6)


def test_ms_ssim_equals_monai(pair):
    from monai.metrics import MultiScaleSSIMMetric

    x, y = (F.pad(v, (0, 30, 0, 30, 0, 20), mode="replicate") for v in pair)
    weights = (0.3, 0.3, 0.4)
    theirs = MultiScaleSSIMMetric(spatial_dims=3, data_range=1.0, weights=weights)
    theirs = theirs(y[None].double(), x[None].double())
    assert ms_ssim(x, y, 1.0, weights=weights) == pytest.approx(float(theirs), abs=1e-4)


def test_mse_and_psnr_equal_scikit_image(pair):
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio

    x, y = pair
    a, b = x.double().numpy(), y.double().numpy()
    assert METRICS["mse"](x, y, 1.0) == pytest.approx(mean_squared_error(a, b), rel=1e-6)
    theirs = peak_signal_noise_ratio(a, b, data_range=2.0)
    assert psnr(x, y, 2.0) == pytest.approx(theirs, rel=1e-6)


def test_zscored_volumes_are_not_clamped(pair):
    x, y = ((v - 0.5) * 6 for v in pair)
    expected = 20 * math.log10(8.0) - 10 * math.log10(float((x - y).square().mean()))
    assert psnr(x, y, 8.0) == pytest.approx(expected, abs=1e-4)


def test_every_metric_asks_for_the_data_range(pair):
    for metric in METRICS.values():
        with pytest.raises(TypeError):
            metric(*pair)


def test_psnr_and_ssim_do_not_depend_on_the_unit(pair):
    for name in ("psnr", "ssim", "ms_ssim"):
        ours = METRICS[name](*pair, 1.0)
        scaled = METRICS[name](*(v * 1000 for v in pair), 1000.0)
        assert scaled == pytest.approx(ours, rel=1e-4)


def test_an_equal_volume_is_perfect(pair):
    x = pair[0]
    values = {name: metric(x, x.clone(), 1.0) for name, metric in METRICS.items()}
    assert values["mae"] == values["mse"] == 0
    assert values["psnr"] == math.inf
    assert values["ssim"] == pytest.approx(1) and values["ms_ssim"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["mae", "mse", "psnr", "ssim"])
def test_a_mask_counts_its_own_voxels_only(pair, name):
    x, y = pair
    mask = torch.zeros(x.shape[1:], dtype=torch.bool)
    mask[8:30, 6:18, 6:15] = True
    metric = METRICS[name]
    worse = torch.where(mask, y, y + 3)
    if name != "ssim":  # windows of SSIM reach beyond the mask
        assert metric(x, worse, 1.0, mask) == pytest.approx(metric(x, y, 1.0, mask), rel=1e-6)
        cut = (slice(None), slice(8, 30), slice(6, 18), slice(6, 15))
        assert metric(x, y, 1.0, mask) == pytest.approx(metric(x[cut], y[cut], 1.0), rel=1e-6)
    assert metric(x, y, 1.0, torch.ones_like(mask)) == pytest.approx(metric(x, y, 1.0), rel=1e-6)
    assert math.isnan(metric(x, y, 1.0, torch.zeros_like(mask)))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_volumes_of_two_sizes_are_not_compared(pair, metric):
    x, recon = pair
    for other in (recon.repeat(2, 1, 1, 1), recon[:, :1], recon[0]):
        with pytest.raises(ValueError, match="recon"):
            metric(x, other, 1.0)
    with pytest.raises(ValueError, match="recon"):
        seam_score(x, recon[:, :-1], [[8], [8], []])
    with pytest.raises(ValueError, match="faces"):
        seam_score(x, recon, [[8], [8]])


def test_means_of_large_offsets_keep_their_digits():
    x = torch.full((1, 64, 64, 64), 1e4)
    assert METRICS["mae"](x, x + 0.5, 1.0) == pytest.approx(0.5, rel=1e-6)


def test_lattice_score_is_one_for_noise_and_large_for_a_grid_of_cells():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 64, 60, 96, generator=generator)
    noisy = x + 0.3 * torch.rand(x.shape, generator=generator)
    assert lattice_score(x, noisy, (4, 4, 4)) == pytest.approx(1, abs=0.1)
    cells = noisy + 0.5 * (torch.arange(96) % 4 == 0)
    assert lattice_score(x, cells, (4, 4, 4)) > 3
    assert lattice_score(x, cells, (4, 4, 1)) == pytest.approx(1, abs=0.1)  # no cells along z
    assert lattice_score(x, x, (4, 4, 4)) == pytest.approx(1)
    assert math.isnan(lattice_score(x, x, (1, 1, 1)))
    # A blurred image has no grid either: the score is no measure of sharpness.
    blurred = torch.nn.functional.avg_pool3d(x[None], 3, 1, 1)[0]
    assert lattice_score(x, blurred, (4, 4, 4)) == pytest.approx(1, abs=0.15)


def test_pca_equivalent_counts_the_components_that_do_as_well():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 17, 16, 20, generator=generator)
    x[0, :, :, 1:] += x[0, :, :, :-1].clone()
    pca = BlockPCA.fit([x], (2, 2, 2), 6)
    whole = (slice(None), slice(16))
    for count in (1, 3, 6):
        found = pca.equivalent(x[whole], pca(x[whole], count))
        assert found == pytest.approx(count, abs=1e-3)
    between = pca.equivalent(x, (pca(x, 2) + pca(x, 3)) / 2)
    assert 2 < between < 3
    assert pca.equivalent(x, x) == math.inf  # better than all six of them
    assert pca.equivalent(x, torch.full_like(x, 9.0)) == 0.0


def test_seam_score_is_one_without_seams_and_large_with_them():
    torch.manual_seed(0)
    x = torch.zeros(1, 32, 32, 32)
    noise = torch.randn_like(x)
    faces = tile_faces((32,) * 3, (16,) * 3, 0)
    assert seam_score(x, noise, faces) == pytest.approx(1, abs=0.05)
    shifts = iter(torch.randn(8))
    tiled = stitch(lambda t: t + next(shifts), 0.01 * noise, (16,) * 3, 0, "crop")
    assert seam_score(x, tiled, faces) > 10
    assert math.isnan(seam_score(x, noise, [[], [], []]))


def test_seam_score_does_not_blame_tiles_for_the_cells_of_the_latent():
    torch.manual_seed(0)
    x, cells = torch.zeros(1, 32, 32, 32), torch.randn(1, 8, 8, 8)
    for axis in (1, 2, 3):
        cells = cells.repeat_interleave(4, axis)  # the error jumps at multiples of 4
    faces = [[16], [16], [16]]
    assert seam_score(x, cells, faces) > 3
    assert seam_score(x, cells, faces, (4, 4, 4)) == pytest.approx(1, abs=0.2)


def test_blending_lowers_the_seams_of_a_model_whose_tiles_disagree():
    torch.manual_seed(0)
    x = torch.rand(1, 40, 40, 40)
    scores = {}
    for blend, overlap in (("crop", 0.0), ("hann", 0.5)):
        y = stitch(lambda t: t + 0.3 * torch.randn(()), x, (16,) * 3, overlap, blend)
        scores[blend] = seam_score(x, y, tile_faces((40,) * 3, (16,) * 3, overlap, blend))
    assert scores["hann"] < 0.3 * scores["crop"]


def test_latent_summary_counts_channels_that_carry_something():
    mean = torch.randn(3, 4, 4, 4)
    mean[1] = 0.001
    row = latent_summary(mean, torch.zeros_like(mean), num_values=16**3, latent_bits=16)
    assert row["active_channels"] == 2
    assert row["bits_per_voxel"] == 3 * 16 / 64
    assert row["posterior_std"] == pytest.approx(1)
    assert row["kl"] == pytest.approx(float(mean.square().mean() / 2), rel=1e-5)
    assert row["kl_sum"] == pytest.approx(row["kl"] * mean.numel())
    assert row["latent_mean"] == pytest.approx(float(mean.mean()), abs=1e-6)


def test_pooled_baseline_is_pooling_and_linear_upsampling():
    x = torch.rand(2, 16, 13, 9)
    y = pooled(x, (4, 2, 1)).whole()
    padded = F.pad(x[None], (0, 0, 0, 1, 0, 0), mode="replicate")
    coarse = F.avg_pool3d(padded, (4, 2, 1))
    expected = F.interpolate(coarse, padded.shape[2:], mode="trilinear")[0, :, :, :13]
    torch.testing.assert_close(y, expected)


def test_block_pca_is_the_best_linear_code_of_its_size():
    volumes = [torch.rand(1, 16, 12, 8).cumsum(1) for _ in range(3)]
    everything = BlockPCA.fit(volumes, (2, 2, 2), 8)
    torch.testing.assert_close(everything(volumes[0]), volumes[0], atol=1e-4, rtol=0)
    errors = [
        float((BlockPCA.fit(volumes, (2, 2, 2), k)(volumes[0]) - volumes[0]).square().mean())
        for k in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2] > 0
    mean_only = F.interpolate(F.avg_pool3d(volumes[0][None], 2), scale_factor=2.0)[0]
    assert errors[0] <= float((mean_only - volumes[0]).square().mean())


def test_block_pca_keeps_blocks_in_place_and_survives_a_file(tmp_path):
    x = torch.arange(12 * 10 * 9, dtype=torch.float32).reshape(1, 12, 10, 9)
    pca = BlockPCA.fit([x], (2, 3, 1), 6)
    torch.testing.assert_close(pca(x), x, atol=0.05, rtol=0)
    pca.save(tmp_path / "pca.pt")
    loaded = BlockPCA.load(tmp_path / "pca.pt")
    assert torch.equal(loaded(x), pca(x)) and loaded.key == pca.key
    (tmp_path / "pca.pt").write_bytes((tmp_path / "pca.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        BlockPCA.load(tmp_path / "pca.pt")
    assert np.allclose(pca.components @ pca.components.T, np.eye(6), atol=1e-5)


def test_channels_of_one_name_are_measured_together_and_those_of_several_apart(pair):
    x, recon = (torch.cat([v, 2 * v, v + 1, 2 * v]) for v in pair)
    assert by_channel(x, recon, [1.0] * 4, ["a"] * 4) == {}
    found = by_channel(x, recon, [1.0, 2.0, 1.0, 2.0], ["a", "b", "a", "b"], ("mae", "psnr"))
    assert set(found) == {"mae_a", "mae_b", "psnr_a", "psnr_b"}
    assert found["mae_a"] == pytest.approx(mae(*pair, 1.0), rel=1e-5)
    assert found["mae_b"] == pytest.approx(2 * mae(*pair, 1.0), rel=1e-5)
    assert found["psnr_a"] == pytest.approx(found["psnr_b"], rel=1e-5)
    assert in_one_unit(x, recon, [2.0] * 4)[0] is x
    a, b, width = in_one_unit(x, recon, [1.0, 2.0, 1.0, 2.0])
    assert width == 1 and mae(a, b, width) == pytest.approx(mae(*pair, 1.0), rel=1e-5)
