"""Terms of a loss over a volume that several ranks hold in slabs, exact over the whole volume.

Each rank takes its own part of a mean over the volume; the parts of all ranks add up to the term of
one process. What is taken of windows or of neighbors sees the rows of the next rank. A term that
has no entry in `PARTS` is refused by name.

Axes: b samples, c channels, then the spatial axes; rows are those along the axis that is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, cycle, pairwise
from math import prod

import torch
from torch import Tensor

from vae3d.losses.adversarial import Adversarial, Judged
from vae3d.losses.commitment import Commitment
from vae3d.losses.kl import KL
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.reconstruction import (
    L1,
    L2,
    SSIM,
    Charbonnier,
    GradientDifference,
    LearnedVariance,
)
from vae3d.losses.slices import draw_slices
from vae3d.losses.term import Term, add_up
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import DiagonalGaussian
from vae3d.spatial.slabs import Layout, Rows


class SlabTerms:
    """Takes each term of a loss of a slab, as `VAELoss` asks for it.

    On average over the ranks a value is that of the volume, as under DDP it is that of the samples.

    Args:
        layout: Who holds which rows.
    """

    def __init__(self, layout: Layout):
        self.layout = layout

    def __call__(
        self, term: Term, x: Tensor, recon: Tensor, posterior: DiagonalGaussian, step: int
    ) -> Tensor:
        """Return this rank's part of a term, times the number of ranks."""
        part = PARTS[type(term)](self.layout, term, x, recon, posterior, step)
        return part * self.layout.size


class SlabViews:
    """Slices of whole volumes for a discriminator, as `Adversarial` draws them, on the ranks.

    Each rank judges its share of the slices, and its part of their mean is taken as `SlabTerms`
    takes one.

    Args:
        layout: Who holds which rows.
        game: Says how many slices, and where.
    """

    def __init__(self, layout: Layout, game: Adversarial):
        self.layout, self.game, self.voxels = layout, game, prod(layout.shape)

    def __call__(self, volume: Tensor, step: int) -> Judged:
        """Return this rank's slices of a volume of which it holds a slab, and how to average."""
        self.game.check((volume.shape[1], *self.layout.shape))
        share = Share(self.layout, self.game.num_slices, step, self.game.seed)
        return share.slices(volume), lambda values: share.part(values) * self.layout.size


class Share:
    """Which of the random slices of whole volumes are a rank's to look at.

    Args:
        layout: Who holds which rows.
        num_slices: See `draw_slices`, as `step` and `seed`.
        step: Number of optimizer updates done.
        seed: Of the draw.
    """

    def __init__(self, layout: Layout, num_slices: int, step: int, seed: int):
        self.layout = layout
        self.picks = [sorted(axis) for axis in draw_slices(layout.shape, num_slices, step, seed)]
        turns = cycle(range(layout.size))
        self.mine = [
            [n for n in range(len(axis)) if next(turns) == layout.rank] for axis in self.picks
        ]
        self.count, self.scale = num_slices, 1.0
        self.idle: list[Tensor] = []  # of others' slices: their gradients, too, go to who sent them
        if not any(self.mine):  # all ranks run the network; one without slices counts nothing
            first = next(axis for axis, indices in enumerate(self.picks) if indices)
            self.mine[first], self.scale = [0], 0.0

    def slices(self, volume: Tensor) -> list[Tensor]:
        """`take_slices` of the whole volume, but of this rank's alone."""
        found = []
        for axis, (indices, mine) in enumerate(zip(self.picks, self.mine, strict=True)):
            if indices:
                across = axis != self.layout.axis
                whole = self.across(volume, axis) if across else self.along(volume)
                if mine:
                    found.append(whole[mine].flatten(0, 1))
                else:
                    self.idle.append(whole.sum())
        return found

    def along(self, volume: Tensor) -> Tensor:
        """Slices `(n, B, C, ...)` at some rows; each lies on one rank, and all get it."""
        dim, indices = self.layout.dim, self.picks[self.layout.axis]
        held = [[i - lo for i in indices if lo <= i < hi] for lo, hi in self.layout.slabs]
        owned = list(pairwise([0, *accumulate(map(len, held))]))
        mine = torch.tensor(held[self.layout.rank], dtype=torch.long, device=volume.device)
        return self.everywhere(volume.index_select(dim, mine), owned).movedim(dim, 0)

    def across(self, volume: Tensor, axis: int) -> Tensor:
        """Slices `(n, B, C, ...)` of which each rank has its rows; all get them."""
        cut = torch.cat([volume.narrow(2 + axis, i, 1) for i in self.picks[axis]])
        whole = self.everywhere(cut, self.layout.slabs).squeeze(2 + axis)
        return whole.unflatten(0, (-1, len(volume)))

    def everywhere(self, own: Tensor, owned: list[Rows]) -> Tensor:
        """Every rank's rows, on every rank."""
        return self.layout.extended(own, [(0, owned[-1][1])] * self.layout.size, owned)

    def part(self, values: list[Tensor]) -> Tensor:
        """This rank's part of the mean over all slices, from one value for each of its axes."""
        counts = [len(mine) for mine in self.mine if mine]
        pairs = zip(counts, values, strict=True)
        idle = [0 * value for value in self.idle]
        return add_up([*(n * value for n, value in pairs), *idle]) * (self.scale / self.count)


