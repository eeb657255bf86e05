"""Where a run's numbers and pictures go: `metrics.jsonl` always, Weights & Biases as well.

The only importer of wandb. W&B is a guest here: it is called on its own thread behind a bounded
queue, it never asks for a key, and when it fails the run goes on. What could not be sent stays in
`wandb/` of the run folder, for `wandb sync`.
"""

import json
import math
import os
import queue
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

SECRET_WORDS = ("api_key", "apikey", "token", "secret", "password", "passwd", "credential")
STOP = object()


class Tracker:
    """Log numbers and pictures of one run.

    Example:
        >>> tracker = Tracker("runs/a", mode="disabled")
        >>> tracker.log({"train/loss": 0.5}, step=10)
        >>> tracker.close()

    Args:
        out_dir: Run folder; `metrics.jsonl` and `wandb/` lie in it.
        mode: online | offline | disabled. None: what WANDB_MODE says, else online when a W&B key
            is found in the environment or in ~/.netrc, else offline.
        config: The run's configuration for the dashboard; secrets in it are redacted.
        run_id: W&B id; None continues the run whose id lies in `out_dir/wandb/run_id`, else new.
        name: Name in the dashboard; default the folder's name.
        project: W&B project.
    """

    def __init__(
        self,
        out_dir: Path | str,
        mode: str | None = None,
        config: Mapping | None = None,
        run_id: str | None = None,
        name: str | None = None,
        project: str = "vae3d",
    ):
        if mode not in (None, "online", "offline", "disabled"):
            raise ValueError(f"wandb: {mode!r} is not one of online, offline, disabled")
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._lines = _open_lines(self.out_dir / "metrics.jsonl")
        self.mode = _choose_mode(mode)
        self.run_id = run_id or _kept_run_id(self.out_dir) or secrets.token_hex(4)
        self._wandb = None
        self._media = _Worker("vae3d-media", size=4)
        self._sender = _Worker("vae3d-wandb", size=1000)
        if self.mode != "disabled":
            path = self.out_dir / "wandb" / "run_id"
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.run_id + "\n")
            settings = dict(name=name or self.out_dir.resolve().name, project=project)
            self._sender.put(self._start, redact(dict(config or {})), settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one line of numbers; a number that is not finite is written as null.

        Args:
            values: Numbers by name, such as `{"train/loss": 0.1}`; a tensor syncs its device.
            step: Optimizer updates done.
        """
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: v if math.isfinite(v) else None for key, v in numbers.items()}
        line = json.dumps({"step": int(step), "time": round(time.time(), 3), **finite})
        os.write(self._lines, (line + "\n").encode())
        self._send(lambda run: run.log({**numbers, "step": int(step)}))

    def log_media(self, media: Mapping[str, Path | str], step: int) -> None:
        """Show files of the run folder in the dashboard.

        Args:
            media: Paths by panel name, such as `{"views/IXI002": "media/IXI002.png"}`.
            step: Optimizer updates done.
        """
        media = {key: Path(path) for key, path in media.items()}

        def send(run):
            import wandb

            kinds = {".png": wandb.Image, ".gif": wandb.Video, ".mp4": wandb.Video}
            panels = {}
            for key, path in media.items():
                extra = {} if path.suffix == ".png" else {"format": path.suffix[1:]}
                panels[key] = kinds[path.suffix](str(path), **extra)
            run.log({**panels, "step": int(step)})

        self._send(send)

    def in_background(self, make: Callable[..., Mapping[str, Path]], *args, step: int, **kwargs):
        """Make pictures off the training thread, then show them: `make(...)` returns paths by name.

        Never blocks: with four jobs waiting the new one is dropped and counted in a warning.
        """
        self._media.put(lambda: self.log_media(make(*args, **kwargs), step))

    def close(self, timeout_s: float = 60.0) -> None:
        """Finish what is under way, at most `timeout_s` seconds; the rest stays in `wandb/`."""
        deadline = time.monotonic() + timeout_s
        self._media.stop(deadline)
        if self._wandb is not None or self.mode != "disabled":
            self._sender.put(self._finish)
        self._sender.stop(deadline)
        os.close(self._lines)

    def _send(self, call: Callable) -> None:
        if self.mode != "disabled":
            self._sender.put(lambda: self._wandb is not None and call(self._wandb))

    def _start(self, config, settings):
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, x_disable_meta=True
        )
        self._wandb = wandb.init(
            dir=str(self.out_dir),
            id=self.run_id,
            resume="allow",
            mode=self.mode,
            config=config,
            settings=quiet,
            **settings,
        )
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")

    def _finish(self):
        if self._wandb is not None:
            self._wandb.finish()


class _Worker:
    """One thread that runs calls in order behind a bounded queue; a failing call warns."""

    def __init__(self, name: str, size: int):
        self.name, self.dropped = name, 0
        self.calls = queue.Queue(maxsize=size)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def put(self, call: Callable, *args) -> None:
        try:
            self.calls.put_nowait((call, args))
        except queue.Full:
            self.dropped += 1
            warnings.warn(f"{self.name} is too slow: dropped a job; the run goes on", stacklevel=3)

    def stop(self, deadline: float) -> None:
        try:
            self.calls.put(STOP, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            return
        self.thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self):
        while (job := self.calls.get()) is not STOP:
            call, args = job
            try:
                call(*args)
            except Exception as error:  # a dashboard must never stop a run
                warnings.warn(f"{self.name}: {type(error).__name__}: {error}; the run goes on")


def read_metrics(path: Path | str) -> list[dict]:
    """Rows of a `metrics.jsonl`, one per step, as the run that counts saw them.

    Lines of one step are merged. A step lower than the one before is a resume: what an earlier
    life wrote after it is dropped. A last line cut by a kill is ignored.
    """
    rows: dict[int, dict] = {}
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = row["step"]
        while rows and next(reversed(rows)) > step:
            rows.popitem()
        rows[step] = {**rows.get(step, {}), **row}
    return list(rows.values())


def redact(value, name: str = ""):
    """The same configuration with everything that looks like a secret blanked."""
    if any(word in name.lower() for word in SECRET_WORDS) and isinstance(value, str):
        return "[redacted]"
    if isinstance(value, Mapping):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _choose_mode(mode: str | None) -> str:
    if mode is None:
        mode = {"dryrun": "offline", "run": "online"}.get(
            os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE")
        )
    if mode == "disabled":
        return mode
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    if mode == "online" and not has_key:
        warnings.warn("wandb: no WANDB_API_KEY in the environment, so this run is offline")
    return "online" if has_key and mode != "offline" else "offline"


def _kept_run_id(out_dir: Path) -> str | None:
    path = out_dir / "wandb" / "run_id"
    return path.read_text().strip() or None if path.is_file() else None


def _open_lines(path: Path) -> int:
    """Append to metrics.jsonl; a line that a kill cut short is closed first."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")
    return handle
