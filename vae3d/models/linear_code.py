"""The best linear code of blocks as a shortcut round the two networks of a VAE.

    mean(x) = A x + encoder(x)          recon(z) = B z + decoder(z)

A and B work on blocks of `factor` voxels that do not overlap. They begin as whitened principal
components of the training volumes' blocks and both networks begin at zero, so that training starts
at the reconstruction of the best linear code of its size (Baldi and Hornik, 1989), with latents of
mean 0 and standard deviation 1, and goes on from there; A and B are weights like all others.

Axes: b batch, c channels, x y z space in storage order.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.conv import CONV, CONV_TRANSPOSE
from vae3d.models.norm import wide

MAX_BLOCK = 4096  # values; principal components of larger blocks take minutes and gigabytes


class LinearCode(nn.Module):
    """A strided convolution to the latent and a transposed one back, each of one block.

    Args:
        spatial_dims: 2 or 3.
        channels: Channels of the volume.
        latent_channels: Channels of the latent; those beyond a block's values begin at zero.
        factor: Voxels of a block per axis.
    """

    def __init__(
        self, spatial_dims: int, channels: int, latent_channels: int, factor: Sequence[int]
    ):
        super().__init__()
        block = tuple(factor)
        self.analysis = CONV[spatial_dims](channels, latent_channels, block, block)
        self.synthesis = CONV_TRANSPOSE[spatial_dims](latent_channels, channels, block, block)

    def encode(self, x: Tensor) -> Tensor:
        """Code of `(B, C, *spatial)`, sizes that are multiples of the block, in float32."""
        return wide(self.analysis(x))

    def decode(self, z: Tensor) -> Tensor:
        """Linear reconstruction `(B, C, *spatial * factor)` of a latent `(B, C', *spatial)`."""
        return self.synthesis(z)

    def begin(self, mean: Tensor, components: Tensor, std: Tensor) -> None:
        """Take over principal components, so that codes have mean 0 and standard deviation 1.

        Args:
            mean: Mean block, `(C * block,)`, channels first.
            components: Orthonormal rows, `(number, C * block)`, at most the latent's channels.
            std: Standard deviation of the blocks along each of them, `(number,)`.
        """
        kept = len(components)
        std = std.clamp(min=1e-6 * float(std.max()) or 1.0)[:, None]  # of constant volumes: 0
        new = {name: torch.zeros(old.shape) for name, old in self.state_dict().items()}
        blocks = new["analysis.weight"].flatten(1)
        # What is added per channel is the same at every voxel of a block.
        level = mean.view(self.analysis.in_channels, -1).mean(1)
        even = level.repeat_interleave(len(mean) // len(level))
        blocks[:kept] = components / std
        new["analysis.bias"] -= blocks @ even
        new["synthesis.weight"].flatten(1)[:kept] = components * std
        new["synthesis.bias"] += level
        self.load_state_dict(new)

    def fit_synthesis(self, z: Tensor, blocks: Tensor) -> None:
        """Reconstruct blocks from their latents by least squares, where these are not what `encode`
        gives but something near.

        Args:
            z: Latents, `(n, C')`.
            blocks: Their blocks, `(n, C, *block)`.
        """
        z, values = z.double(), blocks.flatten(1).double()
        around, level = z.mean(0), values.mean(0)
        spread, together = (z - around).T @ (z - around), (z - around).T @ (values - level)
        least = 1e-9 * float(spread.diagonal().max()) or 1.0  # channels that are always the same
        weight = torch.linalg.solve(spread + least * torch.eye(len(spread)).to(spread), together)
        bias = (level - around @ weight).view(blocks.shape[1], -1).mean(1)
        weight = weight.view(self.synthesis.weight.shape)
        self.synthesis.load_state_dict({"weight": weight, "bias": bias})


def added_to_mean(moments: Tensor, code: Tensor) -> Tensor:
    """Add a code to the mean of moments, which is in their first channels.

    Args:
        moments: Of a posterior, `(B, n C, *spatial)`.
        code: `(B, C, *spatial)`.
    """
    others = moments.shape[1] - code.shape[1]
    return moments + F.pad(code, (0, 0) * (code.dim() - 2) + (0, others))


def too_large(channels: int, factor: Sequence[int]) -> str | None:
    """Why blocks of `factor` voxels are too large for principal components; None if they are not.

    Args:
        channels: Channels of the volume.
        factor: Voxels of a block per axis.
    """
    if (values := channels * prod(factor)) <= MAX_BLOCK:
        return None
    return (
        f"linear_code: a block of {' x '.join(map(str, factor))} voxels with {channels} channels"
        f" has {values} values, {MAX_BLOCK} is the most; shrink less, or set it to false"
    )
