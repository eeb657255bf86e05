"""`vae3d check-data DIR`: every broken file of a data set at once, and why."""

from __future__ import annotations

import sys
from typing import Literal


def check_data(
    root: str,
    /,
    nan: Literal["error", "fill", "mask"] = "error",
    volumes_4d: Literal["error", "channels", "first", "samples"] = "error",
    mask: str | None = None,
    threads: int | None = None,
) -> int:
    """Read every volume to its end and list the broken ones; exit code 2 if there are any.

    Args:
        root: Folder, glob or manifest.
        nan: Whether NaN and infinite voxels are an error, or would be filled or masked.
        volumes_4d: Whether 4D files are an error, or how they are taken.
        mask: Manifest column, or pattern with {name} beside the image, of the masks.
        threads: Files read at once; null for one per core.
    """
    from loaders.check import broken_files
    from loaders.readers import Reading

    count, broken = broken_files(root, Reading(nan, volumes_4d, mask), threads)
    for error in broken:
        print(error)
    print(f"{count - len(broken)} of {count} volumes are sound", file=sys.stderr)
    return 2 if broken else 0
