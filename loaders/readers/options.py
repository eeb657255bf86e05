"""Options of reading: what becomes of times, colors, stacks, NaN, and of faults of DICOM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

NaN = Literal["error", "fill", "mask"]
Volumes4D = Literal["error", "channels", "first", "samples"]
Color = Literal["error", "gray", "rgb"]
Stacks = Literal["files", "folder"]


@dataclass(frozen=True)
class Dicom:
    """How DICOM slices become a volume where their headers leave a choice.

    Args:
        tolerance_mm: How far a slice may lie off the even grid of its volume in millimeters; a
            quarter of the distance of slices at most.
        gaps: Slices that are missing or unevenly spaced: error, resample (interpolate between
            neighbors) or longest (keep the longest part without a gap).
        series: Folders that hold several series: error, largest (the one with most slices) or all
            (each is a volume, named by its description).
    """

    tolerance_mm: float = 0.1
    gaps: Literal["error", "resample", "longest"] = "error"
    series: Literal["error", "largest", "all"] = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance_mm < math.inf:
            raise ValueError(f"data.dicom.tolerance_mm is {self.tolerance_mm}: use 0 or more")
        if self.gaps not in ("error", "resample", "longest"):
            raise ValueError(f"data.dicom.gaps is {self.gaps!r}: use error, resample or longest")
        if self.series not in ("error", "largest", "all"):
            raise ValueError(f"data.dicom.series is {self.series!r}: use error, largest or all")


@dataclass(frozen=True)
class Reading:
    """How files are read where more than one answer is right.

    Args:
        nan: NaN or infinite voxels: error, fill (with the volume's lowest intensity) or mask (they
            are filled and count nothing).
        volumes_4d: 4D files: error, channels (each volume a channel), first, or samples (each time
            point is a volume of its own, all of one person).
        dicom: Tolerance, gaps and several series of DICOM.
        color: Pictures: all gray, all rgb, or as they are, and a mixture is an error.
        stacks: TIFF and PNG slices: files (each is one image), or a folder of them is one volume.
        missing: A subject that lacks one of its files: error, skip, or zero (channels of zeros).
        mask: Which voxels count: a manifest column of files, or a pattern beside the image, such as
            `{name}_mask.nii.gz`. Its values are weights; what is 0 is neither seen nor counted.
        mask_weights: Weights of the values of masks, e.g. {0: 0.1, 1: 1}; null for the values.
        in_place: Whether zarr, HDF5 and large TIFF stay where they are and patches are read out of
            them; else they are copied into the cache like other files.
        level: Of zarr and TIFF with several sizes: which, from 0, the finest; null for the one
            whose voxels are `preprocess.spacing_mm`, else 0.
        channels: Of what stays: which channels, by number or name; null for all.
        time_point: Of what stays: which time point, from 0; null for what `volumes_4d` says.
        region: Part of each volume that is read, [[x0, x1], [y0, y1], [z0, z1]] in voxels of its
            file (of the level), x1 apart; null for the whole.
    """

    nan: NaN = "error"
    volumes_4d: Volumes4D = "error"
    dicom: Dicom = field(default_factory=Dicom)
    color: Color = "error"
    stacks: Stacks = "files"
    missing: Literal["error", "skip", "zero"] = "error"
    mask: str | None = None
    mask_weights: dict[int, float] | None = None
    in_place: bool = True
    level: int | None = None
    channels: list[int | str] | None = None
    time_point: int | None = None
    region: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.region is not None and not is_box(self.region):
            raise ValueError(
                f"data.region is {self.region!r}: give [[x0, x1], [y0, y1], [z0, z1]] in voxels, "
                f"each from 0 on and the first below the second"
            )
        for name, kinds in get_type_hints(type(self)).items():
            value, literal = getattr(self, name), get_origin(kinds) is Literal
            if literal and value not in get_args(kinds):
                raise ValueError(f"data.{name} is {value!r}: use {', '.join(get_args(kinds))}")
        if not isinstance(self.mask, str | None) or not isinstance(self.mask_weights, dict | None):
            raise ValueError(f"data.mask is {self.mask!r} with weights {self.mask_weights!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Reading:
        """Take from a record what it tells; what it does not know has its default."""
        known = {name: told[name] for name in cls.names() if name in told}
        if isinstance(known.get("dicom"), Mapping):  # a record holds plain values
            try:
                known["dicom"] = Dicom(**known["dicom"])
            except TypeError as error:
                raise ValueError(f"data.dicom is damaged ({error})") from error
        return cls(**known)

    def chosen(self) -> dict[str, object]:
        """Return, as plain values, the options that are not at their defaults."""
        default = asdict(Reading())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def of_stores(self) -> list[str]:
        """Return the options that choose a part of a store, and of no other file."""
        names = ("level", "channels", "time_point")
        return [name for name in names if getattr(self, name) is not None]

    def masked(self, mask: str | None) -> Reading:
        """Return it with other masks, `trained` for its own."""
        return self if mask == "trained" else replace(self, mask=mask, mask_weights=None)


READING = Reading()


def is_box(region: Sequence[Sequence[int]]) -> bool:
    """Whether it is three pairs of whole numbers from 0 on, each rising."""
    try:
        (x0, x1), (y0, y1), (z0, z1) = region
    except (TypeError, ValueError):
        return False
    ends = (x0, x1, y0, y1, z0, z1)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in ends)
    return whole and 0 <= x0 < x1 and 0 <= y0 < y1 and 0 <= z0 < z1
