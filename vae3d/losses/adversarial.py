"""Adversarial training: a patch discriminator, the losses of both sides, and their balance.

The generator's pass reads detached copies of the discriminator's parameters: it can leave no
gradient in them. The discriminator's pass sees detached reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch._functorch.config
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.losses.slices import draw_slices, mean_over_slices, take_slices
from vae3d.models.norm import wide

# The batches that a discriminator judges, and the function that averages one value for each.
Judged = tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]
Look = Callable[[Tensor, int], Judged]


class Views(Protocol):
    """How volumes of which each rank holds a part are judged; `voxels` are those of a whole one."""

    voxels: int

    def __call__(self, volume: Tensor, step: int) -> Judged:
        """Return the batches to judge, and the function that averages one value for each."""
        ...


# Each as printed in its paper, on raw logits: (discriminator of real, of fake, generator of fake).
CRITERIA: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    # Lim & Ye 2017, eq. 3 and 4
    "hinge": (lambda real: F.relu(1 - real), lambda fake: F.relu(1 + fake), lambda fake: -fake),
    # Mao et al. 2017, eq. 9 with a = 0, b = c = 1
    "least_squares": (
        lambda real: 0.5 * (real - 1).square(),
        lambda fake: 0.5 * fake.square(),
        lambda fake: 0.5 * (fake - 1).square(),
    ),
    # Goodfellow et al. 2014, eq. 1 and section 3: -log D(x), -log(1 - D(G)), -log D(G)
    "non_saturating": (lambda real: F.softplus(-real), F.softplus, lambda fake: F.softplus(-fake)),
}


class Discriminator(nn.Module):
    """Socket of discriminators, made from `(spatial_dims, in_channels)`."""

    def check(self, size: Sequence[int]) -> None:
        """Refuse volumes of this spatial size if they are too small."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits `(B, 1, ...)` in float32 and the feature maps before them."""
        raise NotImplementedError


class PatchDiscriminator(Discriminator):
    """PatchGAN (Isola et al. 2017) in 2D or 3D: one logit for each overlapping patch of the input.

    Normalization is per sample (groups), so a sample's logits do not depend on its batch.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the volume.
        channels: Channels after the first convolution; doubled at each further one, at most 8x.
        num_layers: Convolutions of stride 2.
        norm_groups: Groups of the normalization; 0 for none.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int = 32,
        num_layers: int = 3,
        norm_groups: int = 8,
    ):
        super().__init__()
        if norm_groups and channels % norm_groups:
            raise ValueError(
                f"PatchDiscriminator.channels {channels} is not a multiple of norm_groups "
                f"{norm_groups}"
            )
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        blocks = [[conv(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]]
        for i, (before, after) in enumerate(pairwise(widths), 1):
            size, stride = (4, 2) if i < num_layers else (3, 1)
            norm = nn.GroupNorm(norm_groups, after) if norm_groups else nn.Identity()
            blocks.append([conv(before, after, size, stride, 1), norm, nn.LeakyReLU(0.2)])
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)
        self.head = conv(widths[-1], 1, 3, padding=1)
        self.smallest = 2**num_layers

    def check(self, size: Sequence[int]) -> None:
        """See `Discriminator`."""
        if min(size) < self.smallest:
            raise ValueError(
                f"the discriminator needs {self.smallest} voxels along each axis, the patch has "
                f"{tuple(size)}; set a smaller PatchDiscriminator.num_layers"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits `(B, 1, ...)` in float32 and the feature maps before them."""
        self.check(x.shape[2:])
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return wide(self.head(x)), features


