"""`vae3d report`: one page on one or several runs."""

from __future__ import annotations


def report(runs: list[str], /, out: str | None = None) -> None:
    """Write one HTML page on one or several training runs, side by side.

        vae3d report runs/a
        vae3d report runs/a runs/b --out compare.html

    The page needs no network: what to look at first and which option to change, curves, a viewer on
    the newest reconstructions, pictures, latent health, configuration. Several runs are compared: a
    table, the options that differ, curves over each other. It can be written while a run is
    training, and again later.

    Args:
        runs: Run folders.
        out: The page; default report.html in the first run folder.
    """
    from vae3d.reports.run import write_run_report

    print(f"report: {write_run_report(runs, out)}")
