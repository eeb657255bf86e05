import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vae3d.inference.stitching import (
    BLENDS,
    Stitcher,
    axis_spans,
    iter_slabs,
    stitch,
    tile_faces,
)

WEIGHTED = [blend for blend in BLENDS if blend != "crop"]


def identity(x):
    return x


sizes = st.lists(st.tuples(st.integers(2, 7), st.floats(0.1, 3.0)), min_size=2, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    axes=sizes,
    blend=st.sampled_from(list(BLENDS)),
    share=st.floats(0, 0.99),
    batch=st.integers(1, 3),
)
def test_identity_model_stitched_returns_the_volume(axes, blend, share, batch):
    patch = tuple(p for p, _ in axes)
    shape = tuple(max(1, round(p * ratio)) for p, ratio in axes)
    overlap = tuple(int(share * p) for p in patch)
    x = torch.rand(2, *shape)
    y = stitch(identity, x, patch, overlap, blend, batch)
    assert y.shape == x.shape and y.dtype == torch.float32
    if blend == "crop":
        assert torch.equal(y, x)
    assert (y - x).abs().max() <= 1e-6


@pytest.mark.parametrize("blend", WEIGHTED)
def test_faces_and_corners_are_not_attenuated(blend):
    y = stitch(identity, torch.ones(1, 32, 30, 28), (16, 16, 16), 0.5, blend)
    for face in (y[:, 0], y[:, -1], y[:, :, 0], y[:, :, -1], y[..., 0], y[..., -1]):
        assert (face - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("blend", WEIGHTED)
def test_weights_along_an_axis_sum_to_one(blend):
    total = np.zeros(50)
    for span in axis_spans(50, 16, [0, 9, 17, 26, 34], blend):
        assert span.weight.min() > 0
        total[span.lo : span.hi] += span.weight.double().numpy()
    np.testing.assert_allclose(total, 1, atol=2e-7)


def test_crop_takes_each_voxel_from_the_tile_nearest_in_the_middle():
    starts = [0, 8, 16]
    numbers = iter(range(100))
    y = stitch(
        lambda t: torch.full_like(t, next(numbers)), torch.zeros(1, 32, 16), (16, 16), 0.5, "crop"
    )
    centers = np.array(starts) + 7.5
    for voxel in range(32):
        distance = np.abs(centers - voxel)
        assert distance[int(y[0, voxel, 0])] <= distance.min() + 1


def test_a_local_function_stitched_equals_its_full_pass():
    x = torch.rand(1, 40, 33, 29)
    blur = torch.rand(2, 1, 3, 3, 3)
    full = F.conv3d(x[None], blur, padding=1)[0]
    y = stitch(lambda t: F.conv3d(t, blur, padding=1), x, (16, 16, 16), 8, "crop")
    inside = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(y[inside], full[inside])


def test_volumes_that_encode_position_stay_in_place():
    x = torch.arange(21 * 18 * 14, dtype=torch.float64).reshape(1, 21, 18, 14)
    for blend in BLENDS:
        torch.testing.assert_close(stitch(identity, x, (8, 8, 8), 3, blend), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("blend", BLENDS)
def test_latent_tiles_start_at_multiples_of_the_factor(blend):
    x, factor = torch.rand(1, 27, 18, 20), (4, 2, 1)
    corners = list(
        Stitcher(x.shape[1:], (8, 8, 8), 0.5, blend, [Fraction(1, f) for f in factor]).corners()
    )
    assert all(c % f == 0 for corner in corners for c, f in zip(corner, factor, strict=True))
    pool = lambda t: F.avg_pool3d(t, factor)  # noqa: E731
    padded = F.pad(x[None], (0, 0, 0, 0, 0, 1), mode="replicate")
    z = stitch(pool, x, (8, 8, 8), 0.5, blend, scale=[1 / f for f in factor])
    torch.testing.assert_close(z, pool(padded)[0])
    grow = lambda t: F.interpolate(t, scale_factor=[float(f) for f in factor])  # noqa: E731
    y = stitch(grow, z, (2, 4, 8), 0.5, blend, scale=factor)
    torch.testing.assert_close(y, grow(z[None])[0])


def test_several_outputs_and_batches_and_leading_axis():
    x = torch.rand(2, 1, 20, 17)
    doubled, same = stitch(lambda t: (2 * t, t), x, (8, 8), batch_size=5)
    torch.testing.assert_close(doubled, 2 * x)
    torch.testing.assert_close(same, x)


def test_neither_input_nor_output_of_the_model_is_written_to():
    x = torch.rand(1, 24, 24, 24)
    before, outputs = x.clone(), []

    def view(t):
        outputs.append((t, t.clone()))
        return t[:, :, :, :, :]

    stitch(view, x, (16, 16, 16), 0.5)
    assert torch.equal(x, before)
    assert all(torch.equal(now, then) for now, then in outputs)


def test_a_model_that_writes_to_its_input_does_not_harm_the_volume():
    x = torch.rand(1, 24, 24, 24)
    before = x.clone()
    stitch(lambda t: t.mul_(2), x, (24, 24, 24), 0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tiles_are_summed_in_float32(dtype):
    x = torch.rand(1, 40, 40, 40).to(dtype)
    y = stitch(identity, x, (16, 16, 16), 0.5)
    assert y.dtype == torch.float32
    assert (y - x.float()).abs().max() <= 1e-6


def test_integer_volumes_come_back_as_float32():
    x = torch.randint(-1000, 3000, (1, 20, 20, 20), dtype=torch.int16)
    y = stitch(identity, x, (16, 16, 16), 0.5, "crop")
    assert y.dtype == torch.float32 and torch.equal(y, x.float())


def test_slabs_come_finished_in_order_and_fill_the_volume():
    x = torch.rand(3, 50, 20, 18)
    at = 0
    for where, slab in iter_slabs(identity, x, (16, 16, 16), 0.5):
        assert where.start == at
        assert (slab - x[:, where]).abs().max() <= 1e-6
        at = where.stop
    assert at == 50


def test_a_slab_that_was_let_go_is_gone_before_the_next_row_of_tiles():
    alive = []

    def model(tiles):
        alive.extend(slab() is not None for slab in handed_out)
        return tiles

    handed_out = []
    for _, slab in iter_slabs(model, torch.rand(1, 50, 20, 18), (16, 16, 16), 0.5):
        handed_out.append(weakref.ref(slab))
        del slab
    assert len(handed_out) > 3 and len(alive) > 3
    assert not any(alive)


def test_memory_maps_go_in_and_out(tmp_path):
    source = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.int16, (1, 40, 20, 20))
    source[:] = np.arange(source.size).reshape(source.shape)
    target = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, (1, 40, 20, 20))
    result = stitch(identity, source, (16, 16, 16), 0.5, "crop", out=target)
    assert result is target
    np.testing.assert_array_equal(target, source.astype(np.float32))


def test_streaming_holds_less_than_the_volume():
    stitcher = Stitcher((128, 16, 16), (32, 16, 16), 0.5, streaming=True)
    held = []
    for corner in stitcher.corners():
        stitcher.add(corner, torch.ones(1, 32, 16, 16))
        list(stitcher.pop())
        held.append(sum(p.numel() for part in stitcher._parts.values() for p in part))
    assert max(held) <= 32 * 16 * 16


def test_missing_duplicate_and_unknown_tiles_are_named():
    stitcher = Stitcher((32, 32), (16, 16), 0)
    tile = torch.zeros(1, 16, 16)
    stitcher.add((0, 0), tile)
    with pytest.raises(ValueError, match=r"\(0, 0\) came twice"):
        stitcher.add((0, 0), tile)
    with pytest.raises(ValueError, match=r"starts at \(3, 0\)"):
        stitcher.add((3, 0), tile)
    with pytest.raises(ValueError, match=r"3 tiles are missing, first at \(0, 16\)"):
        stitcher.result()
    with pytest.raises(ValueError, match="returned 1 tiles for a batch of 2"):
        stitch(lambda t: t[:1], torch.zeros(1, 32, 32), (16, 16), 0, batch_size=2)
    with pytest.raises(ValueError, match="expected"):
        stitch(lambda t: t[..., 1:], torch.zeros(1, 32, 32), (16, 16), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap"),
        ({"overlap": 16}, "overlap"),
        ({"overlap": -1}, "overlap"),
        ({"overlap": (0.5, 0.5, 0.5)}, "overlap"),
        ({"blend": "cosine"}, "blend"),
        ({"patch_size": (0, 16)}, "patch_size"),
        ({"patch_size": (16, 16, 16, 16)}, "patch_size"),
        ({"patch_size": (15, 16), "scale": 0.25}, r"choose \(16, 16\)"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        stitch(identity, torch.zeros(1, 32, 32), **{"patch_size": (16, 16), **options})
    assert "\n" not in str(error.value)


def test_tile_faces_are_where_tiles_begin_and_end():
    assert tile_faces((32, 16), (16, 16), 0.5) == [[8, 16, 24], []]
    assert tile_faces((32, 16), (16, 16), 0.5, "crop") == [[12, 20], []]


def test_output_weights_of_grown_tiles_are_smooth():
    """Weights belong to the output grid; grown from the input's they would come in steps."""
    stitcher = Stitcher((32,), (16,), 0.5, "hann", scale=4)
    weights = stitcher.spans[0][1].weight[:32]
    assert len(weights.unique()) == 32


@pytest.mark.parametrize("shape", [(2, 20, 20, 20), (1, 24, 20, 20), (1, 20, 20)])
def test_an_array_of_another_shape_is_not_written_to(shape):
    out = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="out has shape"):
        stitch(identity, torch.rand(1, 20, 20, 20) + 1, (8, 8, 8), out=out)
    assert not out.any()


def test_stitch_is_at_the_front_of_its_room():
    from vae3d import inference

    assert inference.stitch is stitch
