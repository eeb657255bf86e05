"""How a volume of the store is shown to people: which way is up, its planes, unit and colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from loaders.readers import UNIT_MM, Look, has_place, ras_axes

# Of a microscope's channels that have no color of their own.
PALETTE = ("00ff00", "ff00ff", "00ffff", "ffff00", "ff0000", "0000ff")
# Plane and the axis that it cuts; the other two run to the right and up (or down).
BODY_PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
GRID_PLANES = (("xy", 2), ("xz", 1), ("yz", 0))
SIDES = {"axial": ("L", "R"), "coronal": ("L", "R"), "sagittal": ("P", "A")}


@dataclass(frozen=True)
class Layout:
    """Where the axes of a volume on the store's grid go in a picture.

    `arranged` brings it to x, y, z as its file has them, or in a body to right, front and head.

    Args:
        look: What its file knows.
        axes: The store's axis for each of x, y, z.
        flips: Whether it then runs the other way.
        channels: Name and color (`rrggbb`, empty for gray) of each channel; empty where they have
            none of these.
        cut: Axis of the store that slices (C, X, Y) are cut across.
        radiological: Draw a body as radiologists read it, its right on the left.
    """

    look: Look = field(default_factory=lambda: Look("array"))
    axes: tuple[int, ...] = (0, 1, 2)
    flips: tuple[bool, ...] = (False, False, False)
    channels: tuple[tuple[str, str], ...] = ()
    cut: int = 2
    radiological: bool = False

    @classmethod
    def of(
        cls, look: Look, affine: np.ndarray, geometry: dict, count: int,
        names: Sequence[str] | None = None,
    ) -> Layout:  # fmt: skip
        """Work it out from how a volume came to the store's grid.

        Args:
            look: What its file knows.
            affine: On the store's grid.
            geometry: What undoes its preprocessing.
            count: Its channels.
            names: Of the channels, where the user has given some.
        """
        axes, flips = list(range(3)), [False] * 3
        if look.space == "body":
            axes, flips = ras_axes(affine)
        elif "axes" in geometry:  # turned as if it lay in a body: turn it back
            axes = [geometry["axes"].index(axis) for axis in range(3)]
            flips = [geometry["flips"][axis] for axis in axes]
        channels = colored(look.channels) if len(look.channels) == count else ()
        if names and len(names) == count:
            colors = [color for _, color in channels or [("", "")] * count]
            channels = tuple(zip(names, colors, strict=True))
        return cls(look, tuple(axes), tuple(flips), channels)

    @classmethod
    def of_record(cls, record: dict) -> Layout:
        """Take it from an `undo_record`; one of old does not know the look: a body."""
        look = Look.of(record["look"]) if "look" in record else Look()
        return cls.of(look, np.array(record["affine"]), record["geometry"], len(record["gain"]))

    def volume(self, x: np.ndarray) -> np.ndarray:
        """Give a slice (C, X, Y) the axis back that it was cut across."""
        return np.expand_dims(x, 1 + self.cut) if x.ndim == 3 else x

    def arranged(self, x: np.ndarray) -> np.ndarray:
        """Return a view (C, X, Y, Z) with axes in the order of a picture."""
        x = self.volume(x).transpose(0, *(1 + axis for axis in self.axes))
        return np.flip(x, tuple(1 + axis for axis, flip in enumerate(self.flips) if flip))

    def spacing(self, spacing_mm: Sequence[float] | None) -> tuple[float, ...]:
        """Return the sizes of voxels along the axes of `arranged`, in the file's unit.

        Args:
            spacing_mm: Along the store's axes, of a slice along its two; None for cubic voxels.
        """
        sizes = [1.0] * 3 if spacing_mm is None else [float(size) for size in spacing_mm]
        if len(sizes) == 2:
            sizes.insert(self.cut, 1.0)
        unit = UNIT_MM[self.look.unit]
        return tuple(sizes[axis] / unit for axis in self.axes)

    def planes(self, shape: Sequence[int]) -> tuple[tuple[str, int], ...]:
        """Name and cut axis of the planes to show, those without thin air: one of a picture.

        Args:
            shape: Voxels along the axes of `arranged`.
        """
        known = BODY_PLANES if self.look.space == "body" else GRID_PLANES
        flat = [axis for axis in range(3) if shape[axis] == 1]
        found = tuple((name, axis) for name, axis in known if flat in ([], [axis]))
        return found or known[:1]

    def sides(self, plane: str) -> tuple[str, str]:
        """Left and right of a plane as it is drawn; empty where the file does not know."""
        left, right = SIDES.get(plane, ("", ""))
        return (right, left) if self.radiological else (left, right)

    @property
    def mirrored(self) -> bool:
        """Whether planes are drawn with their first axis to the left."""
        return self.radiological and self.look.space == "body"

    @property
    def downward(self) -> bool:
        """Whether planes are drawn with their second axis down."""
        return self.look.space == "picture"

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """Turn a plane (first axis, second axis) of `arranged` to the rows of its picture."""
        rows = plane.T if self.downward else plane.T[::-1]
        return np.ascontiguousarray(rows[:, ::-1] if self.mirrored else rows)

    def name(self, channel: int) -> str:
        """Name of a channel, else its number in words."""
        name = self.channels[channel][0] if channel < len(self.channels) else ""
        return name or f"channel {channel}"

    def color(self, channel: int) -> str:
        """Color of a channel; empty for gray."""
        return self.channels[channel][1] if channel < len(self.channels) else ""

    def read_by(self, radiological: bool) -> Layout:
        """Return it as radiologists read, or not."""
        return replace(self, radiological=radiological)


def colored(channels: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Give several channels of a microscope colors where they have none; one alone is gray."""
    if all(color for _, color in channels) and len(channels) > 1:
        return channels
    colors = PALETTE if len(channels) > 1 else ("",)
    return tuple((name, colors[n % len(colors)]) for n, (name, _) in enumerate(channels))


def look_of(meta: dict, path: Path) -> Look:
    """What a file knows, by the sidecar of its volume; one of old is asked what its kind has.

    Args:
        meta: The sidecar.
        path: The file.
    """
    if "look" in meta:
        return Look.of(meta["look"])
    affine = np.array(meta["undo"]["source_affine"])
    if has_place(path, affine):
        return Look()
    sized = np.abs(affine[:3, :3]).sum() != 3
    return Look("array" if path.suffix in (".npy", ".npz") else "picture", "mm" if sized else "px")
