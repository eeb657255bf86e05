"""`vae3d prepare --data.root DIR`: fill the cache before training."""

from __future__ import annotations

from loaders import DataConfig


def prepare(data: DataConfig, spatial_dims: int = 3) -> None:
    """Read, check and cache every volume, so that training starts at once.

    Args:
        data: Which volumes, and what is done to them; as in training.
        spatial_dims: 3 for volumes, 2 for slices.
    """
    from loaders import SliceStore, open_data

    store, split = open_data(data, spatial_dims)
    counts = ", ".join(f"{len(ids)} {name}" for name, ids in split.items())
    volumes = store.volumes if isinstance(store, SliceStore) else store
    slices = f" as {len(store)} slices" if isinstance(store, SliceStore) else ""
    print(f"{len(volumes)} volumes{slices} in {volumes.cache_dir} ({counts})")
