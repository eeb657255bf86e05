"""The posterior: sampling, KL in one convention for every patch size, heads."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import NoNorm
from vae3d.models.posterior import (
    FSQ,
    VQ,
    DiagonalGaussian,
    FixedStdHead,
    LogVarianceHead,
    PosteriorHead,
    SoftplusHead,
)
from vae3d.models.presets import compute_kl_loss

HEADS = [LogVarianceHead, SoftplusHead, FixedStdHead, FSQ, VQ]
FOR_ONE = {FSQ: partial(FSQ, levels=(5,))}  # whose defaults are for several channels


def gaussian(*size):
    return DiagonalGaussian(torch.randn(2, 3, *size), torch.randn(2, 3, *size))


def test_the_list_of_heads_is_complete():
    ours = [c for c in PosteriorHead.__subclasses__() if c.__module__.startswith("vae3d.")]
    assert ours == HEADS


@pytest.mark.parametrize("size", [(4, 5), (4, 5, 6)])
def test_kl_is_torchs_in_2d_and_3d(size):
    p = gaussian(*size)
    expected = kl_divergence(Normal(p.mean, p.std), Normal(0.0, 1.0))
    torch.testing.assert_close(p.kl("none"), expected)
    torch.testing.assert_close(p.kl(), expected.mean())
    torch.testing.assert_close(p.kl("sum"), expected.flatten(1).sum(1).mean())
    torch.testing.assert_close(compute_kl_loss(p.mean, p.std), p.kl("sum"))


def test_kl_does_not_grow_with_the_patch_and_its_sum_does():
    small = gaussian(4, 4, 4)
    large = DiagonalGaussian(small.mean.repeat(1, 1, 2, 2, 2), small.logvar.repeat(1, 1, 2, 2, 2))
    torch.testing.assert_close(large.kl(), small.kl())
    torch.testing.assert_close(large.kl("sum"), 8 * small.kl("sum"))
    torch.testing.assert_close(small.kl("sum"), small.kl() * 3 * 64)


def test_kl_pushes_a_vanishing_sigma_back():
    """A formula fed sigma for log-variance falls as sigma goes to 0 and collapses the posterior."""
    zeros = torch.zeros(1, 1, 2, 2)
    values = [DiagonalGaussian(zeros, zeros + 2 * math.log(s)).kl() for s in (1, 0.1, 0.01, 1e-6)]
    assert values == sorted(values)
    sigmas = [compute_kl_loss(zeros, zeros + s) for s in (1, 0.1, 0.01, 1e-6, 0)]
    assert sigmas == sorted(sigmas)
    assert compute_kl_loss(zeros.half(), zeros.half()).isfinite()


def test_a_sample_carries_gradients_to_mean_and_variance():
    mean, logvar = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2))
    DiagonalGaussian(mean, logvar).sample().square().sum().backward()
    assert mean.grad.abs().sum() > 0
    assert logvar.grad.abs().sum() > 0


def test_samples_have_the_mean_and_the_spread():
    p = DiagonalGaussian(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -2.0))
    z = p.sample()
    assert abs(z.mean() - 3) < 0.01
    assert abs(z.std() - math.exp(-1)) < 0.01


def test_a_generator_and_the_global_one_repeat():
    p = gaussian(4, 4)
    draws = [p.sample(torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(5)
    first = p.sample()
    torch.manual_seed(5)
    strided = DiagonalGaussian(
        p.mean.to(memory_format=torch.channels_last), p.logvar.to(memory_format=torch.channels_last)
    )
    assert torch.equal(strided.sample(), first)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_survives_any_moments_in_half_precision(head):
    head = FOR_ONE.get(head, head)()
    head.fit(2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        moments = torch.tensor([-6e4, -30.0, 0.0, 30.0, 6e4]).to(dtype)
        p = head(moments.view(1, 1, 5).expand(1, 2 * head.num_moments, 5))
        assert p.mean.dtype == torch.float32
        assert p.mean.shape == (1, 2, 5)
        assert p.mean.isfinite().all() and p.std.isfinite().all()
        assert (p.logvar.isfinite() & (p.std > 0) if not head.num_codes else p.std == 0).all()


def test_log_variance_is_clamped_as_in_stable_diffusion():
    p = LogVarianceHead()(torch.tensor([0.0, 0.0, -99.0, 99.0]).view(1, 4, 1))
    assert p.logvar.flatten().tolist() == [-30, 20]


def test_softplus_and_fixed_heads_give_the_sigma_they_promise():
    raw = torch.randn(1, 3, 4)
    p = SoftplusHead(min_std=0.01)(torch.cat([raw, raw], 1))
    torch.testing.assert_close(p.std, torch.nn.functional.softplus(raw) + 0.01)
    torch.testing.assert_close(FixedStdHead(0.3)(raw).std, torch.full_like(raw, 0.3))
    for head, option in ((SoftplusHead, "min_std"), (FixedStdHead, "std")):
        with pytest.raises(ValueError, match="must be positive"):
            head(**{option: 0.0})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("latent_channels", [1, 5])
def test_a_network_takes_any_head_and_latent_width(head, latent_channels):
    head = FOR_ONE.get(head, head)
    vae = CustomVAE(channels=(4, 4), norm=NoNorm, posterior=head, latent_channels=latent_channels)
    recon, posterior = vae(x := torch.randn(1, 1, 4, 4, 4))
    assert recon.shape == x.shape
    assert posterior.mean.shape == posterior.logvar.shape == (1, latent_channels, 2, 2, 2)
