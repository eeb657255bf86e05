"""Preprocessing that can be undone, and augmentation; the only importer of TorchIO.

Geometry (orientation, spacing, crop, pad) is applied once, when the store is built, and recorded;
intensity is a gain and a bias at each read, so changing it rebuilds nothing. Both go into the
checkpoint through `Preprocess.to_dict` and are inverted on the way out.

Axes: (C, X, Y, Z), RAS+ after `to_store_grid`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from loaders.readers import Volume, ras_axes

if TYPE_CHECKING:
    import torch

# Percentiles that are measured when a volume is built: steps of 0.1, in the tails of 0.01.
PERCENTILES = np.unique(
    np.round(np.r_[np.arange(0, 1, 0.01), np.arange(1, 99, 0.1), np.arange(99, 100.005, 0.01)], 2)
)


@dataclass(frozen=True)
class Preprocess:
    """How a volume becomes network input; stored in the checkpoint and inverted on the way out.

    Args:
        spacing_mm: Voxel size after resampling in millimeters; null keeps each volume's own.
        window_hu: Clip intensities to (low, high), for CT in Hounsfield units; else percentiles.
        percentiles: Clip to these percentiles of all intensities of the whole source volume.
        intensity: unit -> [0, 1], symmetric -> [-1, 1], zscore -> mean 0 and SD 1 on foreground,
            raw -> as they are, not even clipped.
        orient_ras: Turn and flip the axes so that X, Y, Z run right, anterior, superior.
        crop_foreground: Cut to the box of voxels above the foreground threshold (Otsu's).
        crop_margin_mm: Border kept around the foreground box in millimeters.
        pad_to_multiple: Pad each axis to a multiple of this many voxels (the model's factor).
    """

    spacing_mm: tuple[float, float, float] | None = None
    window_hu: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (0.0, 99.5)
    intensity: Literal["unit", "symmetric", "zscore", "raw"] = "unit"
    orient_ras: bool = True
    crop_foreground: bool = False
    crop_margin_mm: float = 0.0
    pad_to_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("spacing_mm", "window_hu", "percentiles"):  # YAML and JSON bring lists
            if getattr(self, name) is not None:
                value = tuple(float(v) for v in getattr(self, name))
                object.__setattr__(self, name, value)
        if self.spacing_mm is not None and (len(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0):
            raise ValueError(f"spacing_mm is {self.spacing_mm}: give three sizes above 0")
        if self.window_hu is not None and not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(f"window_hu is {self.window_hu}: the first must be below the second")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles are {self.percentiles}: need 0 <= low < high <= 100")
        if not np.isin(np.round(self.percentiles, 6), PERCENTILES).all():
            raise ValueError(
                f"percentiles are {self.percentiles}: use steps of 0.1, of 0.01 beyond 1 and 99"
            )
        if self.intensity not in ("unit", "symmetric", "zscore", "raw"):
            raise ValueError(f"intensity is {self.intensity!r}: use unit, symmetric, zscore or raw")
        if self.pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple is {self.pad_to_multiple}: use 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """Rebuild from `to_dict`; a key this version does not know is an error."""
        if not isinstance(values, dict):
            raise ValueError(f"preprocess is {values!r}: damaged, or not of vae3d")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"preprocess has unknown keys {unknown}: made by a newer version?")
        try:
            return cls(**values)
        except TypeError as error:  # a text where a number stands
            raise ValueError(f"preprocess is damaged ({error})") from error

    def difference(self, other: Preprocess) -> str | None:
        """Say in one line what differs from another contract, None where they agree.

        Example:
            >>> Preprocess(window_hu=(-1000, 400)).difference(Preprocess())
            'window_hu is (-1000.0, 400.0), not None'
        """
        differing = [
            f"{field.name} is {getattr(self, field.name)}, not {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        return "; ".join(differing) or None

    @classmethod
    def of_checkpoint(
        cls, values: dict[str, Any] | None, wanted: Preprocess | None = None
    ) -> Preprocess:
        """Rebuild the contract that a model was trained under; another one is an error.

        Args:
            values: As `to_dict` wrote them into the checkpoint; None where it does not tell.
            wanted: What the user says of the data; None for nothing.
        """
        if values is None:
            if wanted is not None:
                return wanted
            raise ValueError(
                "the weights do not tell how their volumes are prepared; say it, for example "
                "--data.preprocess.intensity unit, or vae.contract = {'preprocess': {}} in Python"
            )
        trained = cls.from_dict(values)
        difference = wanted and wanted.difference(trained)
        if difference:
            raise ValueError(
                f"data.preprocess is not what the checkpoint was trained with: {difference}; leave "
                f"it out to prepare the volumes as in training"
            )
        return trained

    def geometry(self) -> dict[str, Any]:
        """Return the part that decides what lies in the cache: all but the intensity mapping."""
        intensity = ("window_hu", "percentiles", "intensity")
        return {k: v for k, v in self.to_dict().items() if k not in intensity}

    def mapping(
        self, stats: dict[str, Any], quantile: Callable[[float], float]
    ) -> tuple[float, float, float, float]:
        """Return gain, bias, low and high of `clip(intensity * gain + bias, low, high)`.

        Args:
            stats: Statistics of one channel, see `statistics`.
            quantile: Function percentile -> intensity of this channel.
        """
        if self.intensity == "raw":
            return 1.0, 0.0, -math.inf, math.inf
        if self.window_hu is not None:
            low, high = self.window_hu
        else:
            low, high = (quantile(p) for p in self.percentiles)
            if not low < high:  # nearly all voxels are equal: take the whole range
                low, high = stats["min"], stats["max"]
        if self.intensity == "zscore":
            mean, std = stats["foreground_mean"], stats["foreground_std"]
            std = std if std > 0 else (high - low)
            return 1 / std, -mean / std, (low - mean) / std, (high - mean) / std
        bottom = 0.0 if self.intensity == "unit" else -1.0
        gain = (1.0 - bottom) / (high - low)
        return gain, bottom - low * gain, bottom, 1.0


# --------------------------------------------------------------------------------------------------
# Statistics of the source, on all of its voxels.


def statistics(
    data: np.ndarray, scale: float, offset: float
) -> tuple[dict[str, float], np.ndarray]:
    """Measure one channel (X, Y, Z) of stored numbers.

    Returns:
        The statistics in intensities and the quantiles at `PERCENTILES`. Foreground are the
        voxels above Otsu's threshold.
    """
    values, counts = distribution(data)
    values = values * scale + offset
    if scale < 0:
        values, counts = values[::-1], counts[::-1]
    total, cumulated = counts.sum(), np.cumsum(counts)
    quantiles = quantiles_of(values, cumulated, data, scale, offset)
    threshold = otsu(values, counts)
    above = values > threshold
    mean = float((values * counts).sum() / total)
    weight = max(float(counts[above].sum()), 1.0)
    foreground_mean = float((values * counts)[above].sum() / weight) if above.any() else mean
    spread = ((values - foreground_mean) ** 2 * counts)[above].sum() / weight
    return {
        "min": float(quantiles[0]),
        "max": float(quantiles[-1]),
        "mean": mean,
        "std": math.sqrt(float(((values - mean) ** 2 * counts).sum() / total)),
        "foreground_threshold": float(threshold),
        "foreground_mean": foreground_mean,
        "foreground_std": math.sqrt(float(spread)),
        "foreground_fraction": float(counts[above].sum() / total),
    }, quantiles


def distribution(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values in rising order and how often each occurs; floats fall into 4096 fine bins."""
    low, high = data.min(), data.max()
    flat = data.ravel(order="K")  # in the order of memory, whatever the axes
    parts = (flat[start : start + 2**17] for start in range(0, flat.size, 2**17))
    if data.dtype.kind in "iu" and int(high) - int(low) < 2**17:
        counts = np.zeros(int(high) - int(low) + 1, np.int64)
        for part in parts:
            counts += np.bincount(np.subtract(part, low, dtype=np.intp), minlength=len(counts))
        present = np.flatnonzero(counts)
        return present.astype(np.float64) + int(low), counts[present]
    edges = np.linspace(float(low), float(high), 4097)
    counts, sums = np.zeros(4096, np.int64), np.zeros(4096)
    for part in parts:
        part = part.astype(np.float64)
        which = np.clip(np.searchsorted(edges, part, "right") - 1, 0, 4095)
        counts += np.bincount(which, minlength=4096)
        sums += np.bincount(which, part, minlength=4096)
    present = np.flatnonzero(counts)
    return sums[present] / counts[present], counts[present]


def quantiles_of(
    values: np.ndarray, cumulated: np.ndarray, data: np.ndarray, scale: float, offset: float
) -> np.ndarray:
    """Quantiles as numpy's (linear): exact from counted integers, sorted for anything else."""
    if data.dtype.kind not in "iu" or len(values) != len(cumulated) or len(values) == 4096:
        percent = PERCENTILES if scale > 0 else 100 - PERCENTILES
        return np.percentile(data, percent).astype(np.float64) * scale + offset
    position = PERCENTILES / 100 * (cumulated[-1] - 1)
    lower = values[np.searchsorted(cumulated, np.floor(position), "right")]
    upper = values[np.searchsorted(cumulated, np.ceil(position), "right")]
    return lower + (upper - lower) * (position - np.floor(position))


def otsu(values: np.ndarray, counts: np.ndarray) -> float:
    """Return the threshold with the largest variance between the two classes (Otsu 1979)."""
    if len(values) < 2:
        return float(values[0])
    weight = np.cumsum(counts)[:-1].astype(np.float64)
    total, mass = float(counts.sum()), np.cumsum(values * counts)
    below, above = mass[:-1] / weight, (mass[-1] - mass[:-1]) / (total - weight)
    return float(values[np.argmax(weight * (total - weight) * (below - above) ** 2)])


# --------------------------------------------------------------------------------------------------
# Geometry: source grid -> store grid and back.


def to_store_grid(
    volume: Volume, preprocess: Preprocess, threshold: float | None = None
) -> tuple[Volume, dict[str, Any]]:
    """Orient, resample, crop and pad a volume; return it and the record that undoes it.

    Args:
        volume: As read.
        preprocess: What to do.
        threshold: Foreground threshold in stored numbers of channel 0; needed for the crop.
    """
    record: dict[str, Any] = {
        "source_shape": list(volume.data.shape[1:]),
        "source_affine": volume.affine.tolist(),
    }
    if preprocess.orient_ras:
        axes, flips = ras_axes(volume.affine)
        volume = orient(volume, axes, flips)
        record |= {"axes": axes, "flips": flips}
    if preprocess.spacing_mm is not None:
        shape, affine = resampled_grid(volume, preprocess.spacing_mm)
        record["oriented_grid"] = [list(volume.data.shape[1:]), volume.affine.tolist()]
        record["resampled_grid"] = [list(shape), affine.tolist()]
        volume = resample(volume, shape, affine)
    if preprocess.crop_foreground:
        assert threshold is not None, "the crop needs a threshold"
        low, high = foreground_box(volume, threshold, preprocess.crop_margin_mm)
        record |= {"crop": [low, high], "crop_from": list(volume.data.shape[1:])}
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        volume = moved(volume, volume.data[(slice(None), *inside)], low)
    if preprocess.pad_to_multiple > 1:
        shape = volume.data.shape[1:]
        pads = [(-n) % preprocess.pad_to_multiple for n in shape]
        record["pad_from"] = list(shape)
        volume = moved(volume, pad_high(volume.data, pads), [0, 0, 0])
    return volume, record


def label_to_store_grid(label: Volume, record: dict[str, Any]) -> Volume:
    """Repeat on a label map what `to_store_grid` did to its volume, with nearest neighbors."""
    if "axes" in record:
        label = orient(label, record["axes"], record["flips"])
    if "resampled_grid" in record:
        shape, affine = record["resampled_grid"]
        label = resample(label, tuple(shape), np.array(affine), label=True)
    if "crop" in record:
        low, high = record["crop"]
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        label = moved(label, label.data[(slice(None), *inside)], low)
    return label


def from_store_grid(volume: Volume, record: dict[str, Any], background: float) -> Volume:
    """Undo `to_store_grid`: float32 intensities (C, X, Y, Z) back to the grid of the source.

    Args:
        volume: On the store's grid.
        record: As `to_store_grid` returned it.
        background: Intensity outside the foreground crop.
    """
    if "pad_from" in record:
        x, y, z = record["pad_from"]
        volume = moved(volume, volume.data[:, :x, :y, :z], [0, 0, 0])
    if "crop" in record:
        low, high = record["crop"]
        shape = (len(volume.data), *record["crop_from"])
        data = np.full(shape, background, volume.data.dtype)
        data[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))] = volume.data
        volume = moved(volume, data, [-n for n in low])
    if "oriented_grid" in record:
        shape, affine = record["oriented_grid"]
        volume = resample(volume, tuple(shape), np.array(affine))
    data = volume.data
    if "axes" in record:
        back = [0, *(1 + int(n) for n in np.argsort(record["axes"]))]
        flipped = tuple(1 + a for a, flip in enumerate(record["flips"]) if flip)
        data = np.flip(data, flipped).transpose(back)
    return Volume(np.ascontiguousarray(data), np.array(record["source_affine"]))


