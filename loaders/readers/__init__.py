from loaders.readers.common import (
    LPS_TO_RAS,
    READERS,
    BrokenVolume,
    Volume,
    Volumes4D,
    check_file,
    is_dicom,
    num_items,
    ras_axes,
    read_volume,
    volume_suffix,
    write_volume,
)

__all__ = [
    "LPS_TO_RAS",
    "READERS",
    "BrokenVolume",
    "Volume",
    "Volumes4D",
    "check_file",
    "is_dicom",
    "num_items",
    "ras_axes",
    "read_volume",
    "volume_suffix",
    "write_volume",
]
