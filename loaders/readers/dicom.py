"""DICOM: series and multi-frame files; the only importer of SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.readers.common import (
    LPS_TO_RAS,
    READING,
    BrokenVolume,
    Reading,
    Volume,
    to_channels_first,
)


def read_dicom(path: Path, reading: Reading = READING) -> Volume:
    """A folder that holds one DICOM series, or a single multi-frame file; see `dicom_slices`."""
    import SimpleITK as sitk

    files = dicom_slices(path) if path.is_dir() else [str(path)]
    try:
        image = sitk.ReadImage(files if len(files) > 1 else files[0])
    except RuntimeError as error:
        raise BrokenVolume(path, f"DICOM cannot be decoded ({str(error)[-200:]})") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise BrokenVolume(path, "holds colors (RGB): convert it to one intensity per voxel")
    data = sitk.GetArrayFromImage(image)  # (Z, Y, X)
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(to_channels_first(path, data.T, reading.volumes_4d), LPS_TO_RAS @ affine)


def dicom_slices(folder: Path) -> list[str]:
    """Sort the files of a series by position; a mixed, gappy or repeated series is an error."""
    import SimpleITK as sitk

    slices, kinds = [], set()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or not is_dicom(file):
            continue
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise BrokenVolume(file, f"damaged DICOM file ({str(error)[-120:]})") from error
        tags = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
        kinds.add((tags.get("0020|000e"), reader.GetSize()[:2], tags.get("0020|0037")))
        direction = np.array(reader.GetDirection()).reshape(3, 3)
        slices.append((float(direction[:, 2] @ np.array(reader.GetOrigin())), str(file)))
    if not slices:
        raise BrokenVolume(folder, "holds no DICOM files")
    if len(kinds) > 1:
        series = len({kind[0] for kind in kinds})
        reason = f"mixes {series} series" if series > 1 else "mixes sizes or orientations"
        raise BrokenVolume(folder, f"{reason}: put each series in its own folder")
    slices.sort()
    steps = np.diff([position for position, _ in slices])
    if len(steps) and steps.min() < 1e-3:
        raise BrokenVolume(folder, "two slices lie at the same position")
    if len(steps) and steps.max() > 1.01 * np.median(steps) + 1e-3:
        at = int(np.argmax(steps))
        raise BrokenVolume(
            folder,
            f"gap of {steps[at]:.4g} mm after {Path(slices[at][1]).name} "
            f"(slices are {np.median(steps):.4g} mm apart): slices are missing",
        )
    return [file for _, file in slices]


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's magic word at byte 128."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def patient_of(path: Path) -> str | None:
    """Return the PatientID of a DICOM file, or of a folder's first; None where there is no DICOM.

    It names a person: hash it before it goes anywhere.
    """
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        first = next((file for file in files if file.is_file() and is_dicom(file)), None)
        if first is None:
            return None
        import SimpleITK as sitk

        reader = sitk.ImageFileReader()
        reader.SetFileName(str(first))
        reader.ReadImageInformation()
    except (OSError, RuntimeError):  # damaged, forbidden or no image: told when it is read
        return None
    tag = "0010|0020"
    return reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""
