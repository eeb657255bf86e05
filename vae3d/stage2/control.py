"""What a ControlNet sees: volumes or label maps, brought to the grids of latents.

A label map has a channel for each label, the part of a latent voxel that it fills. A volume is its
intensities, scaled as `Preprocess` does by default, of which each latent voxel has the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loaders import Preprocess, Volume, VolumeStore, find_subjects
from loaders.masks import nearest
from loaders.readers import has_place
from vae3d.stage2.latents import OPEN_LATENTS

MOST_LABELS = 64  # different values of a map; more are intensities
SPACING = 0.1  # part by which voxels may differ from those that were trained on
AS_IN_FILE = Preprocess(intensity="raw")


class Controls:
    """Controls on the grids of latents, by number.

    Args:
        store: The controls as in their files, see `find_controls`.
        headers: For each, that of the latent on whose grid it is wanted.
        labels: Labels that have a channel each; none for volumes of intensities.
    """

    def __init__(self, store: VolumeStore, headers: Sequence[dict], labels: Sequence[int]):
        self.paths = [entry.subject.paths[0] for entry in store.entries]
        self.headers, self.labels, self.ids = headers, tuple(labels), store.ids
        if not labels:  # the same files in the cache, under another gain
            store = VolumeStore.build([e.subject for e in store.entries], store.cache_dir)
        self.store = store
        self.channels = len(labels) or store.num_channels
        self.read = lru_cache(OPEN_LATENTS)(self._read)

    def __len__(self) -> int:
        return len(self.store)

    def _read(self, index: int) -> Tensor:
        """Control number `index`, `(K, *grid of its latent)` float32."""
        header, path, x = self.headers[index], self.paths[index], self.store.read(index)
        spatial, source = header["volume_shape"][1:], header["source"]["undo"]
        grid, onto = (*spatial, 1)[:3], np.array(source["affine"])
        own = np.array(self.store.undo_record(index)["affine"])
        if not has_place(path, own):
            own = place_of(source, x.shape[1:], grid, path)
        if not nearest(Volume(np.ones_like(x[:1]), own), grid, onto).data.any():
            raise ValueError(
                f"{path}: lies beside {header['subject']} in space; is it the control of another?"
            )
        moved = nearest(Volume(x, own), grid, onto).data
        if self.labels:
            if unknown := set(np.unique(moved).tolist()) - {0, *self.labels}:
                known = ", ".join(map(str, self.labels))
                raise ValueError(f"{path}: holds label {min(unknown):g}; the model knows {known}")
            moved = np.stack([moved[0] == label for label in self.labels])
        values = torch.from_numpy(moved.astype(np.float32)).reshape(-1, *spatial)
        return cell_means(values, header["factor"])


def place_of(source: dict, shape: Sequence[int], grid: Sequence[int], path: Path) -> np.ndarray:
    """Affine of a control whose file tells none: that of the file of its latent, voxel by voxel."""
    geometry = source["geometry"]
    wanted = geometry.get("source_shape", grid)
    if list(shape) != list(wanted):
        raise ValueError(
            f"{path}: is {list(shape)} voxels, its volume {list(wanted)}, and it does not say where"
            " it lies; give one of that shape, or one with an affine (NIfTI)"
        )
    return np.array(geometry["source_affine"])


def cell_means(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Mean over the voxels of each latent voxel of `(C, *spatial)`; the last may have fewer."""
    pool = F.avg_pool3d if x.ndim == 4 else F.avg_pool2d
    cell = list(factor)
    return pool(x[None], cell, cell, ceil_mode=True, count_include_pad=False)[0]


def find_controls(place: str, names: Sequence[str]) -> VolumeStore:
    """The controls of subjects, as in their files and in the order of `names`.

    Args:
        place: Folder, glob or manifest; a control is called as its subject is.
        names: The subjects.
    """
    found = {subject.id: subject for subject in find_subjects(place, named=names)}
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"--control {place}: none is called {missing[0]!r} as its latent is (there are "
            f"{', '.join([*found][:3])}); rename them, or list them in a manifest with the columns "
            "id and path"
        )
    return VolumeStore.build([found[name] for name in names], preprocess=AS_IN_FILE)


def labels_in(store: VolumeStore) -> tuple[int, ...]:
    """Labels other than 0 of all maps of a store; none where one is a volume of intensities."""
    labels: set[int] = set()
    for index in range(len(store)):
        x = store.read(index)
        if len(x) > 1 or (x != np.rint(x)).any():
            return ()
        labels |= set(np.unique(x).astype(int).tolist())
        if len(labels) > MOST_LABELS:
            return ()
    return tuple(sorted(labels - {0}))


def controls_to_draw(
    place: str, template: dict, preprocess: Preprocess, labels: Sequence[int], channels: int
) -> Controls:
    """Controls each on a grid of its own, for latents that are drawn.

    Args:
        place: A file, folder, glob or manifest.
        template: Header of a training latent.
        preprocess: That of the VAE: turns and resamples the grid as it did those of its volumes.
        labels: Labels that the model knows; none for volumes.
        channels: Channels of a control that the model takes.
    """
    subjects = find_subjects(place)
    store = VolumeStore.build(subjects, preprocess=AS_IN_FILE)
    turned = Preprocess(
        spacing_mm=preprocess.spacing_mm,
        orient_ras=preprocess.orient_ras,
        pad_to_multiple=preprocess.pad_to_multiple,
        intensity="raw",
    )
    grids = VolumeStore.build(subjects, preprocess=turned)
    headers = [grid_of(grids, i, template) for i in range(len(grids))]
    controls = Controls(store, headers, labels)
    if (labels and store.num_channels > 1) or controls.channels != channels:
        raise ValueError(
            f"--control {place}: has {store.num_channels} channels, the model takes "
            f"{1 if labels else channels}"
        )
    return controls


def grid_of(store: VolumeStore, index: int, template: dict) -> dict:
    """Header of a latent that lies over a volume of a store, all else as in a template's."""
    axes, path = len(template["shape"]) - 1, store.entries[index].subject.paths[0]
    size, record = store.shape(index)[1:], store.undo_record(index)
    if axes == 2 and size[2] > 1:
        raise ValueError(f"{path}: is a volume, the model draws pictures; give one of one slice")
    factor = template["factor"]
    had = [mm / f for mm, f in zip(template["spacing_mm"], (*factor, 1), strict=False)]
    given = store.spacing_mm(index)[: len(had)]
    if any(abs(mm / of - 1) > SPACING for mm, of in zip(given, had, strict=True)):
        raise ValueError(
            f"{path}: has voxels of {spelled(given)} mm, the model learned {spelled(had)} mm; "
            "resample it"
        )
    spatial = list(size[:axes])
    grid = [-(-n // f) for n, f in zip(spatial, factor, strict=True)]
    source = template["source"] | {
        "undo": template["source"]["undo"]
        | {"affine": record["affine"], "geometry": record["geometry"]}
    }
    return template | {
        "subject": store.ids[index],
        "shape": [template["shape"][0], *grid],
        "volume_shape": [template["volume_shape"][0], *spatial],
        "source": source,
    }


def spelled(numbers: Sequence[float]) -> str:
    """Numbers as a person writes them."""
    return " x ".join(f"{n:g}" for n in numbers)
