"""Look for broken files before a run does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from loaders.build import num_threads, progress_bar, read_each, storable
from loaders.find import find_subjects
from loaders.readers import READING, BrokenVolume, Reading, Volume
from loaders.series import by_file
from loaders.subjects import Subject


def broken_files(
    root: str, reading: Reading = READING, threads: int | None = None
) -> tuple[int, list[BrokenVolume]]:
    """Read every volume to its end, in parallel.

    Args:
        root: Folder, glob or manifest.
        reading: How the files are read.
        threads: Files read at once; None for one per core, 8 at most.

    Returns:
        Number of volumes, and an error for each broken one, in order.
    """
    subjects = find_subjects(root, reading)

    def check(subject: Subject, volume: Volume) -> None:
        volume = storable(volume, subject.paths[0], reading.nan)
        for channel in volume.data:
            if channel.min() == channel.max():
                raise BrokenVolume(subject.paths[0], f"all voxels are {channel.flat[0]}")

    with ThreadPoolExecutor(threads or num_threads()) as pool:
        tasks = [pool.submit(read_each, group, reading, check) for group in by_file(subjects)]
        found = [task.result() for task in progress_bar(tasks, "checking", show=True)]
    errors = [error for group in found for error in group]
    return len(subjects), [error for error in errors if error is not None]
