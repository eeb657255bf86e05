"""The viewer of a report: linked planes of input, reconstruction and error, without a network.

Python hands it the volumes that `tracking.voxels` wrote, inside the page as far as there is room,
else as files beside it; `viewer.js` draws them on plain canvas.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from vae3d.reports.page import escape
from vae3d.tracking.voxels import SMALL, read_voxels_json

MOST_BYTES = 25_000_000  # of all volumes inside a page

NOTE = (
    "Look through a volume: the wheel scrolls, a drag moves the cursor through all planes, one "
    "with the right button or with shift changes the window, and the values under the pointer "
    "stand below. Input and reconstruction are here at 8 bits of the window, from which the page "
    "computes the error; the metrics are of the volumes themselves."
)


def viewers(volumes: Mapping[str, Path], page: Path) -> dict[str, str]:
    """HTML of a viewer for each volume that was written for one.

    Args:
        volumes: File of `write_voxels` by case, the first ones to come into the page first; those
            that are not there have no viewer.
        page: Where the page will lie.
    """
    room, found = MOST_BYTES, {}
    for case, path in volumes.items():
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size <= room and (content := _small(path)):
            room -= size
            inside = f'<script type="application/json">{content}</script>'
            found[case] = f'<div class="viewer">{inside}</div>'
        else:
            address = quote(os.path.relpath(path, page.parent).replace(os.sep, "/"))
            found[case] = (
                f'<div class="viewer" data-src="{address}" data-name="{escape(case)}" '
                f'data-size="{size / 1e6:.0f} MB"></div>'
            )
    return found


def with_pictures(viewer: str, pictures: str) -> str:
    """Put a volume's pictures behind its viewer; in view where that has yet to be asked for."""
    if "data-src" in viewer or not viewer or not pictures:
        return viewer + pictures
    return f"{viewer}<details><summary>Pictures and clip</summary>{pictures}</details>"


def _small(path: Path) -> str:
    """What a small volume's file holds; empty for a large one."""
    content = read_voxels_json(path)
    shape = re.search(r'"shape":\[(\d+),(\d+),(\d+),(\d+)\]', content)
    assert shape, f"{path} was not written by write_voxels"
    channels, x, y, z = map(int, shape.groups())
    return content if channels * x * y * z <= SMALL else ""
