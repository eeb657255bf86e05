"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".partial"  # ends the names of files that a killed process may leave behind


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Lend a temporary path beside `path`; what was written there takes its place at the end.

    The bytes reach the disk before the name does, and the folder after it, so that a crash at any
    moment leaves the old file or the new one. On an error the temporary file is removed and `path`
    stays as it was. The temporary name ends like `path` does, since many writers go by the suffix.

    Args:
        path: The file to make or replace; its folder is made when missing.

    Example:
        >>> with whole_file("summary.json") as temporary:
        ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}{MARK}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: str | Path) -> None:
    """Remove what killed processes left half-written in `folder`."""
    for path in Path(folder).glob(f".*{MARK}.*"):
        path.unlink(missing_ok=True)
