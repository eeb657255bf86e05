"""The loss of a VAE: named terms, each a class with its weight, and their weighted total.

    loss = VAELoss(recon=L1, kl=partial(KL, weight=1e-4), adversarial=Adversarial)

What a trainer does with it, for each micro-batch of a step:

    recon, posterior = vae(x)
    terms = loss(x, recon, posterior, step, last_layer=vae.last_layer)
    terms["loss"].backward()                       # the generator: vae and loss.generator_parameters()
    if loss.discriminator_active(step):
        terms |= loss.discriminator_loss(x, recon, step)
        terms["discriminator_loss"].backward()     # loss.discriminator.parameters()

and once after the optimizer updates of a step, on every rank, also when the update was skipped:

    loss.after_step()

`terms` is a dict of scalar tensors: the unweighted terms `recon`, `kl`, `perceptual`, `adversarial`
and those of `extra`, the weighted total `loss`, and detached measurements for the log. All but the
two totals may be logged as they are; none is a float, so nothing waits for the device.

Contracts that make accumulation and DDP exact:
- Every term is a mean over samples, so gradients of micro-batches weighted by their share of the
  samples add up to those of the large batch.
- Whatever is random (slices) or controlled (KL weight, adaptive weight) is a function of `step` or
  of a buffer that changes only in `after_step`, which reduces over ranks.
- `state_dict()` holds all of it: buffers of controllers, discriminator, learned log-variance; not
  the frozen feature networks, which come from their own files.

DDP: wrap the module whose forward runs model and loss together after
`loss.discriminator.requires_grad_(False)` (DDP leaves out frozen parameters), then
`requires_grad_(True)` and wrap `loss.discriminator` by itself; pass the wrapper as
`loss.discriminator_loss(x, recon, step, wrapped)`. Each wrapped module has one forward a micro-step
and all its parameters used. The generator's pass reads detached copies of the discriminator's
parameters, so it leaves no gradient there, frozen or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae3d.losses.kl import KL
from vae3d.losses.reconstruction import L1
from vae3d.losses.term import Term


class VAELoss(nn.Module):
    """Weighted sum of named terms.

    Args:
        recon: Distance of the reconstruction from the input.
        kl: How far the posterior may go from N(0, 1).
        perceptual: Distance in the features of a frozen network.
        adversarial: A discriminator that learns to tell reconstructions from inputs.
        extra: Further terms, logged under their own names.
    """

    def __init__(
        self,
        recon: Callable[[], Term] = L1,
        kl: Callable[[], Term] = KL,
        perceptual: Callable[[], Term] | None = None,
        adversarial: Callable[[], Term] | None = None,
        extra: list[Callable[[], Term]] | None = None,
    ):
        super().__init__()
        self.terms = nn.ModuleDict({"recon": recon(), "kl": kl()})
        if perceptual is not None:
            self.terms["perceptual"] = perceptual()
        for make in extra or []:
            term = make()
            if term.name in self.terms:
                raise ValueError(f"loss.extra: two terms are called {term.name!r}; keep one")
            self.terms[term.name] = term

    def forward(
        self, x: Tensor, recon: Tensor, posterior, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the named terms and their weighted total `loss`, for the generator's update.

        Args:
            x: The input, `(B, C, X, Y, Z)` or `(B, C, X, Y)`.
            recon: Its reconstruction, same shape, not clamped.
            posterior: Posterior of the latents with `mean` and `logvar`.
            step: Number of optimizer updates done before this one.
            last_layer: Weight of the model's last layer, for an adaptive adversarial weight.
        """
        x, recon = x.float(), recon.float()
        values, total = {}, 0.0
        for name, term in self.terms.items():
            with torch.autocast(
                x.device.type, enabled=term.autocast and torch.is_autocast_enabled()
            ):
                values[name] = term(x, recon, posterior, step)
            total = total + term.weight_at(step) * values[name]
        return values | {"loss": total}

    @property
    def discriminator(self) -> nn.Module | None:
        """The discriminator with its own loss, or None; it has its own optimizer."""
        return None

    def discriminator_active(self, step: int) -> bool:
        """Tell whether the discriminator learns at this step; the same on every rank."""
        return False

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return the loss's own parameters that the generator's optimizer updates."""
        return list(self.terms.parameters())

    def after_step(self) -> None:
        """Update controllers, once per optimizer update and on every rank."""
        for term in self.terms.values():
            term.after_step()
