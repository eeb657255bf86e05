"""`vae3d check-data DIR`: every broken file of a data set at once, and why."""

from __future__ import annotations

import sys
from typing import Literal


def check_data(
    root: str,
    /,
    nan: Literal["error", "fill"] = "error",
    volumes_4d: Literal["error", "channels", "first", "samples"] = "error",
    threads: int | None = None,
) -> int:
    """Read every volume to its end and list the broken ones; exit code 2 if there are any.

    Args:
        root: Folder, glob or manifest.
        nan: Whether NaN and infinite voxels are an error, or would be filled.
        volumes_4d: Whether 4D files are an error, or taken.
        threads: Files read at once; null for one per core.
    """
    from loaders.check import broken_files
    from loaders.readers import Reading

    count, broken = broken_files(root, Reading(nan, volumes_4d), threads)
    for error in broken:
        print(error)
    print(f"{count - len(broken)} of {count} volumes are sound", file=sys.stderr)
    return 2 if broken else 0
