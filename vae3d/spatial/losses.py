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
from typing import NamedTuple

import torch
from torch import Tensor

from vae3d.losses.adversarial import Adversarial, Judged
from vae3d.losses.commitment import Commitment
from vae3d.losses.kl import KL
from vae3d.losses.latents import NoiseRobust, StructuredChannels
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
from vae3d.losses.term import Disturbance, Term, add_up
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import DiagonalGaussian as Posterior
from vae3d.spatial.slabs import Layout, Rows
from vae3d.spatial.volumes import SlabVolume, check


class Seen(NamedTuple):
    """What a term is taken of, as far as this rank has it.

    Attributes:
        x: Its slab of the volumes.
        recon: Of their reconstructions.
        posterior: Of their latents.
        step: Number of optimizer updates done.
        weight: Of the voxels' weights; empty for none.
    """

    x: Tensor
    recon: Tensor
    posterior: Posterior
    step: int
    weight: tuple[Tensor, ...]

    def term(self, term: Term) -> Tensor:
        """The term of this rank's slab as if it were all."""
        return term(self.x, self.recon, self.posterior, self.step, *self.weight)

    def volumes(self) -> list[Tensor]:
        """Slabs of voxels: volumes, reconstructions, and weights where there are any."""
        return [self.x, self.recon, *self.weight]


class SlabTerms:
    """Takes each term of a loss of a slab, as `VAELoss` asks for it.

    On average over the ranks a value is that of the volume, as under DDP it is that of the samples.

    Args:
        layout: Who holds which rows.
    """

    def __init__(self, layout: Layout):
        self.layout = layout

    def __call__(
        self,
        term: Term,
        x: Tensor,
        recon: Tensor,
        posterior: Posterior,
        step: int,
        *weight: Tensor,
    ) -> Tensor:
        """Return this rank's part of a term, times the number of ranks."""
        seen = Seen(x, recon, posterior, step, weight)
        return PARTS[type(term)](self.layout, term, seen) * self.layout.size


class SlabViews:
    """What a discriminator judges of volumes, as `Adversarial` shows it, on the ranks.

    A volume is judged whole, each rank its slab of it. Of slices each rank judges its share, and
    its part of their mean is taken as `SlabTerms` takes one.

    Args:
        layout: Who holds which rows.
        game: Says how many slices, and where.
    """

    def __init__(self, layout: Layout, game: Adversarial):
        self.layout, self.game, self.voxels = layout, game, prod(layout.shape)

    def __call__(self, volume: Tensor, step: int) -> Judged:
        """Return what to judge of a volume of which this rank holds a slab, and how to average."""
        whole = SlabVolume.of(volume, self.layout)
        self.game.check(whole.shape[1:])
        if self.game.spatial_dims == volume.ndim - 2:
            return [whole], lambda values: values[0]
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
    found = [term for _, term in loss.terms.items()]
    names = [type(term).__name__ for term in found if type(term) not in PARTS]
    changes = loss.disturbances.values()
    names += [type(term).__name__ for term in changes if type(term) not in OF_EACH_VOXEL]
    known = (*PARTS, *OF_EACH_VOXEL)
    if names:
        raise ValueError(
            f"sharding spatial: the loss has {', '.join(names)}, which it does not know how to "
            f"take over slabs; known are Adversarial, {', '.join(cls.__name__ for cls in known)}"
        )
    game = loss.adversarial
    if game is not None and game.spatial_dims == dims:
        check(game.critic.net, game.in_channels, dims)
    for term in found:
        if isinstance(term, Perceptual) and term.network.spatial_dims == dims:
            check(term.network, 1, dims)


def _of_voxels(layout: Layout, term: Term, seen: Seen) -> Tensor:
    return seen.term(term) * layout.share


def _of_latents(layout: Layout, term: Term, seen: Seen) -> Tensor:
    return seen._replace(weight=()).term(term) * layout.share_of_latent


def _of_channels(layout: Layout, term: KL, seen: Seen) -> Tensor:
    """Where channels have free bits, each has them of the whole volume."""
    value = _of_latents(layout, term, seen)
    if not term.free_bits:
        return value
    share = layout.share_of_latent
    term.scalars["nats"] = term.scalars["nats"] * (share * layout.size)
    return term.beyond_free(layout.sum(term.of_channels(seen.posterior) * share)) / layout.size


def _of_windows(layout: Layout, term: SSIM, seen: Seen) -> Tensor:
    """A window belongs to the rank of its first row."""
    size, rows = len(term.kernel), layout.shape[layout.axis]
    term.check((seen.x.shape[1], *layout.shape))
    x, recon, *weight = (layout.following(t, size - 1) for t in seen.volumes())
    windows = x.shape[layout.dim] - size + 1
    if windows < 1:  # the ranks before see these rows
        return 0 * recon.sum()
    seen = seen._replace(x=x, recon=recon, weight=tuple(weight))
    return seen.term(term) * (windows / (rows - size + 1))


def _of_neighbors(layout: Layout, term: GradientDifference, seen: Seen) -> Tensor:
    """An edge belongs to the rank of its first row."""
    rows, dim = layout.shape[layout.axis], layout.dim
    a, b, *weight = (layout.following(t, 1) for t in seen.volumes())
    edges = a.shape[dim] - 1
    gaps = [term.gap(a, b, dim, *weight) * (edges / (rows - 1)) if edges else 0 * b.sum()]
    others = [axis for axis in range(2, a.ndim) if axis != dim and a.shape[axis] > 1]
    gaps += [term.gap(seen.x, seen.recon, axis, *seen.weight) * layout.share for axis in others]
    return add_up(gaps) / len(gaps)


def _of_features(layout: Layout, term: Perceptual, seen: Seen) -> Tensor:
    """Of volumes all ranks take the whole distance together; slices they share out."""
    slabs = [t.expand_as(seen.x) for t in seen.volumes()]
    if term.network.spatial_dims == seen.x.ndim - 2:
        return term.distance(*(SlabVolume.of(t, layout) for t in slabs)) / layout.size
    share = Share(layout, term.num_slices, seen.step, term.seed)
    return share.part([term.distance(*cut) for cut in zip(*map(share.slices, slabs), strict=True)])


# What is decoded in the place of a latent, by its voxels one by one.
OF_EACH_VOXEL: tuple[type[Disturbance], ...] = (NoiseRobust, StructuredChannels)
PARTS: dict[type[Term], Callable[..., Tensor]] = {
    L1: _of_voxels,
    L2: _of_voxels,
    Charbonnier: _of_voxels,
    LearnedVariance: _of_voxels,
    KL: _of_channels,
    Commitment: _of_latents,
    SSIM: _of_windows,
    GradientDifference: _of_neighbors,
    Perceptual: _of_features,
}
