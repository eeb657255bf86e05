"""A run in MLflow (its only importer): on the server of MLFLOW_TRACKING_URI, else in the folder.

Without a server the run is in `mlflow/mlflow.db` of the run folder, with its artifacts beside it:

    mlflow ui --backend-store-uri sqlite:///runs/a/mlflow/mlflow.db

MLflow's own way to begin a run would note user, script and commit; this one notes what it is told.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loaders.whole import write_text
from vae3d.tracking.guests import Config, Guest, Rows

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

NOT_IN_NAMES = re.compile(r"[^\w\-. /]", re.ASCII)
MOST_PARAMS, LONGEST_PARAM = 100, 500  # of a call, characters of one: what all servers take


class MLflowRun(Guest):
    """A run in MLflow; numbers are metrics, tables JSON, pictures images and clips artifacts.

    Args:
        out_dir: Run folder; the run's id lies in `mlflow/run_id`.
    """

    name = "mlflow"

    def __init__(self, out_dir: Path):
        self.name_of_run = out_dir.resolve().name
        self.home = out_dir.resolve() / "mlflow"

    def start(self, config: Config) -> None:
        """Open the run: the one of an earlier life, unless it was deleted."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.home.mkdir(parents=True, exist_ok=True)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self.client: MlflowClient = MlflowClient(server or f"sqlite:///{self.home / 'mlflow.db'}")
        run_id = self._continued()
        if run_id is None:
            place = None if server else (self.home / "artifacts").as_uri()
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "vae3d"), place)
            run_id = self.client.create_run(experiment, run_name=self.name_of_run).info.run_id
            write_text(self.home / "run_id", run_id + "\n")
            self._log_params(run_id, config)
        self.run_id = run_id
        self.client.log_dict(run_id, dict(config), "config.yaml")

    def _continued(self) -> str | None:
        """The run of an earlier life of the folder, running again; None where there is none."""
        from mlflow.exceptions import MlflowException

        kept = self.home / "run_id"
        if not kept.is_file():
            return None
        run_id = kept.read_text(encoding="utf-8").strip()
        try:
            alive = self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # deleted for good, or another server
                raise
            alive = False
        if alive:
            self.client.update_run(run_id, status="RUNNING")
        return run_id if alive else None

    def _experiment(self, name: str, place: str | None) -> str:
        """The id of the experiment, which another run may be making at this moment."""
        from mlflow.exceptions import MlflowException

        if (found := self.client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        try:
            return self.client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._experiment(name, place)

    def _log_params(self, run_id: str, config: Config) -> None:
        from mlflow.entities import Param

        params = [Param(clean(key), str(value)[:LONGEST_PARAM]) for key, value in flat(config)]
        for begin in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(run_id, params=params[begin : begin + MOST_PARAMS])

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log metrics."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(clean(name), value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_table(self, name: str, rows: Rows, step: int) -> None:
        """Log a table as a JSON file of its step."""
        text = json.dumps(list(rows), indent=1, ensure_ascii=False)
        self.client.log_text(self.run_id, text, f"{clean(name)}/step_{step:08d}.json")

    def log_media(self, files: Mapping[str, Path], step: int) -> None:
        """Log pictures as images over the steps, clips as a file a step."""
        from PIL import Image

        for panel, path in files.items():
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    self.client.log_image(self.run_id, picture, key=clean(panel), step=step)
                continue
            with tempfile.TemporaryDirectory() as folder:  # an artifact is called like its file
                named = Path(folder) / f"step_{step:08d}{path.suffix}"
                shutil.copyfile(path, named)
                self.client.log_artifact(self.run_id, str(named), clean(panel))

    def finish(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run_id)


def clean(name: str) -> str:
    """A name as MLflow takes it."""
    return NOT_IN_NAMES.sub("_", name)


def flat(config: Config, before: str = "") -> Iterator[tuple[str, object]]:
    """Options by dotted name."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
