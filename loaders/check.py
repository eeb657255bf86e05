"""Look for broken files before a run does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from loaders.build import num_threads, progress_bar, read_subject, storable, tell_notes
from loaders.find import find_subjects
from loaders.readers import READING, BrokenVolume, Reading
from loaders.subjects import Subject


def broken_files(
    root: str, reading: Reading = READING, threads: int | None = None
) -> tuple[int, list[BrokenVolume]]:
    """Read every volume to its end, in parallel; say what readers had to assume.

    Args:
        root: Folder, glob or manifest.
        reading: How the files are read.
        threads: Files read at once; None for one per core, 8 at most.

    Returns:
        Number of volumes, and an error for each broken one, in order.
    """
    subjects = find_subjects(root, reading)

    notes: dict[str, tuple[str, ...]] = {}

    def check(subject: Subject) -> BrokenVolume | None:
        try:
            volume = read_subject(subject, reading)
            notes[subject.id] = volume.notes
            volume = storable(volume, subject.paths[0], reading.nan)
            for channel in volume.data:
                if channel.min() == channel.max():
                    raise BrokenVolume(subject.paths[0], f"all voxels are {channel.flat[0]}")
        except BrokenVolume as error:
            return error
        return None

    with ThreadPoolExecutor(threads or num_threads()) as pool:
        tasks = [pool.submit(check, subject) for subject in subjects]
        found = [task.result() for task in progress_bar(tasks, "checking", show=True)]
    tell_notes([(subject.paths[0], notes.get(subject.id, ())) for subject in subjects])
    return len(subjects), [error for error in found if error is not None]
