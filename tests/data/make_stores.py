"""Write the stores beside this file: `pip install ngff-zarr==0.50.0 ome-zarr==0.18.0`, run it."""

import shutil
import tempfile
from pathlib import Path

import ngff_zarr
import numpy as np
from ome_zarr.format import FormatV04, FormatV05
from ome_zarr.writer import write_image

HERE = Path(__file__).parent
CZYX = np.arange(2 * 12 * 10 * 8, dtype=np.uint16).reshape(2, 12, 10, 8)
SCALE, OFFSET = {"z": 2.0, "y": 0.5, "x": 0.5}, {"z": 1.0, "y": 2.0, "x": 3.0}


def by_ngff_zarr(folder: str, version: str) -> None:
    """An image with a translation; with shards where the version knows them."""
    units = dict.fromkeys("zyx", "micrometer")
    image = ngff_zarr.to_ngff_image(CZYX, ["c", "z", "y", "x"], SCALE, OFFSET, axes_units=units)
    levels = ngff_zarr.to_multiscales(image, scale_factors=[2], chunks=4,
                                      method=ngff_zarr.Methods.ITKWASM_BIN_SHRINK)  # fmt: skip
    shards = {"chunks_per_shard": 2} if version == "0.5" else {}
    ngff_zarr.to_ngff_zarr(folder, levels, version=version, **shards)


def by_ome_zarr(folder: str, version: str) -> None:
    """An image with levels that are halved along y and x; it names no unit."""
    kind = {"0.4": FormatV04, "0.5": FormatV05}[version]()
    write_image(CZYX, folder, axes="czyx", fmt=kind, scale={"c": 1.0, **SCALE},
                scale_factors=[2], storage_options={"chunks": (1, 6, 5, 4)})  # fmt: skip


if __name__ == "__main__":
    for write in (by_ngff_zarr, by_ome_zarr):
        for version in ("0.4", "0.5"):
            with tempfile.TemporaryDirectory() as folder:
                write(f"{folder}/a.ome.zarr", version)
                name = f"{write.__name__.removeprefix('by_')}_{version.replace('.', '')}"
                shutil.make_archive(str(HERE / name), "zip", f"{folder}/a.ome.zarr")
