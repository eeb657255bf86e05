"""First stage on samples that the ranks hold in slabs: `--sharding spatial`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vae3d.losses.term import Normal
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.spatial.losses import SlabTerms, SlabViews, check_loss
from vae3d.spatial.network import SlabVAE, check
from vae3d.spatial.slabs import Layout
from vae3d.spatial.volumes import SlabVolume
from vae3d.training.task import VAETask, weight_of


class SlabTask(VAETask):
    """Reconstruct volumes of which each rank has its own rows: the numbers of one process.

    Args:
        model: The VAE, the same on all ranks.
        loss: Named terms; those that are not taken over slabs are refused.
        seed: Seed of the posterior's noise.
        axis: The axis along which samples are cut.
        group: Ranks that share samples; None for all.

    Raises:
        ValueError: A layer of the network, or a term of the loss, is not known in slabs.
    """

    def __init__(
        self,
        model: CustomVAE,
        loss: VAELoss,
        seed: int = 0,
        axis: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        check(model)
        check_loss(loss, model.spatial_dims)
        super().__init__(model, loss, seed)
        self._views: SlabViews | None = None  # of the last forward
        self.axis, self.group = axis, group
        self.ranks_per_sample = dist.get_world_size(group)

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the terms of the loss on `batch.image`, this rank's slab of `batch.whole`."""
        layout = Layout(batch.whole, self.network.factor, self.axis, self.group)
        weight = weight_of(batch, lambda weight: SlabVolume.of(weight, layout).mean())
        game = self.loss.adversarial
        self._views = None if game is None else SlabViews(layout, game)
        normal = self.normal_of_slabs(self.normal(batch, step), layout)
        loss = partial(self.loss, take=SlabTerms(layout), views=self._views)
        return self.terms(SlabVAE(self.network, layout), loss, batch, step, normal, weight)

    def discriminator_loss(self, step: int, discriminator: nn.Module | None) -> dict[str, Tensor]:
        """Return the discriminator's terms on the last batch, whose slices the ranks share out."""
        assert self._last is not None, "the discriminator learns from the last forward"
        views = self._views
        x, recon, weight = self._last
        return self.loss.discriminator_loss(x, recon, step, discriminator, weight, views)

    def normal_of_slabs(self, normal: Normal, layout: Layout) -> Normal:
        """This rank's rows of the noise that one process draws of each whole sample."""
        dims, dim = self.network.spatial_dims, layout.axis - self.network.spatial_dims

        def draw(shape: Sequence[int], word: str) -> Tensor:
            if len(shape) < dims:  # of a sample, not of its voxels
                return normal(shape, word)
            rows = layout.rows(shape[dim])
            whole = [*shape]
            whole[dim] = rows[-1][1]
            lo, hi = rows[layout.rank]
            return normal(whole, word).narrow(dim, lo, hi - lo)

        return draw
