"""A run as event files for TensorBoard, in `tensorboard/` of the run folder (its only importer).

    tensorboard --logdir runs          # all runs beside one another

Nothing leaves the machine. Pictures and GIF are panels of images, which move; MP4 has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from vae3d.tracking.guests import Config, Guest, Rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import FileWriter

SHOWN = (".png", ".gif")
FLUSH_S = 10  # what a kill can take [s]


class TensorBoard(Guest):
    """Event files; each life of a run writes one, and hides what it repeats of the one before.

    Args:
        out_dir: Run folder.
        begun_at: Updates done when this life of the run begins [steps].
    """

    name = "tensorboard"

    def __init__(self, out_dir: Path, begun_at: int):
        self.folder, self.begun_at = out_dir / "tensorboard", begun_at

    def start(self, config: Config) -> None:
        """Begin a file, with the options as a text."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import text

        self.writer: FileWriter = FileWriter(str(self.folder), flush_secs=FLUSH_S)
        first = self.begun_at + 1
        self.writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first)
        options = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self.writer.add_summary(text("config", f"```yaml\n{options}```"), first)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in numbers.items():
            self.writer.add_summary(scalar(name, value), step)

    def log_table(self, name: str, rows: Rows, step: int) -> None:
        """Write a table as a text."""
        from torch.utils.tensorboard.summary import text

        columns = list(rows[0]) if rows else []
        lines = [columns, ["---"] * len(columns), *(row.values() for row in rows)]
        cells = [[str(value).replace("|", "\\|") for value in line] for line in lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        self.writer.add_summary(text(name, table), step)

    def log_media(self, files: Mapping[str, Path], step: int) -> None:
        """Write pictures and GIF as they are: a browser plays them."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for panel, path in files.items():
            if path.suffix not in SHOWN:
                continue
            with Image.open(path) as picture:
                width, height = picture.size
            image = Summary.Image(
                width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes()
            )
            values.append(Summary.Value(tag=panel, image=image))
        self.writer.add_summary(Summary(value=values), step)

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()
