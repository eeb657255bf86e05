"""Make training, validation and test parts of public volumes, for the recipes in configs/train/.

    python benchmarks/data_sets.py chest LIDC-IDRI-0314 data/chest     # a DICOM series, or a file
    python benchmarks/data_sets.py nuclei cells3d.tif data/nuclei      # or its channel of nuclei
    python benchmarks/data_sets.py tumors tutorials data/tumors        # BrainLesion's tutorials

Each writes a manifest.csv for `--data.root`. Of a single volume the parts are slabs with a gap
between them, so that no patch of one holds a voxel of another. Where the volumes come from, and
what the recipes make of them: docs/data_sets.md.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from loaders.preprocess import Preprocess, moved, to_store_grid
from loaders.readers import read_volume, write_volume
from loaders.whole import write_text
from vae3d.config import main

# Part and name of each slab, and its planes; two planes of chest and 12 of nuclei lie between.
CHEST = (("train", "low", 0, 20), ("val", "heart", 22, 34), ("test", "hilum", 36, 48),
         ("train", "high", 50, 69))  # fmt: skip
NUCLEI = (("train", "left", 0, 72), ("train", "middle", 72, 144), ("val", "right", 156, 196),
          ("test", "edge", 208, 256))  # fmt: skip
# Four patients of three collections in BraTS's order: T1, T1 with contrast, T2, FLAIR.
TCIA = "BraTS-Toolkit/data/{0}/{0}_brainles/raw_bet/{0}_{1}_bet.nii.gz"
TUMORS = (
    ("train", "BraTS-METS", "AURORA/data/{1}.nii.gz", ("t1", "t1c", "t2", "flair")),
    ("train", "TCGA-DU-7294", TCIA, ("t1", "t1c", "t2", "fla")),
    ("val", "OtherEXampleFromTCIA", TCIA, ("t1", "t1c", "t2", "fla")),
    ("test", "BraTS-GLI-00001-000", "BraTS/data/segmentation/{0}/{0}-{1}.nii.gz",
     ("t1n", "t1c", "t2w", "t2f")),
)  # fmt: skip


def prepare(kind: Literal["chest", "nuclei", "tumors"], source: str, folder: str, /) -> None:
    """Write the parts of a public data set and their manifest; the same command, the same bytes.

    Args:
        kind: chest (CT in thick slices), nuclei (a fluorescence stack) or tumors (4 MR contrasts).
        source: The volume, or the folder of files, as published.
        folder: Where to.
    """
    out = Path(folder)
    rows = {"chest": chest, "nuclei": nuclei, "tumors": tumors}[kind](Path(source), out)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id", "split", "path"), *rows])
    write_text(out / "manifest.csv", table.getvalue())
    print(f"{len(rows)} volumes: --data.root {out / 'manifest.csv'}")


def chest(source: Path, out: Path) -> list[tuple[str, str, str]]:
    """Slabs across the long axis of a chest CT, in slices of 4 mm as many scanners store them."""
    volume, _ = to_store_grid(read_volume(source), Preprocess(spacing_mm=(2.0, 2.0, 4.0)))
    rows = []
    for split, name, low, high in CHEST:
        slab = moved(volume, volume.data[..., low:high], [0, 0, low])
        write_volume(out / f"{name}.nii.gz", slab)
        rows.append((name, split, f"{name}.nii.gz"))
    return rows


def nuclei(source: Path, out: Path) -> list[tuple[str, str, str]]:
    """Slabs along x of the nuclei in scikit-image's `cells3d`, as OME-TIFF with its voxel size."""
    import tifffile

    stack = tifffile.imread(source)
    stack = stack[:, 1] if stack.ndim == 4 else stack  # (Z, Y, X); channel 0 are membranes
    if stack.shape != (60, 256, 256):
        raise ValueError(
            f"{source}: shape {stack.shape}, give cells3d or its nuclei (60, 256, 256)"
        )
    size = {"PhysicalSizeX": 0.26, "PhysicalSizeY": 0.26, "PhysicalSizeZ": 0.29}
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, name, low, high in NUCLEI:
        path = out / f"{name}.ome.tif"
        slab = np.ascontiguousarray(stack[..., low:high])
        meta = {"axes": "ZYX", "UUID": str(uuid5(NAMESPACE_URL, path.name)), **size}
        tifffile.imwrite(path, slab, metadata=meta, compression="zlib", ome=True)
        rows.append((name, split, path.name))
    return rows


def tumors(source: Path, out: Path) -> list[tuple[str, str, str]]:
    """Four contrasts of each patient as the channels of one volume; no file is copied."""
    rows = []
    for split, name, pattern, contrasts in TUMORS:
        files = [source.resolve() / pattern.format(name, contrast) for contrast in contrasts]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing: give the folder of BrainLesion/tutorials")
        rows.append((name, split, ";".join(map(str, files))))
    return rows


if __name__ == "__main__":
    main(prepare)
