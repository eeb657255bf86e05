"""The linear code of a VAE before its first step: principal components of what training sees."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from torch import Tensor

from vae3d.inference.baselines import BlockPCA
from vae3d.models.custom_vae import CustomVAE
from vae3d.training.distributed import World

PATCHES = 512  # patches, or volumes, that are read
BLOCKS = 1024  # of each


def fit_linear_code(vae: CustomVAE, patches: Iterable[Tensor], world: World | None = None) -> None:
    """Begin the linear code of a network as the whitened block PCA of patches.

    At most 512 patches are read and 1024 blocks taken of each, so that the cost does not grow with
    the data set; sums are in float64. With several ranks the main one reads, and all get the same.

    Args:
        vae: A network with `linear_code`.
        patches: `(C, *spatial)` each, normalized as in training.
        world: The ranks; None for one.

    Example:
        >>> fit_linear_code(vae, (batch.image[0] for batch in loader))  # doctest: +SKIP
    """
    world = world or World()
    assert vae.linear_code is not None, "a network without linear_code"
    fitted: tuple[Tensor, Tensor, Tensor] | None = None
    if world.is_main:
        pca = BlockPCA.fit(islice(patches, PATCHES), vae.factor, vae.latent_channels, BLOCKS)
        fitted = pca.mean, pca.components, pca.std
    vae.linear_code.begin(*world.broadcast(fitted))
