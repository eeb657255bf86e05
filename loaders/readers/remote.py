"""What lies behind a URL: folders of buckets, and arrays of schemes that tensorstore does not know.

The only importer of fsspec and zarr-python. Folders are walked by their listings, never into a
store, whose chunks may be millions.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, TypeVar

from loaders.readers.volume import BrokenVolume

if TYPE_CHECKING:
    import zarr
    from fsspec import AbstractFileSystem

METADATA = ("zarr.json", ".zattrs", ".zarray", ".zgroup")  # by which a store is known
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID or ~/.aws, AWS_NO_SIGN_REQUEST=YES asks without",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}
DENIED = re.compile(r"denied|forbidden|unauthenticated|unauthorized|credential|403|401", re.I)
Found = TypeVar("Found")


def unsigned() -> bool:
    """Whether S3 is asked without credentials, as the tools of others are told it."""
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true")


def remedy(url: str, error: Exception | str) -> str:
    """What can be done where a bucket is not ours to read."""
    if not DENIED.search(str(error)):
        return ""
    where = CREDENTIALS.get(url.partition(":")[0], "the URL itself")
    return f"; credentials are taken from {where}"


@contextmanager
def telling(url: str) -> Iterator[None]:
    """Make one line of whatever a file system says."""
    try:
        yield
    except BrokenVolume:
        raise
    except ImportError as error:
        raise ValueError(
            f"{url}: needs `pip install 'vae3d[remote]'`, and for some schemes more ({error})"
        ) from error
    except Exception as error:  # each file system has errors of its own
        text = " ".join(str(error).split()) or type(error).__name__
        raise BrokenVolume(url, f"cannot be read: {text}{remedy(url, text)}") from error


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Return what reads a URL, and its name there."""
    import fsspec

    options = {"anon": True} if url.startswith("s3:") and unsigned() else {}
    return fsspec.core.url_to_fs(url, **options)


def stores_at(url: str, suffixes: Sequence[str] = ()) -> list[str]:
    """List the stores, and files of some suffixes, in a folder of a bucket, or of a glob.

    Args:
        url: Folder, or glob with `*`, `**` and `[...]`.
        suffixes: Of files.
    """
    is_glob = glob.has_magic(url.replace("?", ""))
    fixed = re.split(r"[*\[]", url)[0].rpartition("/")[0] if is_glob else url.rstrip("/")
    with telling(url):
        from fsspec.utils import glob_translate

        system, root = file_system(fixed)
        depth = 32 if "**" in url or not is_glob else url[len(fixed) :].count("/")
        found = sorted(map(str, below(system, root, suffixes, depth)))
        if is_glob:
            matches = re.compile(glob_translate(root + url[len(fixed) :])).match
            found = [name for name in found if matches(name)]
        return [fixed + name[len(root) :] for name in found]


def below(
    system: AbstractFileSystem, folder: str, suffixes: Sequence[str], depth: int
) -> Iterator[str]:
    """Walk a folder by its listings; what holds the metadata of zarr is one store."""
    entries = system.ls(folder, detail=True)
    names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries}
    if names & set(METADATA):
        yield folder
        return
    for entry in entries:
        name = entry["name"].rstrip("/")
        if entry["type"] != "directory":
            if name.lower().endswith(tuple(suffixes)) and suffixes:
                yield name
        elif depth == 1 or name.lower().endswith(".zarr"):
            yield name
        elif name != folder:
            yield from below(system, name, suffixes, depth - 1)


def read_files(url: str, keys: Sequence[str]) -> dict[str, tuple[bytes, str]]:
    """Return those small files of a folder that exist, each with a mark of its version."""
    found = {}
    with telling(url):
        system, root = file_system(url)
        for key in keys:
            path = f"{root}/{key}"
            try:
                found[key] = (system.cat_file(path), str(system.ukey(path)))
            except FileNotFoundError:
                continue
    return found


def opened(url: str) -> IO[bytes]:
    """Open a file, to be read here and there."""
    return tell(url, lambda system, path: system.open(path, "rb"))


def part(url: str, start: int, count: int) -> bytes:
    """Fetch some bytes of a file."""
    return tell(url, lambda system, path: system.cat_file(path, start, start + count))


def version_of(url: str) -> str:
    """Return what changes whenever a file does."""
    return tell(url, lambda system, path: str(system.ukey(path)))


def tell(url: str, ask: Callable[[AbstractFileSystem, str], Found]) -> Found:
    """Ask the file system of a URL."""
    with telling(url):
        return ask(*file_system(url))


def array(url: str) -> zarr.Array:
    """Open a zarr array; its chunks come one by one, each as it is asked for."""
    with telling(url):
        import zarr
        from zarr.storage import FsspecStore

        return zarr.open_array(FsspecStore.from_url(url, read_only=True), mode="r")