def check_loss(loss: VAELoss, dims: int = 3) -> None:
    """Refuse a loss with a part that is not taken over slabs.

    Args:
        loss: All terms.
        dims: Axes of the volumes.

    Raises:
        ValueError: It names the part.
    """
    found = [*loss.terms.values(), *loss.disturbances.values()]
    names = [type(term).__name__ for term in found if type(term) not in PARTS]
    if loss.adversarial is not None and loss.adversarial.spatial_dims == dims:
        names.append(f"Adversarial.spatial_dims {dims}")
    if any(isinstance(t, Perceptual) and t.network.spatial_dims == dims for t in found):
        names.append(f"Perceptual with a network of {dims}D")
    names += [f"KL.free_bits {t.free_bits}" for t in found if isinstance(t, KL) and t.free_bits]
    if names:
        raise ValueError(
            f"sharding spatial: the loss has {', '.join(names)}, which it does not know how to "
            f"take over slabs; known are {', '.join(cls.__name__ for cls in PARTS)}, and "
            "Adversarial and Perceptual on slices of volumes"
        )


def _of_voxels(
    layout: Layout, term: Term, x: Tensor, recon: Tensor, posterior: DiagonalGaussian, step: int
) -> Tensor:
    return term(x, recon, posterior, step) * layout.share


def _of_latents(
    layout: Layout, term: Term, x: Tensor, recon: Tensor, posterior: DiagonalGaussian, step: int
) -> Tensor:
    return term(x, recon, posterior, step) * (layout.cells[layout.rank] / sum(layout.cells))


def _of_windows(
    layout: Layout, term: SSIM, x: Tensor, recon: Tensor, posterior: object, step: int
) -> Tensor:
    """A window belongs to the rank of its first row."""
    size, rows = len(term.kernel), layout.shape[layout.axis]
    term.check((x.shape[1], *layout.shape))
    x, recon = (layout.following(t, size - 1) for t in (x, recon))
    windows = x.shape[layout.dim] - size + 1
    if windows < 1:  # the ranks before see these rows
        return 0 * recon.sum()
    return term(x, recon) * (windows / (rows - size + 1))


def _of_neighbors(
    layout: Layout,
    term: GradientDifference,
    x: Tensor,
    recon: Tensor,
    posterior: object,
    step: int,
) -> Tensor:
    """An edge belongs to the rank of its first row."""
    rows, dim = layout.shape[layout.axis], layout.dim
    a, b = (layout.following(t, 1) for t in (x, recon))
    edges = a.shape[dim] - 1
    gaps = [term.gap(a, b, dim) * (edges / (rows - 1)) if edges else 0 * b.sum()]
    others = [axis for axis in range(2, x.ndim) if axis != dim and x.shape[axis] > 1]
    gaps += [term.gap(x, recon, axis) * layout.share for axis in others]
    return add_up(gaps) / len(gaps)


def _of_slices(
    layout: Layout, term: Perceptual, x: Tensor, recon: Tensor, posterior: object, step: int
) -> Tensor:
    """The ranks share the slices out."""
    share = Share(layout, term.num_slices, step, term.seed)
    pairs = zip(share.slices(x), share.slices(recon), strict=True)
    return share.part([term.distance(a, b) for a, b in pairs])


PARTS: dict[type[Term], Callable[..., Tensor]] = {
    L1: _of_voxels,
    L2: _of_voxels,
    Charbonnier: _of_voxels,
    LearnedVariance: _of_voxels,
    KL: _of_latents,
    Commitment: _of_latents,  # of codes alone, which `network.check` refuses
    SSIM: _of_windows,
    GradientDifference: _of_neighbors,
    Perceptual: _of_slices,
}
