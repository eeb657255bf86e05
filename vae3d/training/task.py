"""What a trainer trains: a module whose forward turns a batch into named scalars.

The loop in `trainer.py` knows nothing else about a task, so both stages share it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loaders import Batch
from vae3d.losses.term import Decoding, Normal
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import Quantized
from vae3d.spatial.network import SlabVAE
from vae3d.training.distributed import World


class Task(nn.Module):
    """Contract between the trainer and what it trains.

    Attributes:
        network: The module whose weights are averaged (EMA), saved as `model` and given to users.
        unit: What its samples are called where the speed is told, as in `perf/patches_per_s`.
        ranks_per_sample: Ranks of which each holds a slab of the same samples.
    """

    network: nn.Module
    unit = "patches"
    ranks_per_sample = 1

    @property
    def discriminator(self) -> nn.Module | None:
        """A second network with its own optimizer, or None."""
        return None

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return named scalars, among them `loss`, each a mean over the samples of the batch.

        Randomness must depend on the sample (`batch.index`) and the step alone, see
        `noise_of_sample`; then micro-batches and ranks draw what one large batch draws.

        Args:
            batch: What the loader yields, on the device.
            step: Number of optimizer updates done before this one.
        """
        raise NotImplementedError

    def discriminator_active(self, step: int) -> bool:
        """Whether the discriminator learns at this step; the same on every rank."""
        return False

    def discriminator_loss(self, step: int, discriminator: nn.Module) -> dict[str, Tensor]:
        """Return named scalars, among them `discriminator_loss`, for the batch of the last forward.

        Args:
            step: Number of optimizer updates done before this one.
            discriminator: `self.discriminator`, wrapped for the ranks.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Update controllers, once per optimizer update and on every rank."""

    def extra_state(self) -> dict[str, Any]:
        """What a resume needs beside the network's weights."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` returned."""


