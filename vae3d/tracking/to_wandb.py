"""A run in Weights & Biases (only importer of wandb).

It never asks for a key. What could not be sent stays in `wandb/` of the run folder, and a warning
names the command that sends it. A run that was deleted on the site goes on under a new id.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from loaders.whole import write_text
from vae3d.tracking.guests import Config, Guest, Rows, reason
from vae3d.tracking.options import Tracking

if TYPE_CHECKING:
    import wandb

MODES = ("online", "offline", "disabled")
DELETED = re.compile(r"HTTP 409|Response \[409\]|previously created and deleted")
DELETED_SINCE = re.compile("404|409|410")  # of an upload to a run that was there


class RunId:
    """The id of a run in W&B, and those before it that were deleted on the site.

    Ids lie in `wandb/run_id` of the run folder, the newest first. What a sweep or a user wants
    (WANDB_RUN_ID) comes before that, then what a checkpoint says, unless it was deleted.

    Args:
        out_dir: Run folder.
        wanted: What a checkpoint says, or None.
    """

    def __init__(self, out_dir: Path, wanted: str | None = None):
        self.path = out_dir / "wandb" / "run_id"
        kept = self.path.read_text(encoding="utf-8").split() if self.path.is_file() else []
        self.deleted = kept[1:]
        named = [id for id in (os.environ.get("WANDB_RUN_ID"), wanted, *kept) if id]
        alive = [id for id in named if id not in self.deleted]
        self.now = alive[0] if alive else secrets.token_hex(4)
        self.renewed = False

    def keep(self) -> None:
        """Write the ids for the next life of the run folder."""
        write_text(self.path, "\n".join([self.now, *self.deleted]) + "\n")

    def renew(self) -> None:
        """Take another id: the one there is belongs to a run that was deleted."""
        self.deleted = [self.now, *self.deleted]
        self.now, self.renewed = secrets.token_hex(4), True
        self.keep()


class WandbRun(Guest):
    """A run in Weights & Biases, online or offline.

    Args:
        out_dir: Run folder; W&B's own files lie in `wandb/`.
        mode: online | offline.
        id: The run's id.
        how: Project, name and tags.
        timeout_s: How long W&B may take to start, and again to finish [s].
    """

    name = "wandb"

    def __init__(self, out_dir: Path, mode: str, id: RunId, how: Tracking, timeout_s: float):
        self.out_dir, self.mode, self.id, self.timeout_s = out_dir, mode, id, timeout_s
        self.where = {
            "dir": str(out_dir),
            "project": how.wandb_project or os.environ.get("WANDB_PROJECT") or "vae3d",
            "name": how.wandb_name or os.environ.get("WANDB_NAME") or out_dir.resolve().name,
            "tags": how.wandb_tags or None,  # None: WANDB_TAGS
        }
        self.run: wandb.Run | None = None
        self.refusal = ""
        id.keep()

    def start(self, config: Config) -> None:
        """Open the run; offline where W&B cannot be reached, new where it was deleted."""
        os.environ.setdefault("WANDB_SILENT", "true")  # its login line ignores the settings
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports name paths
        import wandb

        try:
            self._init(wandb, config)
        except Exception as error:
            if self.mode == "offline" or wandb.run is not None:
                raise
            wandb.teardown()  # the service would hold on to the run's id
            self._change_plan(error)
            self.start(config)

    def _change_plan(self, error: Exception) -> None:
        """A new id in the place of a deleted one, once; else offline."""
        if DELETED.search(str(error)) and not self.id.renewed:
            was = self.id.now
            self.id.renew()
            warnings.warn(f"W&B: run {was} was deleted there; this run goes on as {self.id.now}")
        else:
            self.mode = "offline"
            warnings.warn(f"W&B cannot be reached ({reason(error)}); this run is offline")

    def _init(self, wandb: ModuleType, config: Config) -> None:
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
            host=os.environ.get("WANDB_HOST", ""),  # which are told elsewhere, too
            program="vae3d",
        )
        self.run = wandb.init(
            mode=self.mode,
            resume="allow",
            reinit="create_new",
            settings=settings,
            config=dict(config),
            id=self.id.now,
            **self.where,
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log a row of the history; its axis is `step`."""
        assert self.run
        self.run.log({**numbers, "step": step})

    def log_table(self, name: str, rows: Rows, step: int) -> None:
        """Log a table."""
        import wandb

        assert self.run
        columns: list[str | int] = list(rows[0]) if rows else []
        table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self.run.log({name: table, "step": step})

    def log_media(self, files: Mapping[str, Path], step: int) -> None:
        """Log pictures as images, clips as videos."""
        import wandb

        assert self.run
        panels = {
            panel: wandb.Image(str(path))
            if path.suffix == ".png"
            else wandb.Video(str(path), format="gif" if path.suffix == ".gif" else "mp4")
            for panel, path in files.items()
        }
        self.run.log({**panels, "step": step})

    def finish(self) -> None:
        """Wait for the uploads."""
        assert self.run
        log = Path(self.run.settings.log_internal)
        self.run.finish()
        self.refusal = _refusal(log)
        if DELETED_SINCE.match(self.refusal):
            self.id.renew()

    def leave(self, finished: bool) -> str:
        """Name the command that sends what was not sent."""
        if finished and not self.refusal:
            return ""
        if not finished:
            # Without this, W&B's own hook would keep the process waiting at its end.
            threading.Thread(target=_tear_down, daemon=True).start()
        what = f"refused uploads ({self.refusal})" if finished else "did not finish"
        return (
            f"W&B {what}; what was not sent lies on the disk: "
            f"wandb sync --include-online --id {self.id.now} {self.out_dir}/wandb"
        )


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
