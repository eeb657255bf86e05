"""The run folder: one run at a time, one configuration, resumed by the same command."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from loaders.config import DataConfig, as_meant
from loaders.whole import write_text
from vae3d.config import config_dict, save_config, up_to_date
from vae3d.kernels.precision import Amp, faults_of_conv3d
from vae3d.tracking.console import Console
from vae3d.tracking.options import Tracking
from vae3d.tracking.tracker import Tracker
from vae3d.training.checkpoint import NOTED, Checkpoints
from vae3d.training.distributed import World
from vae3d.training.options import Loop
from vae3d.training.precision import native_amp

# May differ between a run and its continuation: they say how long, how watched and where, not what.
HARMLESS = {
    "out_dir",
    "max_steps",
    "max_hours",
    "rewarm_steps",
    "early_stop",
    *(field.name for field in fields(Tracking)),
    "log_every",
    "val_every",
    "val_volumes",
    "media_every",
    "media_volumes",
    "radiological",
    "save_every",
    "keep_checkpoints",
    "device",
    "sharding",  # checkpoints hold whole tensors
    "mesh",
    "slab_axis",
    "threads",
    "timeout_minutes",
    "max_bad_steps",
    "fresh",
    "force",
    "data.root",  # a moved folder; the subjects of the split must be there
    "data.cache_dir",
    "data.threads",
}
# A run keeps the split that these made when it began.
SPLIT_BY = {f"data.{name}" for name in ("fractions", "folds", "fold", "stratify_by", "group_by")}

LOCK = ".lock"
PATIENCE_S = 60.0  # for pictures and uploads at the end of a run
GRACE_S = 10.0  # the same after a signal or an error: who kills often waits for 30 s alone


class Run:
    """A run folder in use. A context manager: the lock is held until it is left.

    Args:
        out_dir: The folder; made when missing.
        world: Rank 0 reads and writes, the others are told.
        keep: Step files that are kept.
    """

    def __init__(self, out_dir: str | Path, world: World, keep: int = 2):
        self.folder = Path(out_dir)
        self.world = world
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep)
        self.made = False  # the folder, by this process
        self.fresh = False  # what an earlier run has left goes when this one begins
        self.function: Callable | None = None  # whose call `begin` was told, and its arguments
        self.options: dict[str, Any] = {}

    def __enter__(self) -> Run:
        self._stack = ExitStack()
        if self.world.is_main:
            self.made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(_Lock(self.folder / LOCK))
            self.checkpoints.sweep()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.made and [path.name for path in self.folder.iterdir()] == [LOCK]:
            (self.folder / LOCK).unlink()  # refused: no run was begun
            self.folder.rmdir()
        self._stack.close()

    def begin(
        self,
        fn: Callable,
        kwargs: dict[str, Any],
        fresh: bool = False,
        force: bool = False,
        say: Callable[[str], None] = print,
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Find the newest checkpoint and hold the configuration against it.

        `config.yaml` is written, and what --fresh removes is removed, by `fit`, when all that the
        options name has been found good.

        Args:
            fn: The function whose call this run is.
            kwargs: Its arguments.
            fresh: Remove the checkpoints that are there and begin anew.
            force: Continue although the configuration has changed.
            say: Where notes go.

        Returns:
            The complete configuration, and the checkpoint to continue from or None. `options`
            holds the arguments by the rules that the run was begun under.
        """
        path, self.fresh = None, fresh
        if self.world.is_main and not fresh:
            path, skipped = self.checkpoints.find_latest()
            for reason in skipped:
                say(f"skipped {reason}")
        path = self.world.broadcast(path)
        state = self.checkpoints.resume(path) if path else None
        if state is not None:
            # Another machine may still see an older note on the checkpoint than the main rank does.
            state |= self.world.broadcast({key: state[key] for key in NOTED if key in state})
            kwargs = as_begun(kwargs, state["config"])
        config = config_dict(fn, kwargs)
        if state is not None:
            changes = differences(with_new_options(state["config"], fn), config)
            if changes and not force:
                raise ValueError(
                    f"{self.folder} was begun with other options ({'; '.join(changes)}); "
                    "use those, or another --out_dir, or --force, or --fresh to begin anew"
                )
            if self.world.is_main:
                self.checkpoints.name(path, state["names"])
                say(f"continuing {path} from step {state['step']}")
                for change in changes:
                    kept = "; no effect, the run keeps its split.json" * _is_one(change, SPLIT_BY)
                    say(f"changed by --force: {change}{kept}")
        self.function, self.options = fn, kwargs
        return config, state

    def precision(self, amp: Amp | None, state: dict[str, Any] | None) -> Amp:
        """Settle `--amp`: what was asked for, what the run began with, or what suits the device.

        Faults of this build of torch in that precision are told.

        Args:
            amp: off | bf16 | fp16 | None.
            state: Checkpoint to continue from, or None.
        """
        begun_with = state["amp"] if state else None
        settled = self.world.broadcast(amp or begun_with or native_amp(self.world.device))
        for line in faults_of_conv3d(self.world.device, settled) if self.world.is_main else ():
            print(line, flush=True)
        return settled

    def track(
        self,
        loop: Loop,
        config: dict[str, Any],
        state: dict[str, Any] | None,
        about: dict[str, str] | None = None,
    ) -> Tracker | None:
        """Open the tracker on the rank that writes; None on the others.

        Args:
            loop: Says which trackers.
            config: What they show as the configuration.
            state: Checkpoint to continue from, or None.
            about: Facts for the terminal.
        """
        if not self.world.is_main:
            return None
        if loop.max_steps < loop.warmup_steps:
            highest = loop.lr * loop.max_steps / (loop.warmup_steps + 1)
            print(
                f"max_steps {loop.max_steps} ends within warmup_steps {loop.warmup_steps}: the "
                f"learning rate gets no higher than {highest:.2g} of {loop.lr:.2g}",
                flush=True,
            )
        if about:
            with Console(loop.max_steps) as console:
                console.summary(about, title=str(self.folder))
        run_id, done = (state["wandb_id"], state["step"]) if state else (None, 0)
        return Tracker(self.folder, loop, config=config, run_id=run_id, begun_at=done)

    def fit(self, trainer: Any, state: dict[str, Any] | None) -> int:
        """Train, then let the tracker finish what is under way.

        When the tracker's turn comes, `last.pt` has been written, after a signal too.

        Args:
            trainer: See `vae3d.training.trainer.Trainer`.
            state: Checkpoint to continue from, or None.

        Returns:
            The exit code.
        """
        if state is not None:
            try:
                trainer.load_state_dict(state)
            except (AttributeError, LookupError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{self.checkpoints.subject[0]}: cannot be continued ({error!r}): damaged, or "
                    "of another training; begin anew with --fresh"
                ) from error
        if self.world.is_main and self.fresh:
            self.checkpoints.clear()
        if self.world.is_main and self.function:
            save_config(self.folder / "config.yaml", self.function, self.options)
        patience = GRACE_S
        try:
            code = trainer.fit()
            if code == 0:
                patience = PATIENCE_S
            return code
        finally:
            if trainer.tracker:
                trainer.tracker.close(patience)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file of the run folder, whole or not at all. Rank 0 only does it."""
        if self.world.is_main:
            write_text(self.folder / name, json.dumps(value, indent=1) + "\n")


def as_begun(kwargs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a run by the rules that it was begun under, where it is that old."""
    data, begun = kwargs.get("data"), config.get("data")
    if isinstance(data, DataConfig) and isinstance(begun, dict):
        preprocess = data.preprocess.as_old_as(begun.get("preprocess") or {})
        kwargs = kwargs | {"data": replace(data, preprocess=preprocess)}
    model, begun = kwargs.get("model"), config.get("model")
    was = (begun.get("init_args") or {}).get("linear_code") if isinstance(begun, dict) else None
    told = model.keywords if isinstance(model, partial) else {}
    if model is not None and was is not None and told.get("linear_code") is None:
        kwargs = kwargs | {"model": partial(model, linear_code=was)}
    return kwargs


