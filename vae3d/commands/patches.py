"""`vae3d patches DIR`: a contact sheet of the patches that training would see."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loaders import DataConfig
from vae3d.ranges import check_ranges

if TYPE_CHECKING:
    import numpy as np

    from loaders.layout import Layout

GAP = 2  # pixels between patches


def patches(
    root: str,
    /,
    data: DataConfig,
    n: int = 16,
    patch_size: tuple[int, ...] = (64, 64, 64),
    patching: Literal["full", "random_parts"] = "random_parts",
    out: str = "patches.png",
    seed: int = 0,
) -> None:
    """Draw patches as training does and write a picture of their middle slices.

    A 3D patch shows its three middle planes side by side: across Z, across Y, across X.

    Args:
        root: Folder, glob or manifest.
        data: How volumes are read, as in training.
        n: Number of patches.
        patch_size: Shape of a patch in voxels; two sizes for patches of slices.
        patching: random_parts or full.
        out: PNG to write; beside it a CSV with volume and corner of each patch.
        seed: Another seed draws other patches.
    """
    import itertools

    import numpy as np

    from loaders import PatchLoader, open_data
    from vae3d.tracking.media import write_png

    check_ranges("patches", {"n": n, "seed": seed, "patch_size": patch_size})
    options = data.loader_options(threads=0)
    store, _ = open_data(replace(data, root=root), len(patch_size))
    loader = PatchLoader(store, patch_size, patching, seed=seed, threads=0, **options)
    low, high = store.channel_ranges[0]
    ids, tiles, rows = store.ids, [], []
    for batch in itertools.islice(loader.stream(), n):
        shown = (batch.image[0, 0].numpy() - low) / (high - low)
        layout = store.layout(int(batch.volume[0]))
        tiles.append(planes(np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8), layout))
        rows.append([ids[int(batch.volume[0])], *batch.corner[0].tolist()])
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, sheet(tiles))
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["volume", *"xyz"[: len(patch_size)]], *rows])
    print(f"{n} patches of {len(store)} volumes in {path}, their corners in {path.stem}.csv")


def planes(patch: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the middle planes of a patch (X, Y[, Z]) side by side, as its file shows them."""
    import numpy as np

    x = layout.arranged(patch[None])[0]
    middle = [
        layout.upright(x.take(x.shape[axis] // 2, axis)) for _, axis in layout.planes(x.shape)
    ]
    height = max(plane.shape[0] for plane in middle)
    return np.concatenate(
        [np.pad(plane, ((0, height - len(plane)), (0, 0))) for plane in middle], axis=1
    )


def sheet(tiles: list[np.ndarray]) -> np.ndarray:
    """Arrange pictures of one size on a sheet that is about as wide as high, (H, W, 3)."""
    import numpy as np

    height, width = (size + GAP for size in tiles[0].shape)
    columns = max(1, round((len(tiles) * height / width) ** 0.5))
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * height - GAP, columns * width - GAP), 40, np.uint8)
    for place, tile in enumerate(tiles):
        y, x = place // columns * height, place % columns * width
        canvas[y : y + height - GAP, x : x + width - GAP] = tile
    return np.repeat(canvas[..., None], 3, axis=2)
