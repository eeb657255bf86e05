"""Preprocessing that can be undone, and augmentation; the only importer of TorchIO.

Geometry (orientation, spacing, crop, pad) is applied once, when the store is built, and recorded;
intensity is a gain and a bias at each read, so changing it rebuilds nothing. Both go into the
checkpoint through `Preprocess.to_dict` and are inverted on the way out.

Axes: (C, X, Y, Z), RAS+ after `to_store_grid`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from loaders.foreground import foreground_box
from loaders.readers import Boxes, Volume, ras_axes, same_grid, shifted
from loaders.statistics import PERCENTILES, Statistics
from loaders.texts import Record

if TYPE_CHECKING:
    import torch

Pair = tuple[float, float]
Kind = Literal["unit", "symmetric", "zscore", "raw"]

RULES = 2
# What a record means that does not tell: it was written before there was a choice.
FIRST_RULES = {"percentiles_of": "all", "rules": 1}
FIRST_FIELDS = (  # of a record from before there was a choice
    *("spacing_mm", "window_hu", "percentiles", "intensity"),
    *("orient_ras", "crop_foreground", "crop_margin_mm", "pad_to_multiple"),
)
WHOLE = 2**27  # voxels of a volume that is read, or resampled, whole
PIECE = 2**24  # voxels of a larger one that are resampled at once
REACH = 10  # standard deviations of the smoothing, before resampling, to which it is looked
PER_CHANNEL = ("window_hu", "percentiles", "intensity")


@dataclass(frozen=True)
class Normalization:
    """How the intensities of one channel become network input; see `Preprocess`."""

    window_hu: Pair | None = None
    percentiles: Pair = (0.0, 99.5)
    intensity: Kind = "unit"
    percentiles_of: Literal["all", "foreground", "auto"] = "auto"

    def __post_init__(self) -> None:
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
        if self.percentiles_of not in ("all", "foreground", "auto"):
            raise ValueError(
                f"percentiles_of is {self.percentiles_of!r}: use all, foreground or auto"
            )

    def clip(self, stats: Statistics, quantile: Callable[..., float]) -> Pair:
        """Return the lowest and the highest intensity that are told apart.

        Args:
            stats: Statistics of the channel.
            quantile: Function percentile -> intensity of the channel, over all voxels; over those
                of the foreground where a second argument is True.
        """
        if self.intensity == "raw":
            return -math.inf, math.inf
        if self.window_hu is not None:
            return self.window_hu
        low, high = self.percentiles
        # Without a share of the foreground there is no foreground to speak of.
        sparse = stats.get("foreground_fraction", 1.0) < 0.5
        if self.percentiles_of == "foreground" or (self.percentiles_of == "auto" and sparse):
            ends = quantile(low), quantile(high, True)
        else:
            ends = quantile(low), quantile(high)
        if not ends[0] < ends[1]:  # nearly all voxels are equal: take the whole range
            return stats["min"], stats["max"]
        return ends

    def mapping(
        self, stats: Statistics, quantile: Callable[..., float]
    ) -> tuple[float, float, float, float]:
        """Return gain, bias, low and high of `clip(intensity * gain + bias, low, high)`.

        Args:
            stats: Statistics of the channel.
            quantile: As in `clip`.
        """
        low, high = self.clip(stats, quantile)
        if self.intensity == "raw":
            return 1.0, 0.0, low, high
        if self.intensity == "zscore":
            mean, std = stats["foreground_mean"], stats["foreground_std"]
            std = std if std > 0 else (high - low)
            return 1 / std, -mean / std, (low - mean) / std, (high - mean) / std
        bottom = 0.0 if self.intensity == "unit" else -1.0
        gain = (1.0 - bottom) / (high - low)
        return gain, bottom - low * gain, bottom, 1.0


@dataclass(frozen=True)
class Preprocess:
    """How a volume becomes network input; stored in the checkpoint and inverted on the way out.

    `window_hu`, `percentiles` and `intensity` are one setting for all channels, or one for each
    channel by its number or name, as in `{ct: [-1000, 400]}`; who is not named has the default.

    Args:
        spacing_mm: Voxel size after resampling in millimeters; null keeps each volume's own.
        window_hu: Clip intensities to (low, high), for CT in Hounsfield units; else percentiles.
        percentiles: Clip to these percentiles of the source volume's intensities.
        intensity: unit -> [0, 1], symmetric -> [-1, 1], zscore -> mean 0 and SD 1 on foreground,
            raw -> as they are, not even clipped.
        orient_ras: Turn and flip the axes so that X, Y, Z run right, anterior, superior.
        crop_foreground: Cut to the box of voxels above the foreground threshold (Otsu's).
        crop_margin_mm: Border kept around the foreground box in millimeters.
        pad_to_multiple: Pad each axis to a multiple of this many voxels (the model's factor).
        percentiles_of: Voxels that the upper percentile is taken of: all, foreground, or auto: the
            foreground where background is most of the volume. The lower one is of all.
        channels: Names of the channels in their order, for settings and metrics; null for numbers.
        rules: 2, or 1 as in models older than this option: the threshold knows no hot voxels, and
            channels share the background outside a crop and the range of the metrics.
    """

    spacing_mm: tuple[float, float, float] | None = None
    window_hu: Pair | dict[str, Pair | None] | None = None
    percentiles: Pair | dict[str, Pair] = (0.0, 99.5)
    intensity: Kind | dict[str, Kind] = "unit"
    orient_ras: bool = True
    crop_foreground: bool = False
    crop_margin_mm: float = 0.0
    pad_to_multiple: int = 1
    percentiles_of: Literal["all", "foreground", "auto"] = "auto"
    channels: tuple[str, ...] | None = None
    rules: int = RULES

    def __post_init__(self) -> None:
        for name in ("spacing_mm", "channels", *PER_CHANNEL):  # YAML and JSON bring lists
            object.__setattr__(self, name, with_tuples(getattr(self, name)))
        if self.spacing_mm is not None and (len(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0):
            raise ValueError(f"spacing_mm is {self.spacing_mm}: give three sizes above 0")
        if self.pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple is {self.pad_to_multiple}: use 1 or more")
        if self.rules not in (1, RULES):
            raise ValueError(f"rules is {self.rules}: this version knows 1 and {RULES}")
        if self.rules == 1 and self.percentiles_of != "all":
            raise ValueError(f"percentiles_of is {self.percentiles_of}: set rules to 2 for it")
        names = self.channels or ()
        if len(set(names)) < len(names) or not all(map(str.isidentifier, names)):
            raise ValueError(f"channels are {list(names)}: use different names, letters first")
        for setting in PER_CHANNEL:
            for key in self._keys(setting):
                if not (key.isdigit() or key in names):
                    raise ValueError(
                        f"{setting} is set for {key!r}: use a channel's number, or a name of "
                        f"data.preprocess.channels ({list(names) or 'null'})"
                    )
        for number in {0, *range(len(names)), *self.numbers_set}:
            self.channel(number)  # refuses what makes no sense

    def _keys(self, setting: str) -> list[str]:
        """Channels, by number or name, that a setting is given for one by one."""
        value = getattr(self, setting)
        return list(value) if isinstance(value, dict) else []

    @property
    def numbers_set(self) -> set[int]:
        """Numbers of channels that settings are given for."""
        return {int(k) for setting in PER_CHANNEL for k in self._keys(setting) if k.isdigit()}

    def name(self, channel: int) -> str:
        """Name of a channel, else its number."""
        names = self.channels or ()
        return names[channel] if channel < len(names) else str(channel)

    @property
    def drawn_hu(self) -> tuple[float, float] | None:
        """HU of the ends of the data range, where it has such: the same for all that is shown."""
        if isinstance(self.window_hu, dict) or isinstance(self.intensity, dict):
            return None
        return self.window_hu if self.intensity in ("unit", "symmetric") else None

    def channel(self, number: int) -> Normalization:
        """Return the settings of one channel."""
        given: Record = {"percentiles_of": self.percentiles_of}
        for setting in PER_CHANNEL:
            value = getattr(self, setting)
            if not isinstance(value, dict):
                given[setting] = value
            for key in (str(number), self.name(number)):  # the name wins
                if key in self._keys(setting):
                    given[setting] = value[key]
        return Normalization(**given)

    def check_channels(self, count: int, path: Path) -> None:
        """Refuse a volume with another number of channels than the settings speak of."""
        if self.channels and len(self.channels) != count:
            raise ValueError(
                f"{path}: has {count} channels, data.preprocess.channels has "
                f"{len(self.channels)} names"
            )
        if max(self.numbers_set, default=0) >= count:
            raise ValueError(
                f"{path}: has {count} channels, data.preprocess has settings for channel "
                f"{max(self.numbers_set)} (they count from 0)"
            )

    def to_dict(self) -> Record:
        """Return plain values for JSON and checkpoints."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Record) -> Preprocess:
        """Rebuild from `to_dict`; a key this version does not know is an error.

        A record without `percentiles_of` is older than that choice and means what was done then.
        """
        if not isinstance(values, dict):
            raise ValueError(f"preprocess is {values!r}: damaged, or not of vae3d")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"preprocess has unknown keys {unknown}: made by a newer version?")
        try:
            return cls(**{**(FIRST_RULES if is_old(values) else {}), **values})
        except (TypeError, LookupError) as error:  # a text where a number stands
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
    def of_checkpoint(cls, values: Record | None, wanted: Preprocess | None = None) -> Preprocess:
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
        difference = wanted and wanted.as_old_as(values).difference(trained)
        if difference:
            raise ValueError(
                f"data.preprocess is not what the checkpoint was trained with: {difference}; leave "
                f"it out to prepare the volumes as in training"
            )
        return trained

    def as_old_as(self, record: Mapping[str, object]) -> Preprocess:
        """Return these settings by the rules of a record's time, where they are left to us."""
        if is_old(record) and self.percentiles_of != "foreground":
            return replace(self, percentiles_of="all", rules=1)
        return self

    def geometry(self) -> Record:
        """Return the part that decides what lies in the cache: all but the intensity mapping."""
        intensity = (*PER_CHANNEL, "percentiles_of", "channels", "rules")
        decides = {k: v for k, v in self.to_dict().items() if k not in intensity}
        if self.crop_foreground and self.rules > 1:  # the box depends on the threshold
            decides["rules"] = self.rules
        return decides

    def mapping(
        self, stats: Statistics, quantile: Callable[..., float], channel: int = 0
    ) -> tuple[float, float, float, float]:
        """Return `Normalization.mapping` of a channel."""
        return self.channel(channel).mapping(stats, quantile)


def is_old(record: Mapping[str, object]) -> bool:
    """Whether a record of a `Preprocess` is older than the choice of rules."""
    return "percentiles_of" not in record


def with_tuples(value: Any) -> Any:
    """Return a setting with tuples for lists and floats for numbers, in mappings too."""
    if isinstance(value, Mapping):
        return {str(key): with_tuples(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(one if isinstance(one, str) else float(one) for one in value)
    return value


# --------------------------------------------------------------------------------------------------
# Geometry: source grid -> store grid and back.


def to_store_grid(
    volume: Volume,
    preprocess: Preprocess,
    threshold: float | None = None,
    limit: float | None = None,
) -> tuple[Volume, Record]:
    """Orient, resample, crop and pad a volume; return it and the record that undoes it.

    Args:
        volume: As read.
        preprocess: What to do.
        threshold: Foreground threshold in stored numbers of channel 0; needed for the crop.
        limit: Stored number beyond which its voxels are hot and no foreground; None for none.
    """
    record: Record = {
        "source_shape": list(volume.data.shape[1:]),
        "source_affine": volume.affine.tolist(),
    }
    if volume.cut is not None:
        record["cut"] = asdict(volume.cut)
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
        low, high = foreground_box(volume, threshold, limit, preprocess.crop_margin_mm)
        record |= {"crop": [low, high], "crop_from": list(volume.data.shape[1:])}
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        volume = moved(volume, volume.data[(slice(None), *inside)], low)
    if preprocess.pad_to_multiple > 1:
        shape = volume.data.shape[1:]
        pads = [(-n) % preprocess.pad_to_multiple for n in shape]
        record["pad_from"] = list(shape)
        volume = moved(volume, pad_high(volume.data, pads), [0, 0, 0])
    return volume, record


def label_to_store_grid(label: Volume, record: Record) -> Volume:
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
    """Interpolate linearly onto a grid, smoothed first along axes that shrink; keeps the dtype.

    TorchIO is told of the new grid in voxels of the old one: a shear, which it would not hold,
    cancels out, and nanometers are no smaller than millimeters.
    """
    import torch
    import torchio

    if same_grid(volume.data.shape[1:], volume.affine, shape, affine, voxels=0.01):
        return volume
    # Repeat the border: outside the field of view the resampler would put zeros.
    border = 4
    data = np.pad(volume.data, [(0, 0)] + [(border, border)] * 3, "edge").astype(np.float32)
    in_voxels = np.linalg.solve(volume.affine, affine)
    wide = np.eye(4)
    wide[:3, 3] = -border
    transform = torchio.Resample(
        (tuple(shape), in_voxels),
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


class Resampled:
    """A volume on another grid, computed where it is sliced, with the numbers of `resample`.

    A piece is resampled with a margin beyond which the smoothing reaches with less than float32
    tells, so as much is in memory as `PIECE` voxels of the source take, whatever the volume.

    Args:
        source: The volume.
        shape: Of the grid, as in `resample`.
        affine: Of the grid.
        label: As in `resample`.
    """

    scale, offset = 1.0, 0.0  # of what is resampled, see `Volume`

    def __init__(
        self, source: Boxes, shape: tuple[int, ...], affine: np.ndarray, label: bool = False
    ):
        self.source, self.label, self.look = source, label, source.look
        self.dtype, sizes = source.dtype, source.shape[1:]
        self.same = same_grid(sizes, source.affine, shape, affine, voxels=0.01)
        self.affine = source.affine if self.same else affine
        self.shape = (source.shape[0], *shape)
        self.to_source = np.linalg.solve(source.affine, self.affine)
        self.ratio = np.linalg.norm(self.to_source[:3, :3], axis=0)
        sigma = np.sqrt(np.maximum(self.ratio**2 - 1, 0) / (8 * np.log(2)))  # as TorchIO smooths
        self.margin = 4 + np.ceil((not label) * REACH * sigma).astype(int)

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Compute a box."""
        if self.same:
            return self.source[box]
        channels, *ranges = (range(*one.indices(n)) for one, n in zip(box, self.shape, strict=True))
        low = np.array([one.start for one in ranges])
        out = np.empty((len(channels), *map(len, ranges)), self.dtype)
        todo = [(low, low + out.shape[1:])] if out.size else []
        while todo:
            first, last = todo.pop()
            start, stop = self.seen(first, last)
            core = (last - first) * self.ratio  # no smaller than its margins, which cost as much
            if np.prod(stop - start, dtype=float) > PIECE and (core > 2 * self.margin).any():
                axis = int(np.argmax(core / self.margin))
                half = np.arange(3) == axis
                middle = (first[axis] + last[axis]) // 2
                todo += [
                    (first, np.where(half, middle, last)),
                    (np.where(half, middle, first), last),
                ]
                continue
            inside = tuple(slice(a, b) for a, b in zip(first - low, last - low, strict=True))
            out[(slice(None), *inside)] = self.piece(channels, (first, last), (start, stop))
        return out

    def seen(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the box of the source that a box is computed of."""
        corners = np.array([first, last - 1])[np.indices((2, 2, 2)).reshape(3, -1).T, range(3)]
        there = corners @ self.to_source[:3, :3].T + self.to_source[:3, 3]
        size = np.array(self.source.shape[1:])
        start = np.floor(there.min(axis=0)).astype(int) - self.margin
        stop = np.ceil(there.max(axis=0)).astype(int) + self.margin + 1
        return np.clip(start, 0, size - 1), np.clip(stop, 1, size)

    def piece(
        self,
        channels: range,
        box: tuple[np.ndarray, np.ndarray],
        seen: tuple[np.ndarray, np.ndarray],
    ) -> np.ndarray:
        """Resample a box, from its first voxel to the one behind the last, of what it sees."""
        picked = (slice(channels.start, channels.stop), *map(slice, *seen))
        held = Volume(self.source[picked], shifted(self.source.affine, seen[0].tolist()))
        x, y, z = (box[1] - box[0]).tolist()
        return resample(held, (x, y, z), shifted(self.affine, box[0].tolist()), self.label).data


def pad_high(data: np.ndarray, pads: list[int]) -> np.ndarray:
    """Pad the spatial axes of (C, ...) at their high end, reflected where there is enough."""
    return np.pad(data, [(0, 0)] + [(0, pad) for pad in pads], "reflect") if any(pads) else data


def moved(volume: Volume, data: np.ndarray, origin: list[int]) -> Volume:
    """Return other data whose first voxel was voxel `origin` of `volume`."""
    return Volume(data, shifted(volume.affine, origin), volume.scale, volume.offset)


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

    def __init__(self, transforms: dict[str, Record]):
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
