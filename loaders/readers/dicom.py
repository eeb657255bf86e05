"""DICOM: files and folders of them -> series -> a volume.

What a file holds is told by `planes`; here planes are sorted into series, laid on an even grid, and
read, each by its own rescale.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loaders.readers.axes import to_channels_first
from loaders.readers.options import READING, Dicom, Reading
from loaders.readers.planes import (
    UNNAMED,
    Plane,
    across,
    header_of,
    intensities,
    is_dicom,
    object_name,
    planes_of,
)
from loaders.readers.volume import LPS_TO_RAS, BrokenVolume, Volume
from loaders.readers.voxels import split_series

PICTURES = "name the files one by one where each is a picture of its own"
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")  # claim to be DICOM; any other name is asked

# --------------------------------------------------------------------------------------------------
# A folder: which files are DICOM, and which series they belong to.


def holds_dicom(path: Path) -> bool:
    """Whether a path is a DICOM file, or a folder with one."""
    files = path.iterdir() if path.is_dir() else [path]
    return any(claims_dicom(file) for file in files)


def claims_dicom(file: Path) -> bool:
    """Whether a file is DICOM by its first bytes, or by a name from before these were usual."""
    return file.is_file() and (is_dicom(file) or file.suffix.lower() in DICOM_SUFFIXES)


def patient_of(path: Path) -> str | None:
    """Return the PatientID of the first image that a path stands for; None without DICOM.

    It names a person: hash it before it goes anywhere.

    Args:
        path: File, folder, or `folder#series`.
    """
    source, series = split_series(path)
    try:
        for file in sorted(source.iterdir()) if source.is_dir() else [source]:
            if claims_dicom(file) and object_name(file) is None:
                header, _ = header_of(file)
                uid = str(header.get("SeriesInstanceUID") or UNNAMED)
                if series is None or series.partition("-")[0] == uid:  # uid-2 is a part of it
                    return str(header.get("PatientID") or "").strip()
    except (OSError, BrokenVolume):  # damaged or forbidden: told when it is read
        pass
    return None


def planes_below(folder: Path) -> list[Plane]:
    """Read the headers of all images in a folder; DICOM objects that hold none are passed over."""
    found: list[Plane] = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        if is_dicom(file):
            found += planes_of(file) if object_name(file) is None else []
        elif file.suffix.lower() in DICOM_SUFFIXES:  # of before the standard's first bytes, or cut
            found += planes_of(file, required=True)
    if not found:
        raise BrokenVolume(folder, "holds no DICOM files with an image")
    return found


def series_of(planes: Sequence[Plane], options: Dicom) -> dict[str, list[Plane]]:
    """Sort planes by series, and within a series by size and orientation, as scouts differ in both.

    Returns:
        The UID of each series and its planes, the most first; further parts of a series have
        `-2`, `-3` behind its UID.
    """
    of_series: dict[tuple[str, tuple[int, ...]], list[list[Plane]]] = {}
    for plane in planes:
        parts = of_series.setdefault((plane.series, plane.pixels.shape[1:]), [])
        part = next((part for part in parts if alike(plane, part[0], options)), None)
        if part is None:
            parts.append([plane])
        else:
            part.append(plane)
    parts = [part for parts in of_series.values() for part in parts]
    parts.sort(key=lambda part: (-len(part), part[0].series, str(part[0].file)))
    found: dict[str, list[Plane]] = {}
    times: Counter[str] = Counter()
    for part in parts:
        series = part[0].series
        times[series] += 1
        found[series if times[series] == 1 else f"{series}-{times[series]}"] = part
    return found


def alike(one: Plane, other: Plane, options: Dicom) -> bool:
    """Whether two planes may be slices of one volume: far corners differ less than the tolerance.

    Orientations and pixel sizes are rounded differently from slice to slice.
    """
    rows, columns = one.pixels.shape[1:]
    far = np.abs((one.edges - other.edges) * (columns, rows)).max()
    limit = min(options.tolerance_mm, float(np.linalg.norm(one.edges, axis=0).min()))
    return bool(far <= limit or np.array_equal(one.edges, other.edges))


def volumes_of(folder: Path, options: Dicom) -> dict[Path, str]:
    """Return path (`folder#uid`, which read_volume takes) and name of each series in a folder."""
    found = series_of(planes_below(folder), options)
    return {Path(f"{folder}#{series}"): found[series][0].name for series in sorted(found)}


def chosen_planes(path: Path, options: Dicom) -> list[Plane]:
    """Return the planes of the one series that a path stands for: a file, a folder, folder#uid."""
    source, series = split_series(path)
    planes = planes_below(source) if source.is_dir() else planes_of(source, required=True)
    found = series_of(planes, options)
    if series is not None:
        if series not in found:
            raise BrokenVolume(path, f"no such series; the folder holds {' '.join(found)}")
        return found[series]
    first = next(iter(found.values()))
    if len(found) == 1:
        return first
    names = ", ".join(f"{part[0].name} ({len(part)})" for part in list(found.values())[:4])
    names += ", ..." * (len(found) > 4)
    if options.series == "largest":
        told = f"{first[0].name}, {len(first)} slices, is taken of {len(found)} series: {names}"
        print(f"{path}: {told}", file=sys.stderr)
        return first
    raise BrokenVolume(
        path,
        f"mixes {len(found)} series, sizes or orientations: {names}; set data.dicom.series to "
        f"largest or all, or put each series in its own folder",
    )