class Critic(nn.Module):
    """The discriminator and its loss, in one forward: what DDP wraps and its optimizer trains.

    Args:
        net: The discriminator.
        criterion: Key of `CRITERIA`.
        views: Maps `(volume, step)` to the batches the discriminator judges and their weights.
        r1_weight: Factor gamma of the R1 penalty; 0 for none.
        r1_every: Steps between two R1 penalties, each multiplied by this number.
    """

    def __init__(
        self, net: Discriminator, criterion: str, views: Look, r1_weight: float, r1_every: int
    ):
        super().__init__()
        self.net = net
        self.criterion = criterion
        self.views = views
        self.r1_weight, self.r1_every = r1_weight, r1_every

    def forward(
        self, x: Tensor, fake: Tensor, step: int, views: Views | None = None
    ) -> dict[str, Tensor]:
        """Return `discriminator_loss`, for the discriminator's update, and what it measured.

        `views` stand in the place of its own where `x` is a part of each volume alone.
        """
        look = views or self.views
        of_real, of_fake, _ = CRITERIA[self.criterion]
        x, fake = wide(x.detach()), wide(fake.detach())
        batches, mean = look(torch.cat((x, fake)), step)
        # Slices of a volume stay in the order (slice, sample): split them back into real and fake.
        logits = [
            self.net(batch)[0].unflatten(0, (-1, 2, len(x))).transpose(0, 1) for batch in batches
        ]
        real, fake_logits = [pair[0] for pair in logits], [pair[1] for pair in logits]
        loss = mean([of_real(r).mean() + of_fake(f).mean() for r, f in logits])
        out = {
            "logits_real": mean([r.mean() for r in real]).detach(),
            "logits_fake": mean([f.mean() for f in fake_logits]).detach(),
        }
        if self.r1_weight and step % self.r1_every == 0:
            penalty = self._r1(x, step, look)
            loss = loss + self.r1_weight * self.r1_every * penalty
            out["r1"] = penalty.detach()
        return {"discriminator_loss": loss} | out

    def _r1(self, x: Tensor, step: int, look: Look) -> Tensor:
        """Half the squared gradient of a logit at real data: Mescheder et al. 2018, eq. 9.

        A patch discriminator has many logits: their sum is differentiated and the square divided by
        their number, which does not change with the patch size. In float32: a second derivative.
        """
        penalties = []
        with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
            batches, mean = look(x, step)
            for batch in batches:
                batch = batch.detach().requires_grad_(True)
                logits = self.net(batch)[0]
                (slope,) = torch.autograd.grad(logits.sum(), batch, create_graph=True)
                penalties.append(0.5 * slope.square().sum() / logits.numel())
        return mean(penalties)