class VAETask(Task):
    """First stage: reconstruct patches through the posterior of a VAE.

    Args:
        model: The VAE, see `vae3d.models.custom_vae`.
        loss: Named terms, see `vae3d.losses.vae_loss`.
        seed: Seed of the posterior's noise, and of the augmentation.
        augment: `augment(batch, seed, step)`, changes a batch on the device; None for nothing.
    """

    network: CustomVAE

    def __init__(
        self,
        model: CustomVAE,
        loss: VAELoss,
        seed: int = 0,
        augment: Callable[[Batch, int, int], Batch] | None = None,
    ):
        super().__init__()
        loss.check_head(model.head)
        self.network = model
        self.loss = loss
        self.seed, self.augment = seed, augment
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None  # x, recon and weight

    @property
    def discriminator(self) -> nn.Module | None:
        """The discriminator of the adversarial term, if there is one."""
        return self.loss.discriminator

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the terms of the loss on `batch.image` `(B, C, X, Y, Z)`, weighted by its mask."""
        if self.augment is not None:
            batch = self.augment(batch, self.seed, step)
        normal, weight = self.normal(batch, step), weight_of(batch)
        return self.terms(self.network, self.loss, batch, step, normal, weight)

    def terms(
        self,
        network: CustomVAE | SlabVAE,
        loss: Callable[..., dict[str, Tensor]],
        batch: Batch,
        step: int,
        normal: Normal,
        weight: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the terms of the loss on what a network makes of a batch.

        Args:
            network: The VAE, or what runs it on slabs.
            loss: The loss, or what takes it of slabs.
            batch: On the device.
            step: Number of optimizer updates done.
            normal: Source of everything random.
            weight: How much each voxel counts, 1 on average; None for all alike.
        """
        x = batch.image
        posterior = network.encode(x)
        network.head.observe(posterior, normal)
        z = posterior.mean
        if not isinstance(posterior, Quantized):
            z = z + posterior.std * normal(z.shape[1:], "")
        decoded = self.loss.disturbed(z, normal)
        recon = network.crop(network.decode(decoded), x)
        self._last = (x, recon.detach(), weight)
        return loss(
            x,
            recon,
            posterior,
            step,
            last_layer=network.last_layer,
            weight=weight,
            decoding=Decoding(z, decoded, network.decode),
        )

    def normal(self, batch: Batch, step: int) -> Normal:
        """Noise of the samples of a batch at a step."""

        def draw(shape: Sequence[int], word: str) -> Tensor:
            seed, device = f"{word} {self.seed}" if word else self.seed, batch.image.device
            draws = [noise_of_sample(shape, seed, step, int(i), device) for i in batch.index]
            return torch.stack(draws)

        return draw

    def discriminator_active(self, step: int) -> bool:
        """Whether the adversarial term has started."""
        return self.loss.discriminator_active(step)

    def discriminator_loss(self, step: int, discriminator: nn.Module | None) -> dict[str, Tensor]:
        """Return the discriminator's terms on the last batch and its detached reconstruction."""
        assert self._last is not None, "the discriminator learns from the last forward"
        x, recon, weight = self._last
        return self.loss.discriminator_loss(x, recon, step, discriminator, weight)

    def after_step(self) -> None:
        """Update the controllers of the loss, and a codebook."""
        self.loss.after_step()
        self.network.head.after_step()

    def extra_state(self) -> dict[str, Any]:
        """State of the loss: controllers, learned log-variance, discriminator."""
        return {"loss": self.loss.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the state of the loss.

        Raises:
            ValueError: If the loss has other terms than that of the checkpoint.
        """
        differs = self.loss.state_dict().keys() ^ state["loss"].keys()
        if differs:
            terms = ", ".join(sorted({name.partition(".")[0] for name in differs}))
            raise ValueError(
                f"the loss is not that of the checkpoint, it differs in: {terms}; keep its terms, "
                "or begin a new run from its weights by --init_from"
            )
        self.loss.load_state_dict(state["loss"])


def weight_of(batch: Batch, mean: Callable[[Tensor], Tensor] = torch.mean) -> Tensor | None:
    """How much each voxel of a batch counts, 1 on average over the update; None for all alike.

    The average is `batch.mean_weight`, where the trainer has found it, else that of the batch, as
    `mean` takes it. It is 0 where no voxel counts at all: then each weight is.
    """
    weight = getattr(batch, "weight", None)
    if weight is None:
        return None
    if batch.mean_weight is not None:
        return weight / (batch.mean_weight or 1.0)
    return weight / mean(weight).clamp_min(torch.finfo(weight.dtype).tiny)


def share_weights(window: list[Batch], world: World, ranks_per_sample: int = 1) -> list[Batch]:
    """Tell each micro-batch the mean weight of all samples of the update, on all ranks.

    With it a micro-batch's mean of `w e`, times its share of the samples, is its part of
    `sum(w e) / sum(w)` over all voxels of the update, also where volumes differ in size.

    Args:
        window: The micro-batches of this rank.
        world: All ranks.
        ranks_per_sample: Ranks of which each holds a slab of the same samples.
    """
    found = (getattr(batch, "weight", None) for batch in window)
    weights = [weight for weight in found if weight is not None]
    if not weights:
        return window
    sizes = [weight[0].numel() for weight in weights]
    if ranks_per_sample > 1:  # of the whole of each sample
        pairs = zip(window, weights, strict=True)
        sizes = [w.shape[1] * math.prod(batch.whole or w.shape[2:]) for batch, w in pairs]
    total = world.add(sum(weight.sum(dtype=torch.float64).item() for weight in weights))
    count = sum(map(len, weights)) * world.size / ranks_per_sample
    each = [total / count / size for size in sizes]
    return [replace(batch, mean_weight=mean) for batch, mean in zip(window, each, strict=True)]


def noise_of_sample(
    shape: Sequence[int], seed: int | str, step: int, index: int, device: torch.device
) -> Tensor:
    """Standard normal noise that depends on the sample and the step, not on who draws it.

    Args:
        shape: Shape of one sample, `(C, X, Y, Z)`.
        seed: Seed of the run, or words that tell this noise from others.
        step: Number of optimizer updates done.
        index: The sample's number in the epoch.
        device: Where to draw.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=4).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(shape, generator=generator, device=device)
