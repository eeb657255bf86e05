"""What a trainer trains: a module whose forward turns a batch into named scalars.

The loop in `trainer.py` knows nothing else about a task, so both stages share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE


class Task(nn.Module):
    """Contract between the trainer and what it trains.

    Attributes:
        network: The module whose weights are averaged (EMA), saved as `model` and given to users.
    """

    network: nn.Module

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
        seed: Seed of the posterior's noise.
    """

    network: CustomVAE

    def __init__(self, model: CustomVAE, loss: VAELoss, seed: int = 0):
        super().__init__()
        self.network = model
        self.loss = loss
        self.seed = seed
        self._pair: tuple[Tensor, ...] = ()  # the last batch and its reconstruction

    @property
    def discriminator(self) -> nn.Module | None:
        """The discriminator of the adversarial term, if there is one."""
        return self.loss.discriminator

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the terms of the loss on `batch.image` `(B, C, X, Y, Z)`."""
        x = batch.image
        posterior = self.network.encode(x)
        noise = torch.stack(
            [
                noise_of_sample(mean.shape, self.seed, step, int(index), mean.device)
                for mean, index in zip(posterior.mean, batch.index, strict=True)
            ]
        )
        recon = self.network.decode(posterior.mean + posterior.std * noise)
        recon = self.network.crop(recon, x)
        self._pair = (x, recon.detach())
        return self.loss(x, recon, posterior, step, last_layer=self.network.last_layer)

    def discriminator_active(self, step: int) -> bool:
        """Whether the adversarial term has started."""
        return self.loss.discriminator_active(step)

    def discriminator_loss(self, step: int, discriminator: nn.Module | None) -> dict[str, Tensor]:
        """Return the discriminator's terms on the last batch and its detached reconstruction."""
        x, recon = self._pair
        return self.loss.discriminator_loss(x, recon, step, discriminator)

    def after_step(self) -> None:
        """Update the controllers of the loss."""
        self.loss.after_step()

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


def noise_of_sample(
    shape: Sequence[int], seed: int, step: int, index: int, device: torch.device
) -> Tensor:
    """Standard normal noise that depends on the sample and the step, not on who draws it.

    Args:
        shape: Shape of one sample, `(C, X, Y, Z)`.
        seed: Seed of the run.
        step: Number of optimizer updates done.
        index: The sample's number in the epoch.
        device: Where to draw.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=4).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(shape, generator=generator, device=device)