# --------------------------------------------------------------------------------------------------
# Planes -> a volume.


def read_dicom(path: Path, reading: Reading = READING) -> Volume:
    """A series in a folder, or a file of one frame or many; each slice by its own rescale."""
    planes = chosen_planes(path, reading.dicom)
    if planes[0].segment:
        return segmentation(path, planes)
    stack = stacked(path, planes)
    stack, at, step = evenly(path, stack, reading.dicom)
    data, slope, intercept = gathered(stack)
    if at is not None:
        data = interpolated(data, at)
    affine = affine_of(stack[0][0], step)
    volume = to_channels_first(path, data.T, reading.volumes_4d)
    return Volume(volume, affine, slope, intercept, look=stack[0][0].look)


def affine_of(first: Plane, step: np.ndarray) -> np.ndarray:
    """Return the affine (RAS+ millimeters) of planes that lie `step` apart (LPS).

    A step that is not across the planes, as under a tilted gantry, makes a sheared affine.
    """
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2] = first.edges, step
    if first.position is not None:
        affine[:3, 3] = first.position
    return LPS_TO_RAS @ affine


def stacked(path: Path, planes: list[Plane]) -> list[list[Plane]]:
    """Sort planes by position, those at one position (times, echoes) by their order."""
    if len(planes) == 1:
        return [planes]
    normal = across(planes[0].edges)
    places: list[tuple[float, Plane]] = []
    for plane in planes:
        if plane.position is None:
            raise BrokenVolume(
                plane.file, f"does not tell where it lies (ImagePositionPatient); {PICTURES}"
            )
        places.append((float(plane.position @ normal), plane))
    places.sort(key=lambda place: (round(place[0], 6), place[1].order, str(place[1].file)))
    pixel = np.linalg.norm(planes[0].edges, axis=0).min()
    stack, last = [], -math.inf
    for height, plane in places:
        if height - last > 1e-3 * pixel:
            stack.append([plane])
            last = height
        else:
            stack[-1].append(plane)
    times = min(len(same) for same in stack)
    for same in stack:
        if len(same) > times or len({plane.order for plane in same}) < len(same):
            one, other = same[:2]
            raise BrokenVolume(
                path,
                f"two slices lie at the same position, {one.file.name} and {other.file.name}: "
                f"remove one, or put each volume in its own folder",
            )
    return stack


def evenly(
    path: Path, stack: list[list[Plane]], options: Dicom
) -> tuple[list[list[Plane]], np.ndarray | None, np.ndarray]:
    """Lay slices on an even grid.

    Returns:
        The slices that are taken; where they lie among the volume's, in steps (None: each at its
        own place); and the step (3,) in millimeters (LPS).
    """
    normal = across(stack[0][0].edges)
    if len(stack) == 1:
        return stack, None, normal * stack[0][0].thickness
    points = np.array([same[0].position for same in stack])
    height = (points - points[0]) @ normal
    steps = np.diff(height)
    usual = float(np.median(steps))
    limit = max(min(options.tolerance_mm, usual / 4), 1e-6 * usual)
    even = np.linspace(0, height[-1], len(stack))
    if np.abs(height - even).max() > limit and options.gaps != "resample":
        if options.gaps == "error":
            raise BrokenVolume(path, unevenness(stack, steps, usual))
        cuts = np.flatnonzero(np.abs(steps - usual) > 2 * limit) + 1
        kept = max(np.split(np.arange(len(stack)), cuts), key=len)
        print(f"{path}: {len(kept)} of {len(stack)} slices are without a gap", file=sys.stderr)
        return evenly(path, [stack[n] for n in kept], replace(options, gaps="error"))
    line = points[-1] - points[0]
    aside = np.linalg.norm(points - points[0] - np.outer(height / height[-1], line), axis=1).max()
    if aside > limit:
        raise BrokenVolume(
            path,
            f"slices lie up to {aside:.4g} mm beside a straight line, so no grid holds them; "
            f"data.dicom.tolerance_mm is {options.tolerance_mm:g}",
        )
    if np.linalg.norm(line - height[-1] * normal) <= limit:
        line = height[-1] * normal  # rounding, no tilt
    if np.abs(height - even).max() <= limit:
        return stack, None, line / (len(stack) - 1)
    count = round(height[-1] / usual)
    print(f"{path}: {len(stack)} slices are resampled to {count + 1} even ones", file=sys.stderr)
    return stack, height / height[-1] * count, line / count


