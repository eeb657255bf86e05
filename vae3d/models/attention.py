"""Attention over the voxels of a feature map: the sockets `attention` and `mid_attention`.

Axes: b batch, c channels, x y z space, n tokens (one per voxel, in storage order), h heads,
d channels of a head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.models.conv import per_axis
from vae3d.models.norm import NoNorm, Norm, wide
from vae3d.models.upsample import LINEAR

# A padded volume and its windows: n counts the windows, w the voxels of a window.
VOLUME_AND_WINDOWS = {
    2: ("b h (nx wx) (ny wy) d", "(b nx ny) h (wx wy) d"),
    3: ("b h (nx wx) (ny wy) (nz wz) d", "(b nx ny nz) h (wx wy wz) d"),
}


class Attention(nn.Module):
    """Contract of an attention layer: `Attention(channels, spatial_dims, norm, **options)`.

    It maps `(B, C, *spatial)` to the same shape as `x + proj(mix(qkv(norm(x))))`. A subclass
    defines `mix`, or `forward` where it is not of that form.

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
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide {channels} channels")
        self.channels, self.spatial_dims, self.num_heads = channels, spatial_dims, num_heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels) if out_proj else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to the same shape."""
        # In this order channels stay innermost, as in MONAI, so noise drawn like it is the same.
        return self.update(x) + x

    def update(self, x: Tensor) -> Tensor:
        """What attention adds to `x`."""
        return self.joined(self.mix(*self.heads(self.norm(x)), x.shape[2:]), x.shape)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, H, N, D)` of what is normalized."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
        return q, k, v

    def joined(self, mixed: Tensor, shape: Sequence[int]) -> Tensor:
        """The projection of mixed values `(B, H, N, D)`, laid out as a volume of `shape`."""
        tokens = self.proj(rearrange(mixed, "b h n d -> b n (h d)"))
        return tokens.transpose(1, 2).reshape(shape)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> Tensor:
        """Mix the values of the tokens, which lie on `grid`.

        Args:
            q: Queries `(B, H, N, D)`.
            k: Keys `(B, H, N, D)`.
            v: Values `(B, H, N, D)`.
            grid: Voxels per axis; their product is N.

        Returns:
            `(B, H, N, D)`.
        """
        raise NotImplementedError


class GlobalAttention(Attention):
    """Softmax attention of every voxel to every voxel.

    Args:
        channels: Channels of input and output, a multiple of `num_heads`.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        num_heads: Heads.
        out_proj: Project the heads' output linearly before it is added to the input.
        relative_position_bias: Grid, in voxels per axis of this layer, for which a learned bias
            per offset is made; other grids interpolate it. None for no bias.
    """

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        norm: Callable[[int], Norm],
        num_heads: int = 1,
        out_proj: bool = True,
        relative_position_bias: tuple[int, ...] | None = None,
    ):
        super().__init__(channels, spatial_dims, norm, num_heads, out_proj)
        self.bias = None
        if relative_position_bias is not None:
            grid = per_axis(relative_position_bias, spatial_dims, "relative_position_bias")
            self.bias = RelativeBias(num_heads, grid)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> Tensor:
        """Softmax attention over all tokens."""
        return attend(q, k, v, None if self.bias is None else self.bias(grid).to(q.dtype))


class PatchAttention(Attention):
    """Softmax attention inside windows; the last windows are padded, the padding is masked.

    A window that reaches beyond the grid on both sides costs no more than one of the grid's size.
    `torch.export` takes any size as a fixed one; as a dynamic one, multiples of the window.

    Args:
        channels: Channels of input and output, a multiple of `num_heads`.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        num_heads: Heads.
        out_proj: Project the heads' output linearly before it is added to the input.
        window: Voxels of a window, one number or one per axis.
        shift: Start the windows half a window before the volume, so that two layers, one shifted,
            exchange across window faces.
        relative_position_bias: Learn a bias per offset inside the window.
    """

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        norm: Callable[[int], Norm],
        num_heads: int = 1,
        out_proj: bool = True,
        window: int | tuple[int, ...] = 8,
        shift: bool = False,
        relative_position_bias: bool = False,
    ):
        super().__init__(channels, spatial_dims, norm, num_heads, out_proj)
        self.window = per_axis(window, spatial_dims, "window")
        self.shift = tuple(w // 2 if shift else 0 for w in self.window)
        self.bias = RelativeBias(num_heads, self.window) if relative_position_bias else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> Tensor:
        """Softmax attention over the tokens of each window."""
        real = self.to_windows(q.new_ones(q.shape[0], 1, q.shape[2], 1), grid)
        # Every window holds a real token, so no row of the softmax is empty.
        bias = torch.zeros_like(real).masked_fill(real == 0, float("-inf")).transpose(2, 3)
        if self.bias is not None:
            window = [w for w, _ in self.frame(grid)]
            bias = bias + self.bias.within(window).to(q.dtype)
        q, k, v = (self.to_windows(t, grid) for t in (q, k, v))
        return self.to_grid(attend(q, k, v, bias), grid)

    def frame(self, grid: Sequence[int]) -> list[tuple[int, int]]:
        """Window and shift per axis: an axis that lies in one window has a window of its length."""
        axes = zip(grid, self.window, self.shift, strict=True)
        return [(n, 0) if n + s <= w else (w, s) for n, w, s in axes]

    def counts(self, grid: Sequence[int]) -> list[int]:
        """Windows per axis that cover `grid`."""
        return [(n + s + w - 1) // w for n, (w, s) in zip(grid, self.frame(grid), strict=True)]

    def sizes(self, grid: Sequence[int]) -> dict[str, int]:
        """Values of the letters of `VOLUME_AND_WINDOWS`."""
        axes = zip("xyz", self.counts(grid), self.frame(grid), strict=False)
        return {
            name: size
            for axis, count, (w, _) in axes
            for name, size in ((f"n{axis}", count), (f"w{axis}", w))
        }

    def to_windows(self, t: Tensor, grid: Sequence[int]) -> Tensor:
        """`(B, H, N, D)` on `grid` to `(B * windows, H, tokens of a window, D)`, zero-padded."""
        volume, windows = VOLUME_AND_WINDOWS[self.spatial_dims]
        axes = zip(grid, self.counts(grid), self.frame(grid), strict=True)
        padding = [(s, count * w - n - s) for n, count, (w, s) in axes]  # whole windows
        far_axis_first = [n for pair in reversed(padding) for n in pair]
        t = F.pad(t.unflatten(2, tuple(grid)), (0, 0, *far_axis_first))
        return rearrange(t, f"{volume} -> {windows}", **self.sizes(grid))

    def to_grid(self, t: Tensor, grid: Sequence[int]) -> Tensor:
        """Inverse of `to_windows`, without the padding."""
        volume, windows = VOLUME_AND_WINDOWS[self.spatial_dims]
        t = rearrange(t, f"{windows} -> {volume}", **self.sizes(grid))
        inside = [slice(s, s + n) for n, (_, s) in zip(grid, self.frame(grid), strict=True)]
        return t[(slice(None), slice(None), *inside)].flatten(2, -2)


class LinearAttention(Attention):
    """Attention without a softmax over pairs: cost grows with the number of voxels, not its square.

    Keys are softmax-normalized over the tokens, and `sum_n k_n v_n^T` is applied to every query
    (the `linear` attention of CompVis).

    Args:
        channels: Channels of input and output, a multiple of `num_heads`.
        spatial_dims: 2 or 3.
        norm: Makes a norm from a channel count.
        num_heads: Heads.
        out_proj: Project the heads' output linearly before it is added to the input.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> Tensor:
        """Apply the `(D, D)` summary of keys and values to every query."""
        context = torch.einsum("bhnd,bhne->bhde", wide(k).softmax(dim=2).to(v.dtype), v)
        return torch.einsum("bhnd,bhde->bhne", q, context)


