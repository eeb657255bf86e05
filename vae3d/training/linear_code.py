"""The linear code of a VAE before its first step: principal components of what training sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from vae3d.inference.baselines import BlockPCA, drawn
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import vectors
from vae3d.training.distributed import World

PATCHES = 512  # patches, or volumes, that are read
BLOCKS = 1024  # of each
KEPT = 2**25  # values of blocks that are looked at again


def fit_linear_code(vae: CustomVAE, patches: Iterable[Tensor], world: World | None = None) -> None:
    """Begin the linear code of a network as the block PCA of patches, whitened for most posteriors.

    At most 512 patches are read and 1024 blocks taken of each, so that the cost does not grow with
    the data set; sums are in float64. With several ranks the main one reads, and all get the same.
    Where latents are codes, the codebook then begins at what the linear code gives of these blocks
    and the reconstruction at the least squares of its values.

    Args:
        vae: A network with `linear_code`.
        patches: `(C, *spatial)` each, normalized as in training.
        world: The ranks; None for one.

    Example:
        >>> fit_linear_code(vae, (batch.image[0] for batch in loader))  # doctest: +SKIP
    """
    world = world or World()
    assert vae.linear_code is not None, "a network without linear_code"
    parts, fitted = (vae.linear_code, vae.head), list[dict[str, Tensor]]()
    if world.is_main:
        generator = torch.Generator().manual_seed(0)
        few, kept = islice(patches, PATCHES), list[Tensor]()
        blocks: Iterator[Tensor] = (drawn(x, vae.factor, BLOCKS, generator) for x in few)
        if vae.head.num_codes:
            blocks = keeping(blocks, kept)
        pca = BlockPCA.of_blocks(blocks, vae.factor, vae.latent_channels)
        wanted = vae.head.linear_std
        std = pca.std / wanted if wanted else pca.std[:1].expand_as(pca.std)
        vae.linear_code.begin(pca.mean, pca.components, std)
        if kept:
            begin_codes(vae, torch.cat(kept))
        fitted = [{k: v.cpu() for k, v in part.state_dict().items()} for part in parts]
    for part, state in zip(parts, world.broadcast(fitted), strict=True):
        part.load_state_dict(state)


def keeping(drawn: Iterator[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    """Pass blocks `(n, values)` of each patch on, and keep some of them."""
    for blocks in drawn:
        kept.append(blocks[: KEPT // (PATCHES * blocks.shape[1])].clone())  # not the rest too
        yield blocks


@torch.no_grad()
def begin_codes(vae: CustomVAE, blocks: Tensor) -> None:
    """Begin a codebook and its reconstruction at what the linear code gives of blocks.

    Args:
        vae: A network whose linear code has begun.
        blocks: `(n, C * prod(factor))`.
    """
    assert vae.linear_code is not None
    blocks = blocks.view(-1, vae.in_channels, *vae.factor)
    latents = vae.linear_code.encode(blocks.to(vae.last_layer))
    vae.head.begin(vectors(latents))
    vae.linear_code.fit_synthesis(vectors(vae.head(latents).mean), blocks.to(latents))
