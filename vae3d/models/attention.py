"""Attention over the voxels of a feature map: the sockets `attention` and `mid_attention`.

Axes: b batch, c channels, x y z space, n tokens (one per voxel), h heads, d channels of a head.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.models.norm import Norm


class Attention(nn.Module):
    """Contract of an attention layer: `Attention(channels, spatial_dims, norm, **options)`.

    It maps `(B, C, *spatial)` to the same shape and adds its own residual.

    Args:
        channels: Channels of input and output.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
    """

    def __init__(self, channels: int, spatial_dims: int, norm: Callable[[int], Norm]):
        super().__init__()
        self.channels, self.spatial_dims = channels, spatial_dims
        self.norm = norm(channels)


class GlobalAttention(Attention):
    """Softmax attention of every voxel to every voxel.

    Args:
        channels: Channels of input and output, a multiple of `num_heads`.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        num_heads: Heads.
        out_proj: Project the heads' output linearly before it is added to the input.
    """

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        norm: Callable[[int], Norm],
        num_heads: int = 1,
        out_proj: bool = True,
    ):
        super().__init__(channels, spatial_dims, norm)
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide {channels} channels")
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels) if out_proj else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
        out = self.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))
        return x + out.transpose(1, 2).reshape(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `(B, H, N, D)` queries to keys and values, scaled by `D ** -0.5`.

    Args:
        q: Queries `(B, H, N, D)`.
        k: Keys `(B, H, M, D)`.
        v: Values `(B, H, M, D)`.
        bias: Added to the scores, broadcast to `(B, H, N, M)`; None for none.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
