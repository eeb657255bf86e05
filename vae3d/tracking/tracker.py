"""Where a run's numbers and pictures go: `metrics.jsonl` always, and trackers.

    tracker = Tracker("runs/a", Tracking(trackers=("wandb", "tensorboard")), config=config)
    tracker.log({"train/loss": 0.1}, step)                       # one line of numbers
    tracker.log_table("val/volumes", [{"case": "a", "psnr": 27.1}], step)
    tracker.in_background(make, x, recon, step=step)              # make(...) -> {panel: path}
    tracker.close()

Make one on rank 0 only. Names have a slash: train/recon, val/psnr, perf/patches_per_s, latent/kl.
"""

import json
import math
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loaders.texts import misfit, read_bytes
from vae3d.tracking.guests import Guest, Host, Worker
from vae3d.tracking.options import Tracking
from vae3d.tracking.privacy import Aliases, redact, without_places
from vae3d.tracking.to_mlflow import MLflowRun
from vae3d.tracking.to_tensorboard import TensorBoard
from vae3d.tracking.to_wandb import RunId, WandbRun, choose_mode


class Tracker:
    """Log numbers and pictures of one run.

    Example:
        >>> tracker = Tracker("runs/a", Tracking(wandb="disabled"))
        >>> tracker.log({"train/loss": 0.5}, step=10)
        >>> tracker.close()

    Args:
        out_dir: Run folder; `metrics.jsonl`, `tables.jsonl` and a folder per tracker lie in it.
        how: Which trackers, and what they may know; None for the defaults.
        config: The run's configuration, for the trackers; secrets in it are redacted.
        run_id: W&B id to continue; None takes the one kept in `out_dir/wandb/run_id`, else a new
            one. One that was deleted in W&B is not taken again.
        begun_at: Updates done already; what an earlier life logged beyond is replaced [steps].
        timeout_s: How long W&B may take to start, and again to finish [s].
        max_pending_bytes: Volumes that may wait to be drawn [bytes]; beyond it, pictures are left
            out.
    """

    def __init__(
        self,
        out_dir: Path | str,
        how: Tracking | None = None,
        config: Mapping | None = None,
        run_id: str | None = None,
        *,
        begun_at: int = 0,
        timeout_s: float = 30.0,
        max_pending_bytes: int = 2**31,
    ):
        how = how or Tracking()
        mode = choose_mode(how.wandb) if "wandb" in how.trackers else "disabled"
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.max_pending_bytes = max_pending_bytes
        self.alias: Callable[[str], str] = Aliases(self.out_dir) if how.hash_cases else str
        self._id = RunId(self.out_dir, run_id)
        self._lines = {"metrics.jsonl": _LineFile(self.out_dir / "metrics.jsonl")}
        self._media = Worker("media", size=64)
        self._pending_bytes, self._lock = 0, threading.Lock()
        guests: list[Guest] = []
        if mode != "disabled":
            guests.append(WandbRun(self.out_dir, mode, self._id, how, timeout_s))
        if "tensorboard" in how.trackers:
            guests.append(TensorBoard(self.out_dir, begun_at))
        if "mlflow" in how.trackers:
            guests.append(MLflowRun(self.out_dir))
        told = partial(what_is_told, dict(config or {}), how.hash_cases)
        self._hosts = [Host(guest, told) for guest in guests]

    @property
    def run_id(self) -> str:
        """The run's id in W&B, for the checkpoints."""
        return self._id.now

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one line of numbers; one that is not finite is written as null.

        Args:
            values: Numbers by name, such as `{"train/loss": 0.1}`; a tensor syncs its device.
            step: Optimizer updates done.
        """
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: v if math.isfinite(v) else None for key, v in numbers.items()}
        self._write("metrics.jsonl", {"step": int(step), "time": round(time.time(), 3), **finite})
        self._send(lambda guest: guest.log(numbers, int(step)))

    def log_table(self, name: str, rows: Iterable[Mapping[str, Any]], step: int) -> None:
        """Write a table, such as a row per validation volume, to `tables.jsonl` and the trackers.

        Args:
            name: Panel name, such as `val/volumes`.
            rows: Rows with the same columns; the trackers see the other name of a `case`.
            step: Optimizer updates done.
        """
        plain = [_plain(row) for row in rows]
        self._write("tables.jsonl", {"step": int(step), "table": name, "rows": plain})
        shown = [self._under_another_name(row) for row in plain]
        self._send(lambda guest: guest.log_table(name, shown, int(step)))

    def log_media(self, media: Mapping[str, Path | str], step: int) -> None:
        """Show files in the trackers; locally they are where they are.

        Args:
            media: Files (.png, .gif, .mp4) by panel name, such as `{"views/a": "media/a.png"}`.
            step: Optimizer updates done.
        """
        files = {key: Path(path) for key, path in media.items()}
        self._send(lambda guest: guest.log_media(files, int(step)))

    def in_background(
        self, make: Callable[..., Mapping[str, Path]], *args: Any, step: int, **kwargs: Any
    ) -> bool:
        """Make pictures off the training thread, then show them.

        Never waits. When more than `max_pending_bytes` of arrays are waiting already, the job is
        left out and a warning says so.

        Args:
            make: Called as `make(*args, **kwargs)` on the media thread; returns files by panel.
            *args: CPU arrays and whatever else; they must not be changed afterwards.
            step: Optimizer updates done.
            **kwargs: As `args`.

        Returns:
            Whether the job was taken.
        """
        size = sum(getattr(value, "nbytes", 0) for value in (*args, *kwargs.values()))
        with self._lock:
            if self._pending_bytes and self._pending_bytes + size > self.max_pending_bytes:
                warnings.warn(
                    "pictures are made more slowly than they are asked for: left some out; "
                    "raise media_every or lower media_volumes"
                )
                return False
            self._pending_bytes += size

        def job() -> None:
            try:
                self.log_media(make(*args, **kwargs), step)
            finally:
                with self._lock:
                    self._pending_bytes -= size

        return self._media.put(job)

    def close(self, timeout_s: float = 60.0) -> None:
        """Finish pictures and uploads, for at most `timeout_s` [s].

        What W&B did not get stays in `wandb/`.
        """
        deadline = time.monotonic() + timeout_s
        self._media.end(deadline)
        if not self._media.wait(deadline):
            warnings.warn("pictures were still being made at the end; the last ones are missing")
        for host in self._hosts:
            host.end(deadline)
        for host in self._hosts:
            host.wait(deadline)
        for file in self._lines.values():
            file.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _under_another_name(self, row: dict[str, object]) -> dict[str, object]:
        return row | {"case": self.alias(str(row["case"]))} if "case" in row else row

    def _write(self, name: str, row: Mapping) -> None:
        if name not in self._lines:
            self._lines[name] = _LineFile(self.out_dir / name)
        self._lines[name].write(row)

    def _send(self, call: Callable[[Guest], None]) -> None:
        for host in self._hosts:
            host.put(call)


class _LineFile:
    """JSON lines, each written whole: a kill can cut the last one, never mix two."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self.handle).st_size
        if size and os.pread(self.handle, 1, size - 1) != b"\n":  # cut by a kill
            os.write(self.handle, b"\n")

    def write(self, row: Mapping) -> None:
        try:
            os.write(self.handle, (json.dumps(row, ensure_ascii=False) + "\n").encode())
        except OSError as error:  # a full disk; checkpoints will say so louder
            warnings.warn(f"{self.path}: {error.strerror}; numbers are missing, the run goes on")

    def close(self) -> None:
        os.close(self.handle)


