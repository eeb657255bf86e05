import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kurtosis
from toys import tiny_vae

from vae3d.inference.diffusability import diffusability, scale_psnr
from vae3d.inference.metrics import psnr
from vae3d.inference.reconstruct import Coding, autoencode
from vae3d.reports.evaluation_health import find
from vae3d.reports.meanings import LATENT_CHANNELS, STAGE2, meaning
from vae3d.spectrum import (
    high_frequency_share,
    linear,
    linear_rows,
    pooled_to,
    power,
    radius,
    resized,
    rings,
    spectral_gap,
)

SIZE = (17, 12, 14)  # padded to 18 x 12 x 14


def coded(mode="full", **options):
    vae, x = tiny_vae(**options).eval(), torch.rand(1, *SIZE)
    _, mean, logvar = autoencode(vae, x, mode)
    return vae, x, mean, logvar


def measured(vae, x, mean, logvar, mode="full", mask=None):
    return diffusability(vae, Coding(mode), x, mean, logvar, [1.0], mask)


def test_rings_are_means_of_the_power_between_two_radii():
    x = torch.randn(2, 3, 9, 8, 7, dtype=torch.float64)
    found, where = rings(x, 5), (radius(x.shape[2:]) * 5).long().clamp_max(4)
    for ring in range(5):
        wanted = [power(one[None])[0][where == ring].mean().item() for one in x]
        assert found[:, ring].tolist() == pytest.approx(wanted)
    assert rings(x[:, :, :2, :1, :1], 5)[:, 2].tolist() == [0, 0]  # a ring without a frequency


def test_the_metrics_of_a_latent_equal_their_definitions():
    vae, x, mean, logvar = coded()
    row = measured(vae, x, mean, logvar)
    grid = pooled_to(x[None], mean.shape[1:])
    assert row["spectral_gap"] == spectral_gap(grid, mean[None]).item()
    assert row["high_frequency_share"] == high_frequency_share(mean[None]).item()
    assert row["input_high_frequency_share"] == high_frequency_share(grid).item()
    wanted = kurtosis(mean.double().flatten(1).numpy(), axis=1)
    assert row["kurtosis"] == pytest.approx(wanted.mean())
    noise, signal = logvar.double().exp().flatten(1).mean(1), mean.double().flatten(1).var(1, False)
    assert row["noise_share"] == pytest.approx((noise.sum() / (noise + signal).sum()).item())
    for channel in range(len(mean)):
        of = mean[channel].double()
        assert row[f"latent_mean_z{channel}"] == pytest.approx(of.mean().item())
        assert row[f"latent_std_z{channel}"] == pytest.approx(of.std(correction=0).item())
        assert row[f"kurtosis_z{channel}"] == pytest.approx(wanted[channel])
        share = noise[channel] / (noise + signal)[channel]
        assert row[f"noise_share_z{channel}"] == pytest.approx(share.item())


def test_scale_psnr_decodes_the_latent_at_half_its_size():
    vae, x, mean, _ = coded()
    with torch.no_grad():
        got = vae.decode(resized(mean[None], (4, 3, 3)))[0]
    padded = torch.cat((x, x[:, -1:]), 1)
    wanted = psnr(resized(padded[None], (8, 6, 6))[0], got, 1.0)
    assert scale_psnr(vae, Coding("full"), x, mean, [1.0]) == pytest.approx(wanted, rel=1e-6)


def test_the_exact_mode_measures_the_same_scale():
    vae, x, mean, _ = coded()
    full = scale_psnr(vae, Coding("full"), x, mean, [1.0])
    assert scale_psnr(vae, Coding("exact"), x, mean, [1.0]) == pytest.approx(full, rel=1e-3)


def test_a_sliced_axis_keeps_its_size_in_the_scale_of_a_2d_model():
    vae, x = tiny_vae(spatial_dims=2).eval(), torch.rand(1, 8, 12, 5)
    coding = Coding("full", slice_axis=2)
    mean, _ = coding.encode(vae, x)
    with torch.no_grad():
        slices = [vae.decode(resized(z[None], (2, 3)))[0] for z in mean.unbind(-1)]
    wanted = torch.stack([resized(s[None], (4, 6))[0] for s in x.unbind(-1)], -1)
    by_hand = psnr(wanted, torch.stack(slices, -1), 1.0)
    assert scale_psnr(vae, coding, x, mean, [1.0]) == pytest.approx(by_hand, rel=1e-5)


def test_voxels_outside_a_mask_do_not_count_in_the_scale():
    vae, x, mean, _ = coded()
    mask = torch.ones(SIZE, dtype=torch.bool)
    mask[..., :6] = False
    other = torch.where(mask, x, 100.0)
    psnrs = [scale_psnr(vae, Coding("full"), v, mean, [1.0], mask) for v in (x, other)]
    assert psnrs[0] == psnrs[1]


def test_a_constant_channel_is_measured_and_not_nan():
    vae, x, mean, logvar = coded()
    mean[0] = 3.0
    row = measured(vae, x, mean, logvar)
    assert row["kurtosis_z0"] == 0 and row["noise_share_z0"] == 1 and row["latent_mean_z0"] == 3
    assert all(value == value for value in row.values())


def test_the_report_says_what_is_hard_for_a_second_stage_and_which_option_helps():
    hard = {"case": "a", "psnr": 30.0, "scale_psnr": 20.0, "spectral_gap": 0.3}
    hard |= {"high_frequency_share": 0.4, "input_high_frequency_share": 0.1}
    hard |= {"noise_share": 0.8, "kurtosis": 40.0}
    fine = hard | {"scale_psnr": 29.0, "spectral_gap": 0.01, "noise_share": 0.1, "kurtosis": 1.0}

    def said(row):
        found = find([row], [*row][1:], "psnr")
        return " ".join(text for _, text in found if "second stage" in text)

    for words in ("SpectrumMatching", "40 % of its power", "10 % of the input's"):
        assert words in said(hard)
    assert "ScaleEquivariance" in said(hard) and "20.0 dB" in said(hard)
    assert "80 % of the latents" in said(hard) and "kurtosis 40" in said(hard)
    assert said(fine) == ""


def test_what_each_number_of_a_latent_means_is_told_also_of_a_channel():
    row = measured(*coded())
    for name in row:
        of = meaning(name)
        assert of is not None and of.says
        assert of.group == (LATENT_CHANNELS if "_z" in name else STAGE2)


@pytest.mark.parametrize("n, size", [(16, 8), (7, 3), (5, 9), (3, 1), (1, 4)])
def test_linear_resampling_is_that_of_torch_all_at_once_and_by_rows(n, size):
    every = torch.eye(n, dtype=torch.float64)[None]
    wanted = F.interpolate(every, size=size, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(linear(n, size), wanted)
    first, rows = linear_rows(n, size, size // 2, size)
    torch.testing.assert_close(rows, wanted[size // 2 :, first : first + rows.shape[1]])