def unevenness(stack: list[list[Plane]], steps: np.ndarray, usual: float) -> str:
    """Say why slices lie on no even grid, and what can be done."""
    at = int(np.argmax(steps))
    remedy = "set data.dicom.gaps to resample or longest"
    if steps[at] > 1.5 * usual:
        return (
            f"gap of {steps[at]:.4g} mm after {stack[at][0].file.name} (slices are {usual:.4g} mm "
            f"apart): slices are missing; find them, or {remedy}"
        )
    return (
        f"slices are unevenly spaced, {steps.min():.4g} to {steps.max():.4g} mm apart; {remedy}, "
        f"or raise data.dicom.tolerance_mm to take them as even"
    )


def gathered(stack: list[list[Plane]]) -> tuple[np.ndarray, float, float]:
    """Read planes into one array (T, Z, rows, columns).

    Returns:
        Stored numbers with their slope and intercept where all planes share them, else intensities.
    """
    first = stack[0][0]
    planes = {(t, z): plane for z, same in enumerate(stack) for t, plane in enumerate(same)}
    kinds = {(plane.slope, plane.intercept, plane.lut is None) for plane in planes.values()}
    alike = len(kinds) == 1 and first.lut is None
    dtypes = {plane.pixels.dtype.newbyteorder("=") for plane in planes.values()}
    dtype = np.result_type(*dtypes) if alike else np.dtype(np.float32)
    data = np.empty((len(stack[0]), len(stack), *first.pixels.shape[1:]), dtype)
    files: dict[Path, list[tuple[int, int]]] = {}
    for place, plane in planes.items():
        files.setdefault(plane.file, []).append(place)
    for places in files.values():
        frames = planes[places[0]].pixels.read()
        for place in places:
            plane = planes[place]
            stored = frames[plane.index]
            data[place] = stored if alike else intensities(stored, plane)
    return (data, first.slope, first.intercept) if alike else (data, 1.0, 0.0)


def interpolated(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Interpolate slices (T, Z, ...) that lie at `at` to 0, 1, 2, ...; keeps the dtype."""
    count = round(at[-1]) + 1
    out = np.empty((len(data), count, *data.shape[2:]), data.dtype)
    for z in range(count):
        above = int(np.clip(np.searchsorted(at, z), 1, len(at) - 1))
        share = (z - at[above - 1]) / (at[above] - at[above - 1])
        mixed = data[:, above - 1] * (1 - share) + data[:, above] * share
        out[:, z] = np.rint(mixed) if data.dtype.kind in "iu" else mixed
    return out


def segmentation(path: Path, planes: list[Plane]) -> Volume:
    """A binary segmentation: 0 and 1, or the segment's number where there are several.

    Planes that show nothing are left out of the file, so those that lack are empty.
    """
    segments = sorted({plane.segment for plane in planes})
    normal = across(planes[0].edges)
    if any(plane.position is None for plane in planes):
        raise BrokenVolume(path, "does not tell where its planes lie (ImagePositionPatient)")
    planes = sorted(planes, key=lambda plane: float(plane.position @ normal))
    height = np.array([plane.position @ normal for plane in planes])
    height -= height[0]
    apart = np.unique(np.round(height, 4))
    step = float(np.diff(apart).min()) if len(apart) > 1 else planes[0].thickness
    at = np.rint(height / step).astype(int)
    if np.abs(height - at * step).max() > step / 4:
        raise BrokenVolume(path, f"planes lie on no even grid of {step:.4g} mm")
    shape = planes[0].pixels.shape[1:]
    data = np.zeros((at[-1] + 1, *shape), np.uint8 if segments[-1] < 256 else np.uint16)
    frames = {plane.file: plane.pixels.read() for plane in planes}
    for z, plane in zip(at, planes, strict=True):
        inside = frames[plane.file][plane.index] != 0
        data[z][inside] = plane.segment if len(segments) > 1 else 1
    return Volume(data.T[None], affine_of(planes[0], normal * step))
