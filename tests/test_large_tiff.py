"""Large TIFFs are read where they lie: the voxels that tifffile reads, and only tiles touched."""

import itertools
import os

import numpy as np
import pytest

from loaders import PatchLoader, Preprocess, Reading, SliceStore, VolumeStore
from loaders.readers import BrokenVolume, is_store, read_header
from loaders.readers.arrays import context, in_chunks, tiles_of
from tests.stores import UM, voxels

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("tensorstore")
RAW = Preprocess(intensity="raw", orient_ras=False)


def built(volumes, cache, preprocess=RAW, **reading):
    return VolumeStore.build(volumes, cache, preprocess, reading=Reading(**reading), progress=False)


def forget():
    """Forget the chunks that were read."""
    for cached in (context, in_chunks, tiles_of):
        cached.cache_clear()


def pyramid(path, data, axes="CZYX", **options):
    """Write OME-TIFF with a level of half the size, as microscopes' software does."""
    told = {"axes": axes, "PhysicalSizeZ": 2.0, "PhysicalSizeZUnit": "\u00b5m"}
    for axis in "XY":
        told |= {f"PhysicalSize{axis}": 0.5, f"PhysicalSize{axis}Unit": "\u00b5m"}
    if "C" in axes:
        names = ["dapi", "gfp", "red"][: data.shape[axes.index("C")]]
        told["Channel"] = {"Name": names, "Color": [-16776961] * len(names)}
    options = {"photometric": "minisblack", "tile": (16, 32), "compression": "zlib"} | options
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        tiff.write(data, subifds=1, metadata=told, **options)
        tiff.write(data[..., ::2, ::2], subfiletype=1, **options)
    return path


