"""`vae3d check-data DIR`: what a data set holds, and every reason why it would not train."""

from __future__ import annotations

import sys
from dataclasses import replace

from loaders import DataConfig


def check_data(
    root: str,
    /,
    data: DataConfig,
    spatial_dims: int = 3,
    in_channels: int | None = None,
    json: bool = False,
) -> int:
    """Read every volume to its end; list what is broken or does not fit, with exit code 2.

    What training says of the data before it caches them is said here too, on stderr.

    Args:
        root: Folder, glob or manifest.
        data: How volumes are read and split, as in training.
        spatial_dims: 3 for volumes, 2 for slices.
        in_channels: Channels that the model takes; null for any.
        json: Print one JSON object instead: volumes, persons, lines and faults.
    """
    from json import dumps

    from loaders import LabelCorners, survey_data
    from loaders.config import nobody_trains

    data = replace(data, root=root)
    survey = survey_data(data, spatial_dims, in_channels=in_channels)
    survey.ask_headers()
    for line in survey.lines:
        print(line, file=sys.stderr)
    told = len(survey.lines)
    harmless = survey.read_voxels(isinstance(data.sampler(), LabelCorners), data.threads)
    for line in survey.lines[told:]:
        print(line, file=sys.stderr)
    survey.faults += nobody_trains(root, survey.split)
    if json:
        print(dumps(survey.to_dict(), indent=1))
    else:
        for fault in survey.faults:
            print(fault)
    for fault in harmless:
        print(f"not used: {fault}", file=sys.stderr)
    count = len(survey.subjects)
    images = {str(path) for s in survey.subjects for path in s.paths}
    broken = {fault.path for fault in harmless} & images
    sound = count - len(broken | {fault.path for fault in survey.faults})
    print(f"{sound} of {count} volumes are sound", file=sys.stderr)
    return 2 if survey.faults else 0