def read_metrics(path: Path | str) -> list[dict]:
    """Rows of a `metrics.jsonl`, one per step, as the run that counts saw them.

    Lines of one step are merged. A step below the one before is a resume: what the earlier life
    wrote beyond it is dropped. A line that a kill cut short is skipped.
    """
    rows: dict[int, dict] = {}
    for row in _read_lines(path):
        row = {k: v for k, v in row.items() if misfit(v, (float, None)) is None}
        step = row["step"]
        while rows and next(reversed(rows)) > step:
            rows.popitem()
        rows[step] = {**rows.get(step, {}), **row}
    return list(rows.values())


def read_tables(path: Path | str) -> dict[str, dict]:
    """The newest of each table in a `tables.jsonl`, by name: `{"step": ..., "rows": [...]}`."""
    shape = {"table": str, "rows": [{str: (float, str, None)}]}
    return {row["table"]: row for row in _read_lines(path) if misfit(row, shape) is None}


def what_is_told(config: Mapping[str, object], hash_cases: bool) -> dict[str, object]:
    """What trackers are told of a run's options: no secrets, where names are hashed no paths."""
    told = redact(config) | {"code": code_version()}
    return without_places(told) if hash_cases else told


def code_version() -> dict[str, str]:
    """Versions of this package, of torch, and the commit where it runs from a git checkout."""
    import torch

    from vae3d import __version__

    version = {"vae3d": __version__, "torch": str(torch.__version__)}
    home = Path(__file__).resolve().parents[2]
    if (home / ".git").exists():
        git = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
            version["commit"] = found.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            version["commit"] = "unknown"  # no git on this machine
    return version


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON: numbers that are not finite become null."""
    row = {k: v.item() if hasattr(v, "item") else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _read_lines(path: Path | str) -> Iterable[dict]:
    for line in read_bytes(Path(path)).decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut by a kill
        if misfit(row, {"step": int}) is None and abs(row["step"]) < 2**63:
            yield row
