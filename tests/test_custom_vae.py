"""CustomVAE: shapes, gradients, sampling, checkpointing, recipe."""

from functools import partial

import pytest
import torch

from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm

TINY = {"channels": (4, 8), "norm": partial(GroupNorm, num_groups=4)}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_any_size_goes_in_and_the_same_comes_out(spatial_dims):
    vae = CustomVAE(spatial_dims=spatial_dims, **TINY)
    for size in [(16, 12, 20), (9, 7, 13), (1, 2, 3)]:
        x = torch.randn(2, 1, *size[:spatial_dims])
        recon, posterior = vae(x)
        assert recon.shape == x.shape
        assert posterior.mean.shape[2:] == tuple((n + 1) // 2 for n in size[:spatial_dims])


def test_every_encoder_parameter_gets_a_gradient_from_the_reconstruction_alone():
    vae = CustomVAE(**TINY)
    recon, _ = vae(torch.randn(2, 1, 8, 12, 16))
    recon.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