def with_new_options(config: dict[str, Any], fn: Callable) -> dict[str, Any]:
    """Bring a saved configuration to today's options: new names, and new ones at their defaults."""
    config = up_to_date(fn, as_meant(config))
    try:
        return config_dict(fn, config)
    except ValueError:  # an option of a class is gone: `differences` names it
        return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what changed in a configuration, `key: old -> new`, harmless keys left out."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "not set") != after.get(key, "not set") and not _is_one(key, HARMLESS)
    ]


def _is_one(key: str, names: Iterable[str]) -> bool:
    """Whether a key, or a change of it, is of one of these options or of a part of it."""
    return any(key == name or key.startswith((f"{name}.", f"{name}:")) for name in names)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; tuples and lists are the same thing in YAML."""
    if isinstance(value, dict) and value:
        return {
            k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}{name}.").items()
        }
    return {prefix[:-1]: json.loads(json.dumps(value))}


class _Lock:
    """Keeps two runs out of one folder. The kernel lets go of it however the process ends."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> _Lock:
        self.file = open(self.path, "a+", encoding="utf-8")
        try:
            import fcntl
        except ImportError:  # not POSIX
            return self
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.exists() or not os.path.samestat(
                os.stat(self.path), os.fstat(self.file.fileno())
            ):
                raise BlockingIOError("removed by a run that was refused")
        except BlockingIOError as error:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise ValueError(
                f"{self.path.parent}: {owner} is training into this folder; wait for it, or "
                "choose another --out_dir"
            ) from error
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
