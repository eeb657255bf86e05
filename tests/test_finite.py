"""A volume that is not finite is refused at inference, once and by its name."""

import numpy as np
import pytest
import torch
from toys import tiny_vae

from vae3d.inference.reconstruct import Coding, autoencode
from vae3d.kernels import convolutions


@pytest.mark.parametrize("mode", ["full", "patch", "exact"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_volume_that_is_not_finite_is_refused_by_its_name_in_every_mode(mode, bad):
    vae = tiny_vae().eval()
    x = torch.rand(1, 8, 12, 16)
    x[0, 3, 4, 5] = bad
    with pytest.raises(ValueError, match=r"^sub-01: 1 of 1536 values are NaN or infinite$"):
        autoencode(vae, x, mode, name="sub-01", patch_size=(8, 8, 8))
    coding = Coding(mode, (8, 8, 8))
    z = torch.full((4, 4, 6, 8), bad)
    with pytest.raises(ValueError, match=r"^scan.safetensors: 768 of 768 values"):
        coding.decode(vae, z, name="scan.safetensors")


def test_a_stack_of_slices_is_looked_at_once_and_not_slice_by_slice(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "vae3d.inference.reconstruct.check_finite", lambda x, name: seen.append(name)
    )
    autoencode(tiny_vae(spatial_dims=2).eval(), torch.rand(1, 8, 6, 5), "full", name="a")
    assert seen == ["a"]


def test_four_rows_at_once_spoil_rows_that_a_voxel_does_not_touch():
    """What the check is for: the direct sum keeps the others, these sums do not."""
    x = torch.rand(1, 32, 10, 4, 4)
    x[0, 0, 0] = torch.inf
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(32, 32, 3, 3, 3)
    rows = {n: convolutions.convolve(x, weight, None, (1, 1, 1), together=n) for n in (2, 4)}
    spoiled = {n: (~y.isfinite()).any(dim=(0, 1, 3, 4)).sum().item() for n, y in rows.items()}
    assert spoiled[2] == 2 and spoiled[4] == 4


def test_what_a_network_that_has_diverged_makes_is_measured_and_not_refused():
    vae = tiny_vae().eval()
    torch.nn.init.constant_(vae.quant_conv.weight, torch.nan)
    recon, mean, _ = autoencode(vae, torch.rand(1, 8, 8, 8), "full")
    assert recon.isnan().any() and mean.isnan().all()
