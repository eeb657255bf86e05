"""Where a run's numbers and pictures go: `metrics.jsonl` always, Weights & Biases as well.

The only importer of wandb. W&B is a guest here: it is called on a thread of its own behind a
bounded queue, it never asks for a key, and when it is slow or down the run goes on. What could not
be sent stays in `wandb/` of the run folder; `wandb sync --include-online runs/a/wandb` sends it.

    tracker = Tracker("runs/a", mode=None, config=config)
    tracker.log({"train/loss": 0.1}, step)                       # one line of numbers
    tracker.log_table("val/volumes", [{"case": "a", "psnr": 27.1}], step)
    tracker.in_background(make, x, recon, step=step)              # make(...) -> {panel: path}
    tracker.close()

Make one on rank 0 only. Names have a slash: train/recon, val/psnr, perf/patches_per_s, latent/kl.
"""

import errno
import json
import math
import os
import queue
import re
import secrets
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loaders.texts import misfit, read_bytes
from loaders.whole import write_text

if TYPE_CHECKING:
    import wandb

SECRET = re.compile(r"api_?key|token|secret|passw|credential|private_?key", re.IGNORECASE)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
REDACTED = "[redacted]"
MODES = ("online", "offline", "disabled")
NUMBER = (float, None)  # of a line; null for one that was not finite
MAX_FAILURES = 3  # W&B calls that fail in a row before it is left alone


