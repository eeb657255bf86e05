"""Attention: plain softmax, windows and their padding, relative bias, permutations."""

from functools import partial
from itertools import product

import pytest
import torch

from vae3d.models.attention import (
    GlobalAttention,
    LinearAttention,
    PatchAttention,
    RelativeBias,
    attend,
)
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm, NoNorm

NORM = partial(GroupNorm, num_groups=4)


def voxel_attention(layer, x, sees, bias=None):
    """Plain softmax attention written voxel by voxel: `sees(i, j)` says who sees whom."""
    grid = list(product(*(range(n) for n in x.shape[2:])))
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(tokens).chunk(3, dim=2)
    heads = layer.num_heads
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + torch.stack(
            [torch.stack([bias(i, j) for j in grid], -1) for i in grid], 1
        )
    mask = torch.tensor([[sees(i, j) for j in grid] for i in grid])
    mixed = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v
    out = layer.proj(mixed.transpose(1, 2).flatten(2))
    return x + out.transpose(1, 2).reshape(x.shape)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_global_attention_is_plain_softmax_attention(grid, heads):
    layer = GlobalAttention(8, len(grid), NORM, num_heads=heads)
    x = torch.randn(2, 8, *grid)
    close(layer(x), voxel_attention(layer, x, lambda i, j: True))


def test_attend_is_scaled_softmax():
    q, k, v = torch.randn(3, 2, 2, 5, 4).unbind()
    close(attend(q, k, v), torch.softmax(q @ k.transpose(2, 3) / 2, -1) @ v)


@pytest.mark.parametrize("cls", [GlobalAttention, LinearAttention])
def test_permuting_voxels_permutes_the_result(cls):
    layer, x = cls(8, 3, NORM, num_heads=2), torch.randn(1, 8, 3, 4, 5)
    order = torch.randperm(60)
    moved = layer(x.flatten(2)[..., order].view_as(x))
    close(moved.flatten(2), layer(x).flatten(2)[..., order])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((5, 7), 4), ((6, 3, 5), (4, 2, 3)), ((2, 3), 8)])
def test_patch_attention_is_softmax_inside_each_window_whatever_the_padding(grid, window, shift):
    layer = PatchAttention(8, len(grid), NORM, num_heads=2, window=window, shift=shift)
    x = torch.randn(2, 8, *grid)

    def home(i):
        axes = zip(i, layer.window, strict=True)
        return [(n + (w // 2 if shift else 0)) // w for n, w in axes]

    close(layer(x), voxel_attention(layer, x, lambda i, j: home(i) == home(j)))


def test_a_window_as_large_as_the_grid_is_global_attention():
    patch, full = PatchAttention(8, 3, NORM, window=(3, 4, 5)), GlobalAttention(8, 3, NORM)
    full.load_state_dict(patch.state_dict())
    x = torch.randn(1, 8, 3, 4, 5)
    close(patch(x), full(x))


@pytest.mark.parametrize("shift", [False, True])
def test_a_window_far_larger_than_the_grid_costs_no_more_than_the_grid(shift):
    layer = PatchAttention(8, 3, NORM, window=512, shift=shift, relative_position_bias=False)
    assert layer.to_windows(torch.ones(1, 1, 2 * 3 * 4, 8), (2, 3, 4)).shape == (1, 1, 24, 8)
    assert layer(torch.randn(1, 8, 2, 3, 4)).shape == (1, 8, 2, 3, 4)


@pytest.mark.parametrize("shift", [False, True])
def test_the_bias_of_a_window_larger_than_the_grid_is_that_of_its_offsets(shift):
    layer = PatchAttention(8, 2, NORM, window=(4, 8), shift=shift, relative_position_bias=True)
    with torch.no_grad():
        layer.bias.table.normal_()
    table, first = layer.bias.table, 2 if shift else 0
    x = torch.randn(1, 8, 6, 3)

    def offset_bias(i, j):
        return table[:, (i[0] - j[0] + 3) % 7, i[1] - j[1] + 7]  # of voxels that see each other

    same = lambda i, j: (i[0] + first) // 4 == (j[0] + first) // 4  # noqa: E731
    close(layer(x), voxel_attention(layer, x, same, offset_bias))


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_relative_bias_depends_on_the_offset_alone(grid):
    bias = RelativeBias(2, grid)
    voxels = list(product(*(range(n) for n in grid)))
    full = bias(grid)
    for (a, i), (b, j) in product(enumerate(voxels), repeat=2):
        offset = tuple(p - q + n - 1 for p, q, n in zip(i, j, grid, strict=True))
        assert torch.equal(full[:, a, b], bias.table[(slice(None), *offset)])


def test_relative_bias_works_with_global_and_patch_attention():
    x = torch.randn(1, 8, 4, 6)
    layer = GlobalAttention(8, 2, NORM, num_heads=2, relative_position_bias=(4, 6))
    with torch.no_grad():
        layer.bias.table.normal_()
    table = layer.bias.table
    close(
        layer(x),
        voxel_attention(
            layer, x, lambda i, j: True, lambda i, j: table[:, i[0] - j[0] + 3, i[1] - j[1] + 5]
        ),
    )
    layer = PatchAttention(8, 2, NORM, num_heads=2, window=(2, 4), relative_position_bias=True)
    with torch.no_grad():
        layer.bias.table.normal_()
    table = layer.bias.table

    def window_bias(i, j):
        offset = (i[0] - j[0] + 1) % 3, (i[1] - j[1] + 3) % 7  # of voxels that see each other
        return table[:, offset[0], offset[1]]

    same = lambda i, j: (i[0] // 2, i[1] // 4) == (j[0] // 2, j[1] // 4)  # noqa: E731
    close(layer(x), voxel_attention(layer, x, same, window_bias))


def test_relative_bias_is_resized_to_other_grids():
    bias = RelativeBias(1, (5, 5))
    with torch.no_grad():  # linear in the offset, so interpolation is exact
        bias.table.copy_(torch.linspace(-1, 1, 9)[:, None].expand(9, 9)[None])
    small = bias((3, 3)).view(3, 3, 3, 3)
    torch.testing.assert_close(small[:, 0, :, 0], (torch.arange(3)[:, None] - torch.arange(3)) / 2)
    layer = GlobalAttention(8, 3, NORM, relative_position_bias=(2, 2, 2))
    assert layer(torch.randn(1, 8, 5, 3, 4)).isfinite().all()


def test_linear_attention_is_a_mean_of_values_when_keys_are_equal():
    layer = LinearAttention(4, 2, NoNorm)
    with torch.no_grad():
        layer.qkv.weight[4:8] = 0  # keys
    x = torch.randn(1, 4, 3, 5)
    tokens = x.flatten(2).transpose(1, 2)
    q, _, v = layer.qkv(tokens).chunk(3, 2)
    # softmax over equal keys is 1/N for each channel, so every query sees its own sum times mean v
    expected = q.sum(2, keepdim=True) * v.mean(1, keepdim=True)
    close(layer(x), x + layer.proj(expected).transpose(1, 2).reshape(x.shape))


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="num_heads=3 does not divide 8"):
        GlobalAttention(8, 3, NORM, num_heads=3)


def test_modules_that_are_not_asked_for_are_not_built():
    names = CustomVAE(channels=(4, 8), norm=NORM).state_dict()
    assert not any("qkv" in name or "table" in name for name in names)
    layer = GlobalAttention(8, 3, NORM, out_proj=False)
    assert not any(name.startswith(("proj", "bias")) for name in layer.state_dict())
