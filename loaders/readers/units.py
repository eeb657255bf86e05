"""Voxel sizes in any unit of length; the only importer of pint."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loaders.readers.volume import BrokenVolume

if TYPE_CHECKING:
    import pint

# Axis X, Y or Z -> voxel size in millimeters where the file tells it, what the others have, and the
# unit to show lengths in.
Sizes = tuple[dict[str, float], float, str]
SHOWN = {"mm": 1.0, "um": 1e-3, "nm": 1e-6}  # millimeters
# The file says that it does not know.
NO_UNITS = ("", "???", "pixel", "pixels", "reference frame")


def spacing_mm(sizes: Sizes, num_slices: int) -> tuple[list[float], tuple[str, ...]]:
    """Voxel size along X, Y, Z, and a note on what had to be assumed.

    A single slice has no thickness that anybody would miss, and a picture no size at all.
    """
    told, assumed, _ = sizes
    asked = "XYZ" if num_slices > 1 else "XY" if told else ""
    lacking = [axis for axis in asked if axis not in told]
    note = f"has no voxel size along {', '.join(lacking)}: taken as {assumed:g} mm"
    return [told.get(axis, assumed) for axis in "XYZ"], (note,) if lacking else ()


def millimeters(path: Path, name: str, own: dict[str, float]) -> float | None:
    """Millimeters of a unit of length; None for pixels and the like, which have no length.

    Args:
        path: The file, for the message.
        name: As the file spells it.
        own: Names that mean something else here than to pint.
    """
    name = name.strip().rstrip(".")
    if name.lower() in NO_UNITS:
        return None
    if name in own:
        return own[name]
    if name == "mm":
        return 1.0
    try:
        import pint
    except ImportError as error:
        reason = f"gives its voxel size in {name!r}, which needs `pip install 'vae3d[formats]'`"
        raise BrokenVolume(path, reason) from error

    for spelling in (name, name.lower()):  # `Micron` is known as micron
        if spelling.isidentifier():  # pint would compute what looks like a formula
            try:
                return float(registry().Quantity(1, spelling).to("millimeter").magnitude)
            except (pint.UndefinedUnitError, pint.DimensionalityError):
                continue
    raise BrokenVolume(path, f"gives its voxel size in {name!r}, which is no known unit of length")


def shown_unit(mm: float | None) -> str:
    """Return the unit in which a file's lengths are shown: its own, where that is a usual one."""
    if mm is None:
        return "px"
    return next((name for name, size in SHOWN.items() if math.isclose(mm, size)), "mm")


@cache
def registry() -> pint.UnitRegistry:
    """All units that there are; takes half a second, so made once."""
    import pint

    return pint.UnitRegistry()
