"""Mean and variance of volumes that no one place holds: of parts, merged in float64."""

import torch
from torch import Tensor

BLOCK = 4096  # voxels whose variance is summed in float32; longer blocks lose digits


class Moments:
    """Mean and variance per channel over a whole volume, merged from tiles in float64.

    Chan, Golub and LeVeque 1979: each block is centered on its own mean, so no digits are lost to a
    large mean, and the variance between blocks is added when they are merged.
    """

    def __init__(self, channels: int, device: torch.device = torch.device("cpu")):  # noqa: B008
        self.count = 0
        self.mean, self.m2 = torch.zeros(2, channels, dtype=torch.float64, device=device)

    def update(self, tile: Tensor) -> None:
        """Merge a tile `(1, C, *n)`."""
        values = tile.movedim(1, -1).reshape(-1, tile.shape[1])
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        means, variances, counts = of_blocks(values)
        mean, m2 = merged(counts, means, variances * counts)
        delta, total = mean - self.mean, self.count + len(values)
        self.mean += delta * (len(values) / total)
        self.m2 += m2 + delta**2 * (self.count * len(values) / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel, shared within each of `groups` groups of channels."""
        return of_groups(self.mean, self.m2 / self.count, groups)


def of_groups(mean: Tensor, variance: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel `(..., C)`, shared within each of so many groups."""
    mean, variance = (t.unflatten(-1, (groups, -1)) for t in (mean, variance))
    shared = mean.mean(-1, keepdim=True)
    variance = (variance + (mean - shared) ** 2).mean(-1, keepdim=True)
    return shared.expand_as(mean).flatten(-2), variance.expand_as(mean).flatten(-2)


def merged(counts: Tensor, means: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squares round it, of parts that lie along the first axis."""
    mean = (means * counts).sum(0) / counts.sum(0)
    return mean, (m2 + (means - mean) ** 2 * counts).sum(0)


def of_blocks(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and counts of short blocks of `(n, C)`, whose sums may be float32.

    On the CPU block by block, while it is in the cache; on a GPU at once, without waiting for it.
    """
    if values.device.type == "cpu":
        blocks = values.split(BLOCK)
        pairs = [torch.batch_norm_update_stats(b, None, None, 0.0) for b in blocks]
        means, variances = (torch.stack(t).double() for t in zip(*pairs, strict=True))
        counts = torch.tensor([len(b) for b in blocks], dtype=torch.float64)[:, None]
        return means, variances, counts
    whole = len(values) // BLOCK * BLOCK
    parts = [values[:whole].unflatten(0, (-1, BLOCK)), values[None, whole:]]
    parts = [p for p in parts if p.numel()]
    found = [torch.var_mean(p, 1, correction=0) for p in parts]
    variances, means = (torch.cat(t).double() for t in zip(*found, strict=True))
    counts = torch.cat([means.new_full((len(p), 1), p.shape[1]) for p in parts])
    return means, variances, counts
