"""What a run folder holds: numbers of each step, tables, configuration."""

from dataclasses import dataclass
from pathlib import Path

from loaders.texts import read_yaml
from vae3d.tracking.tracker import read_metrics, read_tables

HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim")


@dataclass
class RunData:
    """What a run folder holds."""

    name: str
    folder: Path
    rows: list[dict]
    tables: dict[str, dict]
    config: dict

    def column(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of the lines that have `key`."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def values(self, key: str) -> list[float]:
        """The finite values of `key`."""
        return [y for y in self.column(key)[1] if y is not None]

    def best(self, key: str) -> tuple[float, int] | None:
        """The best value of a validation score, and its step."""
        steps, values = self.column(key)
        pairs = [(v, s) for s, v in zip(steps, values, strict=True) if v is not None]
        if not pairs:
            return None
        return max(pairs) if key.endswith(HIGHER_IS_BETTER) else min(pairs)


def read_run(folder: Path) -> RunData:
    """Read a run folder; a run that is still training can be read too."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{folder}: holds no metrics.jsonl; is it a run folder?")
    tables, config = folder / "tables.jsonl", folder / "config.yaml"
    return RunData(
        name=folder.resolve().name,
        folder=folder,
        rows=read_metrics(metrics),
        tables=read_tables(tables) if tables.is_file() else {},
        config=read_yaml(config) if config.is_file() else {},
    )
