"""The loss of a VAE: named terms, each a class with its weight, and their weighted total.

    loss = VAELoss(recon=L1, kl=partial(KL, weight=1e-4), adversarial=Adversarial)

What a trainer does with it, for each micro-batch of a step:

    posterior = vae.encode(x)
    z = posterior.sample()
    decoded = loss.disturbed(z, normal)       # z itself, unless a term of `extra` changes it
    recon = vae.crop(vae.decode(decoded), x)
    decoding = Decoding(z, decoded, vae.decode)
    terms = loss(x, recon, posterior, step, last_layer=vae.last_layer, decoding=decoding)
    terms["loss"].backward()                  # for vae and loss.generator_parameters()
    if loss.discriminator_active(step):
        terms |= loss.discriminator_loss(x, recon, step)
        terms["discriminator_loss"].backward()  # for loss.discriminator.parameters()

and once after the optimizer updates of a step, on every rank, also when the update was skipped:

    loss.after_step()

`terms` is a dict of scalar tensors: the unweighted terms `recon`, `kl`, `perceptual`, `adversarial`
and those of `extra`, the weighted total `loss`, the discriminator's own `discriminator_loss`, and
measurements such as `kl_std`. All but the two losses are detached, and none is a float, so nothing
waits for the device. Latents that are codes have no `kl` but `perplexity` and `usage` of the
codebook, and `commitment` where it is learned.

Contracts that make accumulation and DDP exact:
- Every term is a mean over samples, so gradients of micro-batches weighted by their share of the
  samples add up to those of the large batch.
- Whatever is random (slices, scales) or controlled (KL weight, adaptive weight) is a function of
  `step` or of a buffer that changes only in `after_step`, which reduces over ranks; how the latent
  is disturbed is a function of sample and `step`.
- A mask's `weight` has the mean 1 over all samples of an update (the trainer sees to it). Where it
  is 0, input and reconstruction are 0 in every term and for the discriminator: what lies there
  changes no loss and no gradient. Weights other than 0 mean nothing to the discriminator, and the
  KL knows none at all.
- `state_dict()` holds all of it: buffers of controllers, discriminator, learned log-variance; not
  the frozen feature networks, which come from their own files.

DDP: the module whose forward runs model and loss together is wrapped while
`loss.discriminator.requires_grad_(False)` (DDP leaves out frozen parameters); then
`requires_grad_(True)`, and `loss.discriminator` is wrapped by itself and passed as
`loss.discriminator_loss(x, recon, step, wrapped)`. Each wrapped module has one forward a micro-step
and all its parameters used. The generator's pass reads detached copies of the discriminator's
parameters, so it leaves no gradient there, frozen or not.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae3d.losses import latents as latents  # a recipe names its terms without their module
from vae3d.losses.adversarial import Adversarial, Critic, Views
from vae3d.losses.commitment import Commitment
from vae3d.losses.kl import KL
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.reconstruction import L1
from vae3d.losses.term import Decoding, Disturbance, Normal, Term, add_up, in_float32
from vae3d.models.norm import wide
from vae3d.models.posterior import DiagonalGaussian, PosteriorHead, Quantized


class Terms(nn.ModuleDict):
    """Terms by name."""

    if TYPE_CHECKING:  # what ModuleDict knows as modules

        def __getitem__(self, key: str) -> Term: ...
        def items(self) -> ItemsView[str, Term]:
            """Names and terms."""


class VAELoss(nn.Module):
    """Weighted sum of named terms.

    Args:
        recon: Distance of the reconstruction from the input.
        kl: How far the posterior may go from N(0, 1); codes are trained without it.
        perceptual: Distance in the features of a frozen network.
        adversarial: A discriminator that learns to tell reconstructions from inputs.
        extra: Further terms, each logged under its class's name in snake case, and what changes the
            latent before it is decoded in training.
        commitment: How far the encoder may go from its codes; for latents of `VQ` alone.
    """

    def __init__(
        self,
        recon: Callable[[], Term] = L1,
        kl: Callable[[], KL] = KL,
        perceptual: Callable[[], Perceptual] | None = None,
        adversarial: Callable[[], Adversarial] | None = None,
        extra: list[Callable[[], Term]] | None = None,
        commitment: Callable[[], Commitment] = Commitment,
    ):
        super().__init__()
        self.terms = Terms({"recon": recon(), "kl": kl(), "commitment": commitment()})
        if isinstance(self.terms["recon"], Disturbance):
            name = type(self.terms["recon"]).__name__
            raise ValueError(f"loss.recon: {name} compares nothing; it belongs into loss.extra")
        if perceptual is not None:
            self.terms["perceptual"] = perceptual()
        self.disturbances: dict[str, Disturbance] = {}  # no modules: they hold no tensors
        for make in extra or []:
            term = make()
            taken = (*self.terms, *self.disturbances, "perceptual", "adversarial", "loss")
            if term.name in taken:
                raise ValueError(
                    f"loss.extra: {term.name!r} is taken; keep one or rename the class"
                )
            if isinstance(term, Disturbance):
                self.disturbances[term.name] = term
            else:
                self.terms[term.name] = term
        self.adversarial = adversarial() if adversarial is not None else None

    def forward(
        self,
        x: Tensor,
        recon: Tensor,
        posterior: DiagonalGaussian,
        step: int,
        last_layer: Tensor | None = None,
        weight: Tensor | None = None,
        decoding: Decoding | None = None,
        take: Callable[..., Tensor] = lambda term, *args, **options: term(*args, **options),
        views: Views | None = None,
    ) -> dict[str, Tensor]:
        """Return the named terms and their weighted total `loss`, for the generator's update.

        Args:
            x: The input, `(B, C, X, Y, Z)` or `(B, C, X, Y)`.
            recon: Its reconstruction, same shape, not clamped.
            posterior: Posterior of the latents with `mean` and `logvar`.
            step: Number of optimizer updates done before this one.
            last_layer: Weight of the model's last layer, for an adaptive adversarial weight.
            weight: How much each voxel counts, `(B, 1 or C, X, Y, Z)`, 1 on average over all
                samples of the update; None for all alike.
            decoding: How `recon` came about, for terms that ask for it; None where none does.
            take: Takes a term of what it is called with, where that is a part of each sample alone.
            views: What the discriminator judges, in that case.
        """
        assert x.shape == recon.shape, f"{tuple(x.shape)} reconstructed as {tuple(recon.shape)}"
        x, recon = hidden(wide(x), weight), hidden(wide(recon), weight)
        mask = () if weight is None else (wide(weight),)
        values: dict[str, Tensor] = {}
        weights: dict[str, float | Tensor] = {}
        measured: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if not term.concerns(posterior):
                continue
            if mask and not term.weighted:
                raise ValueError(
                    f"loss: {type(term).__name__} does not know what a mask is: leave out the term "
                    "or data.mask, or give its forward a `weight` and set `weighted`"
                )
            if term.decodes:
                assert decoding is not None, f"{type(term).__name__} needs decoding=Decoding(...)"
            more = {"decoding": decoding} if term.decodes else {}
            with in_float32(x.device.type, unless=term.autocast):
                values[name] = take(term, x, recon, posterior, step, *mask, **more)
            weights[name] = term.weight_at(step)
            measured |= {f"{name}_{key}": value for key, value in term.scalars.items()}
        if "perceptual" in values:
            # Under a learned variance both distances are of one likelihood, as in latent diffusion.
            weights["perceptual"] = weights["perceptual"] * self.terms["recon"].precision
        if self.adversarial is not None:
            own = ("kl", "commitment")
            others = add_up(weights[name] * values[name] for name in values if name not in own)
            game = self.adversarial(x, recon, step, views)
            values |= game
            weights |= self.adversarial.weights()
            measured["adversarial_weight"] = recon.new_zeros(()) + weights["adversarial"]
            if self._measures(self.adversarial, step):
                assert last_layer is not None, "an adaptive weight needs last_layer=vae.last_layer"
                self.adversarial.measure(others, game["adversarial"], last_layer, recon, views)
        if isinstance(posterior, Quantized):
            measured["perplexity"], measured["usage"] = posterior.use()
        total = add_up(weights[name] * values[name] for name in values)
        # Detached: a trainer that adds them up over an epoch keeps no graph alive.
        return {name: value.detach() for name, value in values.items()} | measured | {"loss": total}

    def disturbed(self, z: Tensor, normal: Normal) -> Tensor:
        """Return the latent to decode instead of the drawn one; the same one outside training.

        Args:
            z: `(B, c, x, y, z)`.
            normal: Source of everything random, a function of sample and step, see `term.py`.
        """

        def own(name: str) -> Normal:
            return lambda shape, word: normal(shape, f"{name} {word}")

        for name, term in self.disturbances.items() if self.training else ():
            z = term.disturb(z, own(name))
        return z

    def check(self, shape: Sequence[int], latent: Sequence[int] | None = None) -> None:
        """Refuse what a term cannot be taken of, before any is read.

        Args:
            shape: `(C, *spatial)` of a sample.
            latent: The same of its latent, where it is known.
        """
        terms = [term for _, term in self.terms.items()]
        for term in (*terms, *self.disturbances.values()):
            term.check(shape)
            if latent is not None:
                term.check_latent(shape, latent)
        if self.adversarial is not None:
            self.adversarial.check(shape)

    def check_head(self, head: PosteriorHead) -> None:
        """Refuse what a term asks of latents that the head does not make.

        Args:
            head: Of the network that is trained.
        """
        kl = self.terms["kl"]
        if head.num_codes and isinstance(kl, KL) and kl.target_std is not None:
            raise ValueError(
                f"loss.kl.target_std steers the spread of a Gaussian, and {type(head).__name__} has"
                " codes: leave it out"
            )

    @property
    def discriminator(self) -> Critic | None:
        """The discriminator with its own loss, or None; it has its own optimizer."""
        return None if self.adversarial is None else self.adversarial.critic

    def discriminator_active(self, step: int) -> bool:
        """Tell whether the discriminator learns at this step; the same on every rank."""
        return self.adversarial is not None and self.adversarial.active(step)

    def discriminator_loss(
        self,
        x: Tensor,
        recon: Tensor,
        step: int,
        wrapped: nn.Module | None = None,
        weight: Tensor | None = None,
        views: Views | None = None,
    ) -> dict[str, Tensor]:
        """Return the discriminator's `discriminator_loss` and what it measured.

        Args:
            x: The input.
            recon: Its reconstruction; it is detached here.
            step: Number of optimizer updates done before this one.
            wrapped: `self.discriminator` inside DDP; itself when None.
            weight: As in `forward`.
            views: As in `forward`.
        """
        critic = wrapped or self.discriminator
        assert critic is not None, "a loss without an adversarial term has no discriminator"
        return critic(hidden(x, weight), hidden(recon.detach(), weight), step, views)

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return the loss's own parameters that the generator's optimizer updates."""
        return list(self.terms.parameters())

    def after_step(self) -> None:
        """Update controllers, once per optimizer update and on every rank."""
        for _, term in self.terms.items():
            term.after_step()
        if self.adversarial is not None:
            self.adversarial.after_step()

    def _measures(self, game: Adversarial, step: int) -> bool:
        """Tell whether this pass counts for the adaptive weight: a training pass in the game."""
        return game.adaptive and game.active(step) and self.training and torch.is_grad_enabled()


def hidden(volume: Tensor, weight: Tensor | None) -> Tensor:
    """Return a volume with 0 where no voxel counts, whatever stood there."""
    return volume if weight is None else torch.where(weight > 0, volume, 0.0)
