"""Terms of a loss over a volume that several ranks hold in slabs, exact over the whole volume.

Each rank takes its own part of a mean over the volume; the parts of all ranks add up to the term of
one process. What is taken of windows or of neighbors sees the rows of the next rank. A term that
has no entry in `PARTS` is refused by name.

Axes: b samples, c channels, then the spatial axes; slabs are cut along the first of these.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vae3d.losses.commitment import Commitment
from vae3d.losses.kl import KL
from vae3d.losses.reconstruction import (
    L1,
    L2,
    SSIM,
    Charbonnier,
    GradientDifference,
    LearnedVariance,
)
from vae3d.losses.term import Term, add_up
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import DiagonalGaussian
from vae3d.spatial.slabs import Layout


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


def check_loss(loss: VAELoss) -> None:
    """Refuse a loss with a part that is not taken over slabs.

    Raises:
        ValueError: It names the part.
    """
    found = [*loss.terms.values(), *loss.disturbances.values()]
    names = [type(term).__name__ for term in found if type(term) not in PARTS]
    if loss.adversarial is not None:
        names.append("the adversarial term")
    names += [f"KL.free_bits {t.free_bits}" for t in found if isinstance(t, KL) and t.free_bits]
    if names:
        raise ValueError(
            f"sharding spatial: the loss has {', '.join(names)}, which it does not know how to "
            f"take over slabs; known are {', '.join(cls.__name__ for cls in PARTS)}"
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
    size, rows = len(term.kernel), layout.slabs[-1][1]
    term.check((x.shape[1], rows, *x.shape[3:]))
    x, recon = (layout.following(t, size - 1) for t in (x, recon))
    windows = x.shape[2] - size + 1
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
    rows = layout.slabs[-1][1]
    a, b = (layout.following(t, 1) for t in (x, recon))
    edges = a.shape[2] - 1
    gaps = [term.gap(a, b, 2) * (edges / (rows - 1)) if edges else 0 * b.sum()]
    others = [axis for axis in range(3, x.ndim) if x.shape[axis] > 1]
    gaps += [term.gap(x, recon, axis) * layout.share for axis in others]
    return add_up(gaps) / len(gaps)


PARTS: dict[type[Term], Callable[..., Tensor]] = {
    L1: _of_voxels,
    L2: _of_voxels,
    Charbonnier: _of_voxels,
    LearnedVariance: _of_voxels,
    KL: _of_latents,
    Commitment: _of_latents,  # of codes alone, which `network.check` refuses
    SSIM: _of_windows,
    GradientDifference: _of_neighbors,
}
