"""First stage on samples that the ranks hold in slabs: `--sharding spatial`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.spatial.losses import SlabTerms, SlabViews, check_loss
from vae3d.spatial.network import SlabVAE, check
from vae3d.spatial.slabs import Layout
from vae3d.training.task import VAETask, noise_of_sample


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
        x = batch.image
        layout = Layout(batch.whole, self.network.factor, self.axis, self.group)
        halves = SlabVAE(self.network, layout)
        posterior = halves.encode(x)
        noise = self.noise(batch.index, step, posterior.mean, layout)
        recon = halves.crop(halves.decode(posterior.mean + posterior.std * noise), x)
        self._last = (x, recon.detach(), None)
        game = self.loss.adversarial
        self._views = None if game is None else SlabViews(layout, game)
        return self.loss(
            x,
            recon,
            posterior,
            step,
            last_layer=self.network.last_layer,
            take=SlabTerms(layout),
            views=self._views,
        )

    def discriminator_loss(self, step: int, discriminator: nn.Module | None) -> dict[str, Tensor]:
        """Return the discriminator's terms on the last batch, whose slices the ranks share out."""
        assert self._last is not None, "the discriminator learns from the last forward"
        x, recon, _ = self._last
        return self.loss.discriminator_loss(x, recon, step, discriminator, views=self._views)

    def noise(self, index: Tensor, step: int, like: Tensor, layout: Layout) -> Tensor:
        """This rank's rows of the noise that one process draws of each whole sample."""
        rows = layout.owned(like)
        _, *shape = layout.resized(like.shape, rows[-1][1])
        draws = [noise_of_sample(shape, self.seed, step, int(i), like.device) for i in index]
        return layout.part(torch.stack(draws), *rows[layout.rank])