class Tracker:
    """Log numbers and pictures of one run.

    Example:
        >>> tracker = Tracker("runs/a", mode="disabled")
        >>> tracker.log({"train/loss": 0.5}, step=10)
        >>> tracker.close()

    Args:
        out_dir: Run folder; `metrics.jsonl`, `tables.jsonl` and `wandb/` lie in it.
        mode: online | offline | disabled. None: what WANDB_MODE says, else online where a W&B key
            is set (WANDB_API_KEY or a login in ~/.netrc), else offline.
        config: The run's configuration, for the dashboard; secrets in it are redacted.
        run_id: W&B id to continue; None takes the one kept in `out_dir/wandb/run_id`, else a new
            one.
        name: Name in the dashboard; default the folder's name.
        project: W&B project.
        timeout_s: How long W&B may take to start, and again to finish [s].
        max_pending_bytes: Volumes that may wait to be drawn [bytes]; beyond it, pictures are left
            out.
    """

    def __init__(
        self,
        out_dir: Path | str,
        mode: str | None = None,
        config: Mapping | None = None,
        run_id: str | None = None,
        name: str | None = None,
        project: str = "vae3d",
        *,
        timeout_s: float = 30.0,
        max_pending_bytes: int = 2**31,
    ):
        self.mode = choose_mode(mode)
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.timeout_s, self.max_pending_bytes = timeout_s, max_pending_bytes
        self.run_id = run_id or _kept_run_id(self.out_dir) or secrets.token_hex(4)
        self._lines = {"metrics.jsonl": _LineFile(self.out_dir / "metrics.jsonl")}
        self._media = _Worker("media", size=64)
        self._pending_bytes, self._lock = 0, threading.Lock()
        self._wandb: _Wandb | None = None
        if self.mode != "disabled":
            _keep_run_id(self.out_dir, self.run_id)
            self._wandb = _Wandb(self.mode, timeout_s)
            self._wandb.worker.put(
                self._wandb.start,
                {"config": redact(dict(config or {}))},
                {
                    "dir": str(self.out_dir),
                    "id": self.run_id,
                    "name": name or self.out_dir.resolve().name,
                    "project": project,
                },
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one line of numbers; one that is not finite is written as null.

        Args:
            values: Numbers by name, such as `{"train/loss": 0.1}`; a tensor syncs its device.
            step: Optimizer updates done.
        """
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: v if math.isfinite(v) else None for key, v in numbers.items()}
        self._write("metrics.jsonl", {"step": int(step), "time": round(time.time(), 3), **finite})
        self._send(lambda run, _: run.log({**numbers, "step": int(step)}))

    def log_table(self, name: str, rows: Iterable[Mapping[str, Any]], step: int) -> None:
        """Write a table, such as a row per validation volume, to `tables.jsonl` and W&B.

        Args:
            name: Panel name, such as `val/volumes`.
            rows: Rows with the same columns.
            step: Optimizer updates done.
        """
        rows = [_plain(row) for row in rows]
        self._write("tables.jsonl", {"step": int(step), "table": name, "rows": rows})
        columns = list(rows[0]) if rows else []
        data = [[row[column] for column in columns] for row in rows]
        self._send(
            lambda run, wandb: run.log(
                {name: wandb.Table(columns=columns, data=data), "step": int(step)}
            )
        )

    def log_media(self, media: Mapping[str, Path | str], step: int) -> None:
        """Show files in the dashboard; locally they are where they are.

        Args:
            media: Files (.png, .gif, .mp4) by panel name, such as `{"views/a": "media/a.png"}`.
            step: Optimizer updates done.
        """
        files = {key: Path(path) for key, path in media.items()}
        self._send(
            lambda run, wandb: run.log(
                {**{k: _panel(wandb, p) for k, p in files.items()}, "step": int(step)}
            )
        )

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
        """Finish pictures and uploads, for at most `timeout_s` [s]; the rest stays in `wandb/`."""
        deadline = time.monotonic() + timeout_s
        if not self._media.stop(deadline):
            warnings.warn("pictures were still being made at the end; the last ones are missing")
        if self._wandb is not None:
            self._wandb.close(deadline, self.out_dir)
        for file in self._lines.values():
            file.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, name: str, row: Mapping) -> None:
        if name not in self._lines:
            self._lines[name] = _LineFile(self.out_dir / name)
        self._lines[name].write(row)

    def _send(self, call: Callable) -> None:
        if self._wandb is not None:
            self._wandb.worker.put(self._wandb.call, call)


class _Wandb:
    """The W&B run. Everything but `close` happens on the worker's thread."""

    def __init__(self, mode: str, timeout_s: float):
        self.mode, self.timeout_s = mode, timeout_s
        self.run: wandb.Run | None = None
        self.failures, self.finished, self.refusal = 0, False, ""
        self.worker = _Worker("wandb", size=4096)

    def start(self, content: dict, where: dict) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # its login line ignores the settings
        import wandb

        content["config"] = {**content["config"], "code": code_version()}
        try:
            self._init(wandb, self.mode, content, where)
        except Exception as error:
            if self.mode == "offline" or wandb.run is not None:
                raise
            wandb.teardown()  # the service would hold on to the run's id
            warnings.warn(f"W&B cannot be reached ({_reason(error)}); this run is offline")
            self._init(wandb, "offline", content, where)

    def _init(self, wandb: ModuleType, mode: str, content: dict, where: dict) -> None:
        settings = wandb.Settings(
            init_timeout=self.timeout_s,
            finish_timeout=self.timeout_s,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # what a kill can take [s]
            console="off",  # the progress line is no log
            silent=True,
            save_code=False,
            disable_git=True,  # a remote's URL may hold a password
            x_disable_meta=True,  # it would store the command line, host and user
        )
        run = wandb.init(
            mode=mode, resume="allow", reinit="create_new", settings=settings, **content, **where
        )
        self.run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def call(self, call: Callable) -> None:
        if self.run is None:
            return
        import wandb

        try:
            call(self.run, wandb)
            self.failures = 0
        except Exception:
            self.failures += 1
            if self.failures == MAX_FAILURES:
                self.run = None
            raise

    def finish(self) -> None:
        if self.run is not None:
            log = Path(self.run.settings.log_internal)
            self.run.finish()
            self.finished, self.refusal = True, _refusal(log)

    def close(self, deadline: float, out_dir: Path) -> None:
        self.worker.stop(deadline, self.finish)
        if self.finished and not self.refusal:
            return
        what = f"refused uploads ({self.refusal})" if self.finished else "did not finish"
        warnings.warn(
            f"W&B {what}; what was not sent lies on the disk: "
            f"wandb sync --include-online {out_dir}/wandb"
        )
        if self.finished:
            return
        # Without this, W&B's own hook would keep the process waiting at its end.
        threading.Thread(target=_tear_down, daemon=True).start()


def _refusal(log: Path) -> str:
    """Why W&B took no more, such as a full quota: its service tells nobody but its own log."""
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        if found := re.search(r"failed to upload: (?:status: )?(\d{3}(?: [A-Z]\w+)+)", line):
            return found[1]
    return ""


def _tear_down() -> None:
    import wandb

    with suppress(Exception):  # its service is dead or stuck, which has been said
        wandb.teardown()


class _Worker:
    """One thread that runs calls in order behind a bounded queue; a failing call warns.

    Args:
        name: What the calls do, for warnings.
        size: Calls that may wait; further ones are dropped.
    """

    def __init__(self, name: str, size: int):
        self.name = name
        self.calls: queue.Queue = queue.Queue(maxsize=size)
        self.thread = threading.Thread(target=self._run, name=f"vae3d-{name}", daemon=True)
        self.thread.start()

    def put(self, call: Callable, *args: object) -> bool:
        try:
            self.calls.put_nowait((call, args))
        except queue.Full:
            warnings.warn(f"{self.name}: too slow, some calls were dropped; the run goes on")
            return False
        return True

    def stop(self, deadline: float, last: Callable | None = None) -> bool:
        """Let the waiting calls run, then `last`, until `deadline` [monotonic s]; did they all?"""
        try:
            for job in ([(last, ())] if last else []) + [None]:
                self.calls.put(job, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            return False
        self.thread.join(max(0.0, deadline - time.monotonic()))
        return not self.thread.is_alive()

    def _run(self) -> None:
        while (job := self.calls.get()) is not None:
            call, args = job
            try:
                call(*args)
            except Exception as error:  # a dashboard must never stop a run
                warnings.warn(f"{self.name}: {_reason(error)}; the run goes on")


class _LineFile:
    """JSON lines, each written whole: a kill can cut the last one, never mix two."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self.handle).st_size
        self.cut = size > 0 and os.pread(self.handle, 1, size - 1) != b"\n"  # by a kill

    def write(self, row: Mapping) -> None:
        line = "\n" * self.cut + json.dumps(row, ensure_ascii=False) + "\n"
        try:
            short = os.write(self.handle, line.encode()) - len(line.encode())
            self.cut = short < 0
            if self.cut:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # a full disk; checkpoints will say so louder
            warnings.warn(f"{self.path}: {error.strerror}; numbers are missing, the run goes on")

    def close(self) -> None:
        os.close(self.handle)


def read_metrics(path: Path | str) -> list[dict]:
    """Rows of a `metrics.jsonl`, one per step, as the run that counts saw them.

    Lines of one step are merged. A step below the one before is a resume: what the earlier life
    wrote beyond it is dropped. A line that a kill cut short is skipped, and what is no number.
    """
    rows: dict[int, dict] = {}
    for line in _read_lines(path):
        step, numbers = line["step"], {k: v for k, v in line.items() if misfit(v, NUMBER) is None}
        row = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        while rows and next(reversed(rows)) > step:
            rows.popitem()
        rows[step] = {**rows.get(step, {}), **row}
    return list(rows.values())


def read_tables(path: Path | str) -> dict[str, dict]:
    """The newest of each table in a `tables.jsonl`, by name: `{"step": ..., "rows": [...]}`."""
    shape = {"table": str, "rows": [{str: (str, *NUMBER)}]}
    return {row["table"]: row for row in _read_lines(path) if misfit(row, shape) is None}


def choose_mode(mode: str | None) -> str:
    """Return online, offline or disabled; online only where W&B has a key, so it never asks."""
    if mode not in (None, *MODES):
        raise ValueError(f"--wandb {mode!r} is not one of {', '.join(MODES)}")
    wanted = mode or {"dryrun": "offline"}.get(
        os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE")
    )
    if wanted in ("offline", "disabled"):
        return wanted
    if _has_key():
        return "online"
    if mode == "online":
        warnings.warn("--wandb online: no key in WANDB_API_KEY or ~/.netrc; this run is offline")
    return "offline"


def redact(value: Any, name: str = "") -> Any:
    """The same configuration as plain data, with everything that looks like a secret blanked.

    Blanked are texts under a name like `api_key` or `token`, values of such variables of the
    environment wherever they occur, and logins inside URLs.
    """
    if isinstance(value, Mapping):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if isinstance(value, (int, float, bool, type(None))):
        return value
    text = str(value)
    if SECRET.search(name):
        return REDACTED
    for key, secret in os.environ.items():
        if SECRET.search(key) and len(secret) >= 8:
            text = text.replace(secret, REDACTED)
    return URL_LOGIN.sub(f"{REDACTED}@", text)


def code_version() -> dict[str, str]:
    """Versions of this package, of torch, and the commit where it runs from a git checkout."""
    import torch

    from vae3d import __version__

    version = {"vae3d": __version__, "torch": torch.__version__}
    home = Path(__file__).resolve().parents[2]
    if (home / ".git").exists():
        git = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
            version["commit"] = found.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            version["commit"] = "unknown"  # no git on this machine
    return version


def _panel(wandb: ModuleType, path: Path) -> "wandb.Image | wandb.Video":
    if path.suffix == ".png":
        return wandb.Image(str(path))
    return wandb.Video(str(path), format=path.suffix[1:])


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON: numbers that are not finite become null."""
    row = {k: v.item() if hasattr(v, "item") else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _kept_run_id(out_dir: Path) -> str | None:
    path = out_dir / "wandb" / "run_id"
    return path.read_text().strip() or None if path.is_file() else None


def _keep_run_id(out_dir: Path, run_id: str) -> None:
    write_text(out_dir / "wandb" / "run_id", run_id + "\n")


def _read_lines(path: Path | str) -> Iterable[dict]:
    for line in read_bytes(Path(path)).decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut by a kill
        if misfit(row, {"step": int}) is None and 0 <= row["step"] < 2**63:
            yield row


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