class Adversarial(nn.Module):
    """A discriminator against the VAE, on random 2D slices or on whole 3D patches.

    Args:
        weight: Factor of the term in the total.
        spatial_dims: 2 judges random slices of the planes of a volume (or whole 2D images); 3
            judges whole 3D patches.
        in_channels: Channels of the volume.
        discriminator: The network, made from (spatial_dims, in_channels).
        criterion: Loss of both sides.
        start_step: First step at which either side takes part.
        adaptive: Multiply the weight by the ratio of the last layer's gradients from the other
            terms and from this one (Esser et al. 2021, eq. 7), as measured one step before. It is 0
            at the first step.
        max_adaptive: Upper limit of that ratio.
        feature_matching_weight: Factor of the L1 distance between the discriminator's features of
            input and reconstruction (Wang et al. 2018, eq. 4); 0 for none. Not adaptive.
        r1_weight: Factor gamma of the R1 gradient penalty; 0 for none.
        r1_every: Steps between two R1 penalties, each multiplied by this number.
        num_slices: Slices of each volume a step, over all planes together.
        seed: Seed of the slice positions.
    """

    adaptive_weight: Tensor

    def __init__(
        self,
        weight: float = 0.1,
        spatial_dims: Literal[2, 3] = 2,
        in_channels: int = 1,
        discriminator: Callable[[int, int], Discriminator] = PatchDiscriminator,
        criterion: Literal["hinge", "least_squares", "non_saturating"] = "hinge",
        start_step: int = 0,
        adaptive: bool = True,
        max_adaptive: float = 1e4,
        feature_matching_weight: float = 0.0,
        r1_weight: float = 0.0,
        r1_every: int = 1,
        num_slices: int = 6,
        seed: int = 0,
    ):
        super().__init__()
        if criterion not in CRITERIA:
            raise ValueError(f"Adversarial.criterion is {criterion!r}; one of {[*CRITERIA]}")
        for name, value in (("num_slices", num_slices), ("r1_every", r1_every)):
            if value < 1:
                raise ValueError(f"Adversarial.{name} is {value}; it must be at least 1")
        self.weight = weight
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.start_step = start_step
        self.adaptive, self.max_adaptive = adaptive, max_adaptive
        if adaptive:
            # `measure` walks the model's graph before backward does: a compiled one must not reuse
            # its saved activations as scratch memory. Read when the model is compiled, so later.
            torch._functorch.config.donated_buffer = False
        self.feature_matching_weight = feature_matching_weight
        self.num_slices, self.seed = num_slices, seed
        net = discriminator(spatial_dims, in_channels)
        self.critic = Critic(net, criterion, self._views, r1_weight, r1_every)
        self.register_buffer("adaptive_weight", torch.zeros(()))
        self._slopes: Tensor | None = None  # (2, n): last layer's gradients of this step
        self._samples = 0  # that they are of

    def check(self, shape: Sequence[int]) -> None:
        """Refuse volumes `(C, *spatial)` that the discriminator cannot judge."""
        if shape[0] != self.in_channels:
            raise ValueError(
                f"Adversarial.in_channels is {self.in_channels}, the volume has {shape[0]}"
            )
        if len(shape) == 3 and self.spatial_dims == 3:
            raise ValueError("Adversarial.spatial_dims is 3 but the volumes are 2D; set it to 2")
        self.critic.net.check(shape[1:])

    def active(self, step: int) -> bool:
        """Tell whether the game is on at this step."""
        return step >= self.start_step

    def forward(
        self, x: Tensor, recon: Tensor, step: int, views: Views | None = None
    ) -> dict[str, Tensor]:
        """Return the generator's unweighted `adversarial` and, if asked for, `feature_matching`.

        `views`: see `Critic`.
        """
        if not self.active(step):
            return {name: recon.new_zeros(()) for name in self.weights()}
        of_generator = CRITERIA[self.critic.criterion][2]
        look = views or self._views
        batches, mean = look(recon, step)
        judged = [self._frozen(batch) for batch in batches]
        out = {"adversarial": mean([of_generator(logits).mean() for logits, _ in judged])}
        if self.feature_matching_weight:
            with torch.no_grad():
                wanted = [self._frozen(batch)[1] for batch in look(x, step)[0]]
            got = [features for _, features in judged]
            out["feature_matching"] = mean([_l1(a, b) for a, b in zip(wanted, got, strict=True)])
        return out

    def weights(self) -> dict[str, float | Tensor]:
        """Return the weight of each of the generator's terms at this step."""
        scale = self.adaptive_weight if self.adaptive else 1.0
        out: dict[str, float | Tensor] = {"adversarial": self.weight * scale}
        if self.feature_matching_weight:
            out["feature_matching"] = self.feature_matching_weight
        return out

    def measure(
        self,
        others: Tensor,
        adversarial: Tensor,
        last_layer: Tensor,
        recon: Tensor,
        views: Views | None = None,
    ) -> None:
        """Add up the last layer's gradients from the other terms and from the adversarial one.

        The micro-batches' gradients are weighted by their number of samples, so that their sum is
        the gradient of the whole batch. Meanwhile they are scaled by the root of the number of
        voxels: half precision would round a voxel's share of a mean to 0, or overflow on a sum.
        Those of a whole volume: slabs of unequal size, which send each other gradients, need one
        scale.
        """
        voxels = recon[0, 0].numel() if views is None else views.voxels
        scale = (len(recon) * voxels) ** 0.5
        slopes = [
            wide(torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0]).flatten()
            for loss in (others, adversarial)
        ]
        slopes = torch.stack(slopes).detach() * (len(recon) / scale)
        self._slopes = slopes if self._slopes is None else self._slopes + slopes
        self._samples += len(recon)

    def after_step(self) -> None:
        """Set the adaptive weight from the gradients of the step, of all ranks together."""
        slopes, self._slopes = self._slopes, None
        samples, self._samples = self._samples, 0
        if slopes is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(slopes)
            samples *= dist.get_world_size()  # all ranks have as many
        others, adversarial = (slopes / samples).norm(dim=1)
        ratio = (others / (adversarial + 1e-6)).clamp(0, self.max_adaptive)
        self.adaptive_weight.copy_(torch.where(ratio.isfinite(), ratio, self.adaptive_weight))

    def _frozen(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the discriminator on detached parameters: gradients reach the input only."""
        parameters = {name: p.detach() for name, p in self.critic.net.named_parameters()}
        return torch.func.functional_call(self.critic.net, parameters, (batch,))

    def _views(self, volume: Tensor, step: int) -> Judged:
        """Return the batches to judge, and the function that averages one value for each."""
        self.check(volume.shape[1:])
        if volume.ndim == 2 + self.spatial_dims:
            return [volume], lambda values: values[0]
        picks = draw_slices(tuple(volume.shape[2:]), self.num_slices, step, self.seed)
        return take_slices(volume, picks), lambda values: mean_over_slices(values, picks)


def _l1(wanted: list[Tensor], got: list[Tensor]) -> Tensor:
    """Mean absolute difference of feature maps, mean over layers."""
    gaps = [(wide(b) - wide(a)).abs().mean() for a, b in zip(wanted, got, strict=True)]
    return torch.stack(gaps).mean()
