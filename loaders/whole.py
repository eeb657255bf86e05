"""Files, and folders of them, that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".partial."  # in the names of what a killed process may leave behind


@contextmanager
def whole_file(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Lend a temporary path beside `path`; what was written there takes its place at the end.

    A process killed at any moment leaves the old file or the new one. On an error the temporary
    file is removed and `path` stays as it was; one of the disk names `path`. The temporary name
    ends like `path`, since writers go by the suffix.

    Args:
        path: The file or folder to make or replace; its own folder is made when missing.
        durable: Wait until the disk has the bytes before the name moves, and then the name, so
            that this holds for a power cut too.

    Example:
        >>> with whole_file("summary.json") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("{}")
    """
    path = Path(path)
    if not path.name:
        raise ValueError(f"{str(path)!r} is no name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}{MARK}{path.name}")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        if temporary.is_dir() and path.is_dir():  # of these, no one call replaces one by another
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:  # a write to a full disk names no file, others the temporary one
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    if durable and os.name == "posix":  # elsewhere a folder cannot be opened
        fsync(path.parent)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all."""
    path = Path(path)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left in a folder. Only for who alone writes there."""
    for path in Path(folder).glob(f".*{MARK}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
