"""Trouble for a training in a process of its own: at which moment, and what happens there.

A moment is the so-many-th call of a function, so that a trouble hits at the same place again.
"""

import ctypes
import functools
import io
import os
import pkgutil
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

MOMENTS = {
    "the data are found": "loaders.find.find_subjects",
    "the headers are asked": "loaders.consistency.Survey.ask_headers",
    "a volume is cached": "loaders.build.Builder.build_one",
    "a file of the cache is written": "loaders.build.write_whole",
    "the linear code is fitted": "vae3d.training.linear_code.fit_linear_code",
    "a checkpoint is read": "vae3d.training.checkpoint.load_checkpoint",
    "the configuration is written": "vae3d.training.run.save_config",
    "a step is computed": "vae3d.training.trainer.Trainer.backward",
    "weights are updated": "vae3d.training.trainer.Trainer.update",
    "a line is logged": "vae3d.training.trainer.Trainer.log",
    "a checkpoint is half written": "torch.save",
    "a checkpoint gets a name": "vae3d.training.checkpoint._link_atomic",
    "a note is written": "vae3d.training.checkpoint.Checkpoints.note",
    "a volume is validated": "vae3d.training.validate.Validation.reconstruct",
    "pictures are drawn": "vae3d.training.validate._views",
    "the run is closed": "vae3d.tracking.tracker.Tracker.close",
}
FIRST = {"a volume is cached", "a file of the cache is written", "the linear code is fitted"}
LATER = {"a checkpoint is read"}  # in a run that goes on
ONCE = LATER | {"the data are found", "the headers are asked", "the linear code is fitted"}
ONCE |= {"the configuration is written", "the run is closed"}
OFTEN = {"a step is computed", "weights are updated", "a line is logged", "a volume is validated"}
OFTEN |= {"a volume is cached", "a file of the cache is written"}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
DEEDS = (*SIGNALS, "full disk", "read-only", "vanished volume", "vanished cache")
BALLAST = "ballast"  # the file that fills a disk


@dataclass(frozen=True)
class Trouble:
    """What happens to one rank of a training, and when.

    Args:
        rank: Whom it hits.
        moment: One of `MOMENTS`.
        count: The so-many-th time that it comes, from 1.
        after: After the call instead of before it.
        deed: One of `DEEDS`.
        place: Folder of the run, its cache and its volumes: `run`, `cache`, `volumes`.
        small: Whether the place is a disk of its own that can be filled.
    """

    rank: int
    moment: str
    count: int
    after: bool
    deed: str
    place: Path
    small: bool = False

    def __str__(self) -> str:
        when = "after" if self.after else "before"
        return f"{self.deed} at rank {self.rank} {when} call {self.count} of {self.moment!r}"

    def arm(self) -> None:
        """Let it happen in this process when its moment comes."""
        owner_name, _, name = MOMENTS[self.moment].rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        function, calls = getattr(owner, name), 0

        @functools.wraps(function)
        def troubled(*args, **options):
            nonlocal calls
            calls += 1
            now = calls == self.count
            if now and function is SAVE:
                return self.halfway(*args)
            if now and not self.after:
                self.happen()
            value = function(*args, **options)
            if now and self.after:
                self.happen()
            return value

        setattr(owner, name, troubled)

    def halfway(self, state, file) -> None:
        """Save, with the trouble in the middle of the file."""
        whole = io.BytesIO()
        SAVE(state, whole)
        middle = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:middle])
        file.flush()
        self.happen()
        file.write(whole.getvalue()[middle:])

    def happen(self) -> None:
        """Do the deed, after a line that tells of it."""
        print(f"TROUBLE {self}", flush=True)
        if self.deed in SIGNALS:
            os.kill(os.getpid(), getattr(signal, self.deed))
        elif self.deed == "full disk" and self.small:
            fill(self.place / BALLAST)
        elif self.deed == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif self.deed == "read-only":
            for folder in writable(self.place):
                folder.chmod(0o555)
        else:
            folder = self.place / ("cache" if self.deed == "vanished cache" else "volumes")
            kind = "*.npy" if folder.name == "cache" else "subject_*"
            for path in sorted(folder.glob(kind))[:: 3 if folder.name == "cache" else 1][:2]:
                path.replace(path.with_name(f"gone_{path.name}"))


SAVE = torch.save


def fill(path: Path) -> None:
    """Write a file until the disk takes no more."""
    with open(path, "wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def writable(place: Path) -> list[Path]:
    """Folders that a run writes to."""
    folders = (place / "run", place / "run" / "checkpoints", place / "cache")
    return [folder for folder in folders if folder.is_dir()]


def relieve(place: Path) -> None:
    """Undo whatever has been done to a place."""
    (place / BALLAST).unlink(missing_ok=True)
    for folder in writable(place):
        folder.chmod(0o755)
    for path in place.glob("*/gone_*"):
        path.replace(path.with_name(path.name.removeprefix("gone_")))


def obey_modes() -> None:
    """Give up root's right to write where nobody may, for this process."""
    if os.getuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        both = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        rights = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, rights) == 0, os.strerror(ctypes.get_errno())
        rights[0] &= ~both
        assert libc.capset(header, rights) == 0, os.strerror(ctypes.get_errno())


def note_samples() -> None:
    """Print the samples of each step: epoch's row, volume and corner."""
    from vae3d.training.trainer import Trainer

    update = Trainer.update

    def noting(self, terms, window):
        rows = [
            [int(row), int(volume), *corner]
            for batch in window
            for row, volume, corner in zip(
                batch.index, batch.volume, batch.corner.tolist(), strict=True
            )
        ]
        print(f"SAMPLES {self.step + 1} {rows}", flush=True)
        return update(self, terms, window)

    Trainer.update = noting
