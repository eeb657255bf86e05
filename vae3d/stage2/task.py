"""What the trainer trains in the second stage, and how it is validated."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from vae3d.kernels.device import sent
from vae3d.stage2.control import Controls
from vae3d.stage2.diffusion import LatentDiffusion
from vae3d.stage2.latents import LatentStore
from vae3d.training.distributed import World
from vae3d.training.task import Task, noise_of_sample

VALIDATION_TIMES = 8  # fixed times at which each validation latent is measured
LAST_TIME = 1 - 2**-12  # times stay below 1 after rounding


class LatentTask(Task):
    """Second stage: denoise latents drawn from their posteriors.

    Args:
        model: UNet, projector and all that is saved with them.
        store: Training latents, the store that the loader reads.
        labels: Manifest column whose values are the classes; None for none.
        conditions: Latents to attend to, one for each of `store`, in its order; None for none.
        controls: What the ControlNet sees, in the same order; None for none.
        seed: Seed of posterior draws, noise, times and dropped conditions.
    """

    network: LatentDiffusion
    unit = "latents"

    def __init__(
        self,
        model: LatentDiffusion,
        store: LatentStore,
        labels: str | None = None,
        conditions: LatentStore | None = None,
        controls: Controls | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.network = model
        self.guide = Guide(model, store, labels, conditions, controls)
        self.seed = seed

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the loss on `batch.image` `(B, 2 C, *spatial)`, mean and logvar of latents."""
        model, (mean, logvar) = self.network, batch.image.chunk(2, 1)
        draws = [
            noise_of_sample((2 * mean[0].numel() + 2,), self.seed, step, int(index), mean.device)
            for index in batch.index
        ]
        posterior, noise, choices = torch.stack(draws).split(
            [mean[0].numel(), mean[0].numel(), 2], dim=1
        )
        z = mean + torch.exp(logvar / 2) * posterior.view_as(mean)
        time = model.time_of(choices[:, 0]).clamp(max=LAST_TIME)
        keep = torch.special.ndtr(choices[:, 1]) >= model.condition_dropout
        guidance = self.guide(batch.volume, mean.device)
        return {"loss": model.loss(z, noise.view_as(z), time, keep, **guidance)}


class Guidance(TypedDict):
    """What a prediction is guided by, see `LatentDiffusion.loss`; None where the model has none."""

    label: Tensor | None
    condition: Tensor | None
    control: Tensor | None


class Guide:
    """Label, condition and control of subjects, each its own.

    Args:
        model: Knows the classes.
        store: Latents whose subjects are asked for by number.
        labels: Manifest column; None for none. A subject without a value, or with one that no
            training subject has, is of unknown class.
        conditions: Latents of the same subjects in the same order; None for none.
        controls: What the ControlNet sees of them, in the same order; None for none.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        store: LatentStore,
        labels: str | None,
        conditions: LatentStore | None,
        controls: Controls | None = None,
    ):
        self.conditions, self.controls = conditions, controls
        self.numbers = None
        if labels is not None:
            names = [store.labels(i).get(labels) for i in range(len(store))]
            known = [name if name in model.classes else None for name in names]
            self.numbers = torch.tensor([model.class_index(name) for name in known])

    def __call__(self, volumes: Tensor, device: torch.device) -> Guidance:
        """What subjects, by number, are guided by."""
        return {
            "label": None if self.numbers is None else sent(self.numbers[volumes], device),
            "condition": self._conditions(volumes, device),
            "control": self._controls(volumes, device),
        }

    def _conditions(self, volumes: Tensor, device: torch.device) -> Tensor | None:
        """Posterior means `(B, C, *grid)` of the conditions."""
        if self.conditions is None:
            return None
        both = [self.conditions.read(int(i)) for i in volumes]
        means = [latent[: len(latent) // 2] for latent in both]
        if len({mean.shape for mean in means}) > 1:
            raise ValueError(
                "condition latents of one batch differ in size; use --batch_size 1 (and more "
                "--grad_accum)"
            )
        return sent(torch.from_numpy(np.stack(means)), device)

    def _controls(self, volumes: Tensor, device: torch.device) -> Tensor | None:
        """Controls `(B, K, *grid)` on the grids of the latents."""
        if self.controls is None:
            return None
        return sent(torch.stack([self.controls.read(int(i)) for i in volumes]), device)


class LatentValidation:
    """Loss on held-out latents at fixed times under fixed noise, so that two steps compare.

    Args:
        store: Validation latents.
        guide: Their labels, conditions and controls.
        world: The ranks; each takes every `world.size`-th latent, none is counted twice.
        max_latents: At most this many, spread evenly.
    """

    def __init__(self, store: LatentStore, guide: Guide, world: World, max_latents: int):
        self.store, self.guide, self.world = store, guide, world
        count = min(len(store), max_latents)
        self.chosen = [i * len(store) // count for i in range(count)]

    def __call__(self, network: LatentDiffusion, _step: int = 0) -> dict[str, float]:
        """Return val/loss, the same on every rank."""
        total = torch.zeros((), dtype=torch.float64)
        for index in self.chosen[self.world.rank :: self.world.size]:
            total += self.loss_of(network, index)
        total = sum(self.world.gather(total))
        return {"val/loss": float(total) / len(self.chosen)}

    def loss_of(self, network: LatentDiffusion, index: int) -> float:
        """Mean loss of one latent over `VALIDATION_TIMES` times."""
        both = torch.from_numpy(self.store.read(index)).to(self.world.device)
        mean, _ = both[None].chunk(2, 1)
        guidance = self.guide(torch.tensor([index]), mean.device)
        losses = []
        for n in range(VALIDATION_TIMES):
            noise = noise_of_sample(mean.shape, 0, n, index, mean.device)
            time = mean.new_full((1,), (n + 0.5) / VALIDATION_TIMES)
            losses.append(network.loss(mean, noise, time, None, **guidance))
        return float(torch.stack(losses).mean())