LAYOUTS = {
    "tiles": {"tile": (16, 32), "compression": "zlib"},
    "tiles with a predictor": {"tile": (32, 16), "compression": "zstd", "predictor": True},
    "tiles, big-endian": {"tile": (16, 16), "byteorder": ">"},
    "tiles in depth": {"tile": (4, 16, 32), "volumetric": True, "compression": "lzw"},
    "one after the other": {},
    "one after the other, big-endian": {"byteorder": ">"},
    "strips apart": {"rowsperstrip": 16, "align": 4096, "contiguous": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_tiff_in_any_layout_reads_the_same_as_by_tifffile(tmp_path, layout):
    zyx, path = voxels(11, 50, 70), tmp_path / "a.tif"
    options = {"photometric": "minisblack", "metadata": {"axes": "ZYX"}} | LAYOUTS[layout]
    if layout == "strips apart":
        with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
            tiff.write(iter(zyx), shape=zyx.shape, dtype=zyx.dtype, photometric="minisblack",
                       rowsperstrip=16, metadata={"axes": "ZYX"})  # fmt: skip
    else:
        tifffile.imwrite(path, zyx, bigtiff=True, **options)
    assert is_store(path)
    store, xyz = built(path, tmp_path / "cache"), zyx.transpose(2, 1, 0)
    np.testing.assert_array_equal(store.read(0)[0], xyz)
    for box in ((slice(3, 40), slice(17, 50), slice(2, 3)), (slice(69, 70), slice(0, 50),
                                                             slice(9, 11))):  # fmt: skip
        np.testing.assert_array_equal(store.read(0, box)[0], xyz[box])
    assert not list((tmp_path / "cache").glob("*.npy.npy"))
    key = store.entries[0].key
    assert not (tmp_path / "cache" / f"{key}.npy").exists()


def test_levels_axes_channels_and_sizes_of_ome_tiff_are_those_of_ome_zarr(tmp_path):
    czyx = voxels(2, 6, 50, 70)
    path = pyramid(tmp_path / "a.ome.tif", czyx)
    store = built(path, tmp_path / "cache")
    assert store.shape(0) == (2, 70, 50, 6) and store.chunks(0) == (32, 16, 1)
    assert np.allclose(store.spacing_mm(0), [0.5 * UM, 0.5 * UM, 2 * UM])
    assert store.meta(0)["look"]["unit"] == "um"
    assert [name for name, _ in store.layout(0).channels] == ["dapi", "gfp"]
    np.testing.assert_array_equal(store.read(0), czyx.transpose(0, 3, 2, 1))
    small = czyx[..., ::2, ::2].transpose(0, 3, 2, 1)
    coarse = built(path, tmp_path / "cache", level=1, channels=["gfp"])
    np.testing.assert_array_equal(coarse.read(0)[0], small[1])
    assert np.allclose(coarse.spacing_mm(0), [1 * UM, 1 * UM, 2 * UM])
    wanted = Preprocess(intensity="raw", spacing_mm=(1 * UM, 1 * UM, 2 * UM))
    np.testing.assert_array_equal(built(path, tmp_path / "cache", wanted).read(0), small)
    with pytest.raises(BrokenVolume, match="2 levels, level 2 is asked for"):
        built(path, tmp_path / "cache", level=2)


def test_a_tiff_in_place_and_copied_are_the_same_store(tmp_path):
    zyx = voxels(6, 50, 70)
    path = pyramid(tmp_path / "a.ome.tif", zyx, axes="ZYX")
    here = built(path, tmp_path / "cache", Preprocess())
    copy = built(path, tmp_path / "cache", Preprocess(), in_place=False)
    assert copy.chunks(0) is None and here.chunks(0)
    np.testing.assert_array_equal(here.read(0), copy.read(0))
    for what in ("affine", "undo", "look", "spacing_mm"):
        assert here.meta(0)[what] == copy.meta(0)[what]
    back = here.undo(0, here.read(0)).data
    np.testing.assert_allclose(back[0], np.minimum(zyx.transpose(2, 1, 0), back.max()), rtol=1e-3)
    chosen = built(path, tmp_path / "cache", level=1, in_place=False)
    np.testing.assert_array_equal(chosen.read(0)[0], zyx[:, ::2, ::2].transpose(2, 1, 0))
    assert read_header(path).data.shape == (1, 70, 50, 6)


def test_colors_are_channels_opacity_is_none_and_slices_are_cut(tmp_path):
    rng = np.random.default_rng(0)
    for separate in (False, True):
        yxs = rng.integers(0, 255, (60, 70, 4), np.uint8)
        path = tmp_path / f"{separate}.tif"
        data = yxs.transpose(2, 0, 1) if separate else yxs
        planar = "separate" if separate else "contig"
        tifffile.imwrite(path, data, bigtiff=True, tile=(16, 32), photometric="rgb",
                         extrasamples=["unassalpha"], planarconfig=planar)  # fmt: skip
        store = built(path, tmp_path / "cache")
        assert store.shape(0) == (3, 70, 60, 1)
        assert [name for name, _ in store.layout(0).channels] == ["red", "green", "blue"]
        np.testing.assert_array_equal(store.read(0)[..., 0], yxs[..., :3].transpose(2, 1, 0))
        slices = SliceStore(store)
        assert slices.chunks(0) == (32, 16) and slices.shape(0) == (3, 70, 60)


def test_a_patch_reads_the_tiles_that_it_touches_and_they_are_kept(tmp_path):
    zyx = np.random.default_rng(0).integers(0, 2**16, (32, 128, 128)).astype(np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, zyx, bigtiff=True, tile=(16, 16), compression="zlib")
    store = built(path, tmp_path / "cache")
    forget()
    loader = PatchLoader(store, (16, 16, 8), patches_per_volume=12, batch_size=4, threads=2)
    before = loader.traffic()
    for batch in loader:
        for image, (x, y, z) in zip(batch.image.numpy(), batch.corner.tolist(), strict=True):
            box = zyx[z : z + 8, y : y + 16, x : x + 16].transpose(2, 1, 0)
            np.testing.assert_array_equal(image[0], box)
    touched = {
        tile
        for x, y, z in loader.plan.table(0)[:, 1:]
        for tile in itertools.product(range(z, z + 8), (y // 16, (y + 15) // 16),
                                      (x // 16, (x + 15) // 16))
    }  # fmt: skip
    once = loader.traffic() - before
    with tifffile.TiffFile(path) as tiff:
        size = sum(tiff.pages[z].databytecounts[y * 8 + x] for z, y, x in touched)
    assert once.num_bytes == size and once.misses == len(touched)
    loader.set_epoch(0)
    list(loader)
    again = loader.traffic() - before
    assert again.num_bytes == size and again.hits > len(touched)


def test_what_is_small_or_compressed_in_strips_is_copied_as_before(tmp_path):
    zyx = voxels(6, 50, 70)
    kept = {"bigtiff": False, "tile": (16, 16)}, {"bigtiff": True, "compression": "zlib"}
    for number, options in enumerate(kept):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, zyx, photometric="minisblack", **options)
        assert not is_store(path)
        store = built(path, tmp_path / "cache")
        assert store.chunks(0) is None
        np.testing.assert_array_equal(store.read(0)[0], zyx.transpose(2, 1, 0))
    with pytest.raises(BrokenVolume, match=r"data\.level is of zarr, HDF5 and TIFF that is read w"):
        built(path, tmp_path / "cache", level=1)  # although it lies in the cache
    os.link(tmp_path / "0.tif", tmp_path / "long.tif")
    os.truncate(tmp_path / "long.tif", 2**32 + 1)  # classic that is longer than it can point to
    assert is_store(tmp_path / "long.tif")
    for name, content in {"text.tif": b"II+\0 no list of tags", "empty.tif": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert not is_store(tmp_path / name)


def test_tiles_that_are_damaged_missing_or_of_no_known_codec_are_one_line(tmp_path, monkeypatch):
    zyx = voxels(4, 32, 32)
    path = tmp_path / "a.tif"
    options = {"bigtiff": True, "tile": (16, 16), "photometric": "minisblack"}
    tifffile.imwrite(path, zyx, compression="zlib", **options)
    store = built(path, tmp_path / "cache")
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[2].dataoffsets[3]
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 16)
    again = VolumeStore(store.entries, store.cache_dir, store.preprocess)
    again.read(0, (slice(0, 16), slice(0, 16), slice(0, 4)))
    with pytest.raises(BrokenVolume, match=r"a\.tif/0: cannot be read: tile 3 of page 2") as error:
        again.read(0, (slice(20, 21), slice(20, 21), slice(2, 3)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    os.truncate(path, start + 4)
    for in_place in (True, False):  # tifffile would read the first page alone
        with pytest.raises(BrokenVolume, match=r"a\.tif: truncated: the lists of its pages lead"):
            built(path, tmp_path / "cache", in_place=in_place)
    empty = tmp_path / "b.tif"
    parts = [zyx[0, :16, :16], None, None, zyx[0, 16:, 16:], *[None] * 4]
    tifffile.imwrite(empty, iter(parts), shape=(2, 32, 32), dtype=np.uint16, **options)
    expected = np.zeros((2, 32, 32), np.uint16)
    expected[0, :16, :16], expected[0, 16:, 16:] = parts[0], parts[3]
    found = built(empty, tmp_path / "cache").read(0)[0]
    np.testing.assert_array_equal(found, expected.transpose(2, 1, 0))
    short = tmp_path / "c.tif"
    tifffile.imwrite(short, zyx, bigtiff=True, photometric="minisblack")
    os.truncate(short, os.path.getsize(short) - zyx.nbytes // 2)
    with pytest.raises(BrokenVolume, match=r"c\.tif: .*(claims|truncated|behind|damaged)"):
        built(short, tmp_path / "cache")
    coded = tmp_path / "d.tif"
    tifffile.imwrite(coded, zyx, compression="zstd", **options)
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", NoCodecs())
    with pytest.raises(BrokenVolume, match=r"d\.tif.*ZSTD.*vae3d\[formats\]"):
        built(coded, tmp_path / "cache")


class NoCodecs:
    """What tifffile has where imagecodecs is not installed."""

    def __getitem__(self, codec):
        raise KeyError(f"{codec} requires the 'imagecodecs' package")


def test_a_tiff_behind_a_url_is_read_tile_by_tile(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    zyx = voxels(4, 64, 64)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, zyx, bigtiff=True, tile=(16, 16), photometric="minisblack")
    fsspec.filesystem("memory").pipe("/box/a.tif", path.read_bytes())
    store = built("memory://box/a.tif", tmp_path / "cache")
    assert store.ids == ["a"]
    np.testing.assert_array_equal(store.read(0)[0], zyx.transpose(2, 1, 0))
    fsspec.filesystem("memory").pipe("/box/b.tif", b"no TIFF at all, whatever it is called")
    with pytest.raises(BrokenVolume, match=r"memory://box/b\.tif: "):
        built("memory://box/b.tif", tmp_path / "cache")