class BareLinearAttention(LinearAttention):
    """Linear attention as CompVis has it: one head, no norm, no residual, no bias in `qkv`.

    Args:
        channels: Channels of input and output.
        spatial_dims: 2 or 3.
        norm: Not used.
    """

    def __init__(self, channels: int, spatial_dims: int, norm: Callable[[int], Norm]):
        super().__init__(channels, spatial_dims, NoNorm)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, *spatial)` to the same shape."""
        return self.update(x)


class RelativeBias(nn.Module):
    """A learned number per head and offset between two tokens of a grid.

    Args:
        num_heads: Heads.
        grid: Voxels per axis for which the table is made.
    """

    def __init__(self, num_heads: int, grid: Sequence[int]):
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.empty(num_heads, *(2 * n - 1 for n in grid)))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Sequence[int]) -> Tensor:
        """Bias `(H, N, N)` of query (first) and key tokens on `grid`, resized to it."""
        return self.of_queries(grid, [slice(None)] * len(grid))

    def of_queries(self, grid: Sequence[int], queries: Sequence[slice]) -> Tensor:
        """The rows of the bias that belong to a part of the queries, `(H, n, N)`.

        Args:
            grid: Voxels per axis.
            queries: Part of the grid per axis.
        """
        return self.of_pairs(self.resized(grid), grid, queries)

    def resized(self, grid: Sequence[int]) -> Tensor:
        """The table `(H, *(2 n - 1))` of the offsets on `grid`."""
        size = [2 * n - 1 for n in grid]
        mode = LINEAR[len(grid)]  # exact where the size stays
        return F.interpolate(self.table[None], size, mode=mode, align_corners=True)[0]

    def within(self, grid: Sequence[int]) -> Tensor:
        """Bias `(H, N, N)` of a part, `grid`, of the grid that the table is made for."""
        axes = zip(self.grid, grid, strict=True)
        table = self.table[(slice(None), *(slice(w - n, w + n - 1) for w, n in axes))]
        return self.of_pairs(table, grid, [slice(None)] * len(grid))

    @staticmethod
    def of_pairs(
        table: Tensor,
        grid: Sequence[int],
        queries: Sequence[slice],
        keys: Sequence[slice] | None = None,
    ) -> Tensor:
        """Lay a table of the offsets on `grid` out by query and key, parts of it or all."""
        for axis, n in enumerate(grid, start=1):  # offsets i - j to (i, j), axis by axis
            places = torch.arange(n, device=table.device)
            i = places[queries[axis - 1]]
            j = places if keys is None else places[keys[axis - 1]]
            offsets = (i[:, None] - j + n - 1).flatten()
            pairs = (i.shape[0], j.shape[0])
            table = table.index_select(2 * axis - 1, offsets).unflatten(2 * axis - 1, pairs)
        dims = len(grid)
        queries_first = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2)]
        return table.permute(queries_first).flatten(1 + dims).flatten(1, dims)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `(B, H, N, D)` queries to keys and values, scaled by `D ** -0.5`.

    Args:
        q: Queries `(B, H, N, D)`.
        k: Keys `(B, H, M, D)`.
        v: Values `(B, H, M, D)`.
        bias: Added to the scores, broadcast to `(B, H, N, M)`; None for none.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