def orient(volume: Volume, axes: list[int], flips: list[bool]) -> Volume:
    """Permute and flip the axes without touching a voxel."""
    data = volume.data.transpose(0, *(1 + axis for axis in axes))
    affine = volume.affine[:, [*axes, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            data = np.flip(data, 1 + axis)
            affine[:3, 3] += affine[:3, axis] * (data.shape[1 + axis] - 1)
            affine[:3, axis] *= -1
    return Volume(data, affine, volume.scale, volume.offset)


def resampled_grid(
    volume: Volume, spacing_mm: tuple[float, float, float]
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of the grid of that spacing over the same field of view."""
    ratio = np.array(spacing_mm) / volume.spacing_mm
    shape = tuple(max(1, round(n / r)) for n, r in zip(volume.data.shape[1:], ratio, strict=True))
    step = np.diag([*ratio, 1.0])
    # The centers of the two fields of view coincide.
    step[:3, 3] = (np.array(volume.data.shape[1:]) - 1) / 2 - ratio * (np.array(shape) - 1) / 2
    return shape, volume.affine @ step


def resample(
    volume: Volume, shape: tuple[int, int, int], affine: np.ndarray, label: bool = False
) -> Volume:
    """Interpolate linearly onto a grid, smoothed first along axes that shrink; keeps the dtype."""
    import torch
    import torchio

    if tuple(shape) == volume.data.shape[1:] and np.allclose(affine, volume.affine):
        return volume
    # Repeat the border: outside the field of view the resampler would put zeros.
    border = 4
    data = np.pad(volume.data, [(0, 0)] + [(border, border)] * 3, "edge").astype(np.float32)
    wide = volume.affine.copy()
    wide[:3, 3] -= volume.affine[:3, :3] @ np.full(3, border)
    transform = torchio.Resample(
        (tuple(shape), affine),
        image_interpolation="nearest" if label else "linear",
        antialias=not label,
    )
    image = torchio.ScalarImage(tensor=torch.from_numpy(data), affine=wide)
    out = transform(image).data.numpy()
    dtype = volume.data.dtype
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        out = np.clip(np.rint(out), limits.min, limits.max)
    return Volume(out.astype(dtype, copy=False), affine, volume.scale, volume.offset)


def foreground_box(
    volume: Volume, threshold: float, margin_mm: float
) -> tuple[list[int], list[int]]:
    """Return the corners (low, high) of the box of foreground plus a margin, in voxels."""
    data = volume.data[0]
    mask = data > threshold if volume.scale > 0 else data < threshold
    low, high = [], []
    for axis, (n, size) in enumerate(zip(data.shape, volume.spacing_mm, strict=True)):
        hit = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        margin = math.ceil(margin_mm / size)
        low.append(max(0, int(hit[0]) - margin) if len(hit) else 0)
        high.append(min(n, int(hit[-1]) + 1 + margin) if len(hit) else n)
    return low, high


def pad_high(data: np.ndarray, pads: list[int]) -> np.ndarray:
    """Pad the spatial axes of (C, ...) at their high end, reflected where there is enough."""
    return np.pad(data, [(0, 0)] + [(0, pad) for pad in pads], "reflect") if any(pads) else data


def moved(volume: Volume, data: np.ndarray, origin: list[int]) -> Volume:
    """Return other data whose first voxel was voxel `origin` of `volume`."""
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ np.array(origin, float)
    return Volume(data, affine, volume.scale, volume.offset)


# --------------------------------------------------------------------------------------------------


class Augment:
    """Random TorchIO transforms of training patches; the same key gives the same numbers.

    Global random state is as before after each call. TorchIO draws from it, so a loader with
    threads calls this in worker processes instead.

    Args:
        transforms: Name of a TorchIO transform -> its arguments, applied in this order.

    Example:
        >>> augment = Augment({"RandomNoise": {"std": [0, 0.05]}, "RandomGamma": {"p": 0.5}})
        >>> augment(patch, key=(0, 3, 17), spacing_mm=(2.0, 2.0, 2.0))
    """

    def __init__(self, transforms: dict[str, dict[str, Any]]):
        import torchio

        made = []
        for name, options in transforms.items():
            cls = getattr(torchio, name, None)
            if not (isinstance(cls, type) and issubclass(cls, torchio.Transform)):
                raise ValueError(f"data.augment: TorchIO has no transform {name!r}")
            try:
                made.append(cls(**(options or {})))
            except (TypeError, ValueError) as error:
                raise ValueError(f"data.augment: {name}: {error}") from error
        self.transform = torchio.Compose(made)

    @overload
    def __call__(
        self, patch: torch.Tensor, key: tuple[int, ...], spacing_mm: tuple[float, ...]
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        patch: torch.Tensor,
        key: tuple[int, ...],
        spacing_mm: tuple[float, ...],
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def __call__(
        self,
        patch: torch.Tensor,
        key: tuple[int, ...],
        spacing_mm: tuple[float, ...],
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the transformed patch (C, *patch), of the same shape.

        With the weights of its voxels (1 or C, *patch) return both: these move with the patch, by
        nearest neighbors, and what comes in from outside counts 0.
        """
        import torch
        import torchio

        affine = np.diag([*spacing_mm, *(1.0,) * (4 - len(spacing_mm))])

        def cubic(values: torch.Tensor) -> torch.Tensor:
            return (values[..., None] if patch.ndim == 3 else values).clone()

        subject = torchio.Subject(image=torchio.ScalarImage(tensor=cubic(patch), affine=affine))
        if weight is not None:
            subject.add_image(torchio.LabelMap(tensor=cubic(weight), affine=affine), "weight")
        with isolated_random_state(key):
            changed = self.transform(subject)
        out = changed.get_first_image().data
        out = out[..., 0] if patch.ndim == 3 else out
        if out.shape != patch.shape:
            names = ", ".join(type(t).__name__ for t in self.transform.transforms)
            raise ValueError(
                f"data.augment ({names}) turns {tuple(patch.shape)} into {tuple(out.shape)}: "
                f"transforms must keep the shape"
            )
        out = out.to(torch.float32)
        if weight is None:
            return out
        moved = changed.get_images(intensity_only=False)[1].data
        return out, moved.reshape(weight.shape).to(torch.float32)


@contextmanager
def isolated_random_state(key: tuple[int, ...]) -> Iterator[None]:
    """Seed Python, numpy and torch (CPU) with a key, and put their state back afterwards."""
    import torch

    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
