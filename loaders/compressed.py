"""The compressed cache: arrays in small blosc2 blocks; the only importer of blosc2.

For data larger than the disk allows. Blocks of 16^3 voxels keep what a patch must decompress close
to what it needs; bit-shuffling before LZ4 halves 12-bit scans at the speed of LZ4.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType

import numpy as np

BLOCK, CHUNK = 16, 64  # voxels along each axis


def compress(data: np.ndarray) -> bytes:
    """Return an array (C, X, Y, Z) as the bytes of a .b2nd file."""
    blosc2 = require()
    packed = blosc2.asarray(
        data,
        chunks=(1, *(min(CHUNK, n) for n in data.shape[1:])),
        blocks=(1, *(min(BLOCK, n) for n in data.shape[1:])),
        cparams={
            "codec": blosc2.Codec.LZ4,
            "clevel": 5,
            "filters": [blosc2.Filter.BITSHUFFLE],
            "filters_meta": [0],
            "nthreads": 1,  # volumes are compressed side by side
        },
    )
    return packed.to_cframe()


class CompressedArray:
    """A .b2nd file that is indexed like an array; any thread may read it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handles = threading.local()  # a blosc2 handle has one decompression state

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        handle = getattr(self._handles, "array", None)
        if handle is None:
            blosc2 = require()
            handle = blosc2.open(str(self.path), mmap_mode="r", dparams={"nthreads": 1})
            self._handles.array = handle
        return np.asarray(handle[slices])


def require() -> ModuleType:
    """Import blosc2, or say how to get it."""
    try:
        import blosc2
    except ImportError as error:
        raise ValueError(
            "data.store blosc2 needs: pip install 'vae3d[blosc2]' (or set data.store to npy)"
        ) from error
    return blosc2
