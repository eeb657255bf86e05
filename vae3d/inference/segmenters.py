"""Segmenters that judge a reconstruction by a task: does it find in it what it finds in the input?

    python evaluate.py ... --segmenter deepbet                  # brains in T1 heads
    python evaluate.py ... --segmenter my_lab.tasks.Vessels     # a class of yours

A further one is a class under `Segmenter`, or a line in `SEGMENTERS`.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.models.classes import import_class, made


class Segmenter:
    """Contract: `segmenter(x, spacing_mm)` gives each voxel a label.

    It is made without arguments and downloads nothing. `x` is `(C, X, Y, Z)`, normalized as the
    network sees it, of a volume or its reconstruction, on the CPU; the labels are whole numbers
    `(X, Y, Z)`, 0 for nothing.
    """

    def __call__(self, x: Tensor, spacing_mm: Sequence[float]) -> np.ndarray:
        """Label the voxels of a volume."""
        raise NotImplementedError


class DeepBet(Segmenter):
    """The brain in T1 heads, by the networks inside the PyPI package `deepbet` (Fisch et al. 2024).

    They are run as deepbet does: one finds the head in 128^3, the other the brain in 256^3 of it.
    Only the package's weights are used (MIT), none of its code and dependencies. Volumes are in
    RAS+, as preprocessing leaves them.
    """

    COARSE, FINE = (128, 128, 128), (256, 256, 256)
    MARGIN = 0.1  # around the head, of its size on either side
    LEAST = 16  # voxels per axis

    def __init__(self) -> None:
        spec = find_spec("deepbet")
        if spec is None or not spec.origin:
            raise ValueError(
                "--segmenter deepbet: its weights come with the package deepbet: "
                "pip install --no-deps deepbet"
            )
        models = Path(spec.origin).parent.parent / "data" / "models"
        names = ("bbox_model.pt", "model.pt")
        self.head, self.brain = (torch.jit.load(models / n, map_location="cpu") for n in names)

    @torch.no_grad()
    def __call__(self, x: Tensor, spacing_mm: Sequence[float]) -> np.ndarray:
        """Label the voxels of the brain with 1."""
        x = x[0].float()
        if min(x.shape) < self.LEAST:
            raise ValueError(f"--segmenter deepbet: finds brains in volumes, not in {[*x.shape]}")
        coarse = _resized(x, self.COARSE)
        ends = (
            coarse.flatten().kthvalue(_rank(coarse, 0.005))[0],
            coarse.flatten().kthvalue(_rank(coarse, 0.995))[0],
        )
        if ends[1] <= ends[0]:
            return np.zeros(x.shape, np.uint8)
        found = self.head(_standardized(coarse, *ends)[None, None])[0, 1] > 0.5
        box = self._box(largest(found.numpy()), x.shape)
        if box is None:
            return np.zeros(x.shape, np.uint8)
        fine = _standardized(_resized(x[box], self.FINE), *ends)
        brain = self.brain(fine[None, None])[0, 1]
        labels = np.zeros(x.shape, np.uint8)
        labels[box] = filled(largest((_resized(brain, x[box].shape) > 0.5).numpy()))
        return labels

    def _box(self, found: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...] | None:
        """Where the head lies in a volume, with a margin; None where there is too little of it."""
        box = []
        for axis, size in enumerate(shape):
            others = tuple(a for a in range(3) if a != axis)
            rows = np.flatnonzero(found.mean(others) > 0.02)
            if not len(rows):
                return None
            scale = size / found.shape[axis]
            center, half = (rows[0] + rows[-1] + 1) / 2 * scale, (rows[-1] + 1 - rows[0]) / 2
            reach = half * scale * (1 + 2 * self.MARGIN)
            box.append(slice(max(0, round(center - reach)), min(size, round(center + reach))))
        return tuple(box)


SEGMENTERS: dict[str, type[Segmenter]] = {"deepbet": DeepBet}


def segmenter_named(name: str) -> Segmenter:
    """Make a segmenter: of `SEGMENTERS`, or a class by its dotted name."""
    cls = SEGMENTERS.get(name)
    if cls is None:
        try:
            cls = import_class(name, (Segmenter,))
        except ImportError as error:
            raise ValueError(
                f"--segmenter {name}: {error}; there are {', '.join(SEGMENTERS)}, or "
                "a class of your own under vae3d.inference.segmenters.Segmenter"
            ) from error
    return made("--segmenter", cls)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice's overlap of two regions, 1 where they are equal; nan where the first is empty."""
    if not a.any():
        return math.nan
    return 2 * float(np.count_nonzero(a & b)) / float(np.count_nonzero(a) + np.count_nonzero(b))


def overlaps(name: str, in_input: np.ndarray, in_recon: np.ndarray) -> dict[str, float]:
    """Columns of a row: the Dice of what was found, and with several labels that of each."""
    labels = [int(label) for label in np.unique(in_input) if label]
    each = {label: dice(in_input == label, in_recon == label) for label in labels}
    row = {f"dice_{name}": float(np.mean([*each.values()])) if each else math.nan}
    if len(labels) > 1:
        row |= {f"dice_{name}_{label}": value for label, value in each.items()}
    return row


def largest(region: np.ndarray) -> np.ndarray:
    """The largest connected part of a region."""
    from scipy import ndimage

    parts, count = ndimage.label(region)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count > 1 else region


def filled(region: np.ndarray) -> np.ndarray:
    """A region without its holes."""
    from scipy import ndimage

    return ndimage.binary_fill_holes(region)


def _resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    return F.interpolate(x[None, None].float(), tuple(shape), mode="nearest-exact")[0, 0]


def _standardized(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As deepbet does: between two quantiles, then to the mean and deviation of its training."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return 0.226 * (x - x.mean()) / x.std().clamp(min=1e-12) + 0.449


def _rank(x: Tensor, part: float) -> int:
    return max(1, round(part * x.numel()))
