"""What a user can say on trackers, and whether what they need is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

NEEDS = {  # what each is made of, all of it in the extra of the same name
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where a run is shown beside its folder.

    Args:
        trackers: Any of wandb, tensorboard and mlflow, one or several; [] for the run folder alone.
        wandb: online | offline | disabled; null for online with a WANDB_API_KEY, else offline.
        wandb_project: Project in W&B; null for $WANDB_PROJECT, else vae3d.
        wandb_name: Name of the run in W&B; null for $WANDB_NAME, else the folder's name.
        wandb_tags: Tags of the run in W&B; none for $WANDB_TAGS.
        hash_cases: Show trackers and their pictures a hash in the place of each case's id, and no
            path of the data; cases.json in the run folder tells which is which. An evaluation of
            a run that did so does, too.
    """

    trackers: tuple[Literal["wandb", "tensorboard", "mlflow"], ...] = ("wandb",)
    wandb: Literal["online", "offline", "disabled"] | None = None
    wandb_project: str | None = None
    wandb_name: str | None = None
    wandb_tags: tuple[str, ...] = ()
    hash_cases: bool = False

    def __post_init__(self) -> None:
        """Refuse a tracker that is unknown or not installed, before anything is written."""
        for name in self.trackers:
            if name not in NEEDS:
                raise ValueError(f"--trackers {name!r} is not one of {', '.join(NEEDS)}")
            if missing := [part for part in NEEDS[name] if find_spec(part) is None]:
                raise ValueError(
                    f"--trackers {name} needs {', '.join(missing)}: pip install 'vae3d[{name}]'"
                )
