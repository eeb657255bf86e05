"""Latent diffusion with MONAI's network, schedulers and sampler (only importer of MONAI here).

`LatentDiffusion` holds everything of the second stage that trains or that sampling needs: UNet,
condition projector, null token, ControlNet, class names, statistics of the latents. It is one
module, so all of it is under DDP, averaged, saved and loaded together.

Axes: b batch, c channels, x y z the latent grid, n tokens, d width of the cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae3d.kernels.device import there
from vae3d.kernels.progress import passed
from vae3d.models.norm import wide
from vae3d.models.spec import Described
from vae3d.stage2.latents import Statistics

try:
    from monai.inferers import DiffusionInferer
    from monai.networks.nets import ControlNet, DiffusionModelUNet
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler, Scheduler
except ModuleNotFoundError as error:
    raise ValueError(
        f"latent diffusion needs {error.name}; install it with: pip install 'vae3d[ldm]'"
    ) from error

PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}
SOLVERS = {"ddpm": ("ddim", "ddpm"), "flow": ("euler", "heun")}  # the first is the default


class DiffusionUNet(DiffusionModelUNet):
    """MONAI's DiffusionModelUNet, from a dictionary, for latents of any size.

    Parameters and their names are MONAI's, so checkpoints move both ways. A grid that the levels
    do not halve evenly is padded with zeros at the far end and cropped back.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DiffusionUNet:
        """Build from MONAI's own argument names.

        Args:
            config: `spatial_dims`, `in_channels`, `out_channels`, `channels`, `attention_levels`
                and `num_head_channels` are required. `with_conditioning` (default true) adds
                cross-attention of width `cross_attention_dim` (default 512).

        Example:
            >>> unet = DiffusionUNet.from_config({"spatial_dims": 2, "in_channels": 4,
            ...     "out_channels": 4, "channels": [32, 64], "attention_levels": [False, True],
            ...     "num_head_channels": [0, 32], "cross_attention_dim": 64})
            >>> z, t = torch.randn(1, 4, 10, 9), torch.tensor([500])
            >>> unet(z, timesteps=t, context=torch.randn(1, 7, 64)).shape
            torch.Size([1, 4, 10, 9])
        """
        required: tuple[str, ...] = ("spatial_dims", "in_channels", "out_channels", "channels")
        required += ("attention_levels", "num_head_channels")
        if missing := [key for key in required if key not in config]:
            raise ValueError(f"unet: {', '.join(missing)} missing from the configuration")
        config = {"num_res_blocks": 2, "norm_num_groups": 32, "with_conditioning": True, **config}
        if config["with_conditioning"]:
            config.setdefault("cross_attention_dim", 512)
        else:
            config.pop("cross_attention_dim", None)
        check_heads(config["channels"], config["attention_levels"], config["num_head_channels"])
        try:
            return cls(**config)
        except (TypeError, ValueError) as error:  # an unknown key, or sizes that do not fit
            raise ValueError(f"unet: {error}") from error
        except ArithmeticError as error:  # MONAI divides before it looks
            raise ValueError(f"unet: its numbers do not divide each other ({error})") from error

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None,
                class_labels: Tensor | None = None, *residuals: Any, **named: Any,
                ) -> Tensor:  # fmt: skip
        """Predict from noisy latents.

        Args:
            x: `(B, C, X, Y, Z)` or `(B, C, X, Y)`, any size.
            timesteps: `(B,)`, from 0 (data) to the number of training steps (noise).
            context: `(B, N, D)` tokens for the cross-attention; none is one token of zeros.
            class_labels: `(B,)` integers.
            *residuals: ControlNet residuals, as in MONAI.
            **named: The same by name.
        """
        if self.with_conditioning and context is None:
            context = x.new_zeros(len(x), 1, self.context_dim)
        padded = self.padded(x)
        out = super().forward(padded, timesteps, context, class_labels, *residuals, **named)
        return out[(slice(None), slice(None), *(slice(n) for n in x.shape[2:]))]

    def padded(self, x: Tensor) -> Tensor:
        """Pad with zeros at the far end to what the levels halve evenly."""
        factor = 2 ** (len(self.block_out_channels) - 1)
        return F.pad(x, [n for size in reversed(x.shape[2:]) for n in (0, -size % factor)])

    @property
    def context_dim(self) -> int:
        """Width that the cross-attention expects of its tokens."""
        return next(
            module.context_input_size
            for name, module in self.named_modules()
            if name.endswith("attn2")
        )


def check_heads(
    channels: Sequence[int], attends: Sequence[bool], heads: Sequence[int] | int
) -> None:
    """Refuse heads of no channels, or of more than a level that attends has.

    MONAI's middle block always attends, with the heads of the last level.

    Args:
        channels: Of each level.
        attends: Which levels attend.
        heads: Channels of a head, per level or of all.
    """
    heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    if not len(channels) == len(attends) == len(heads):
        raise ValueError(
            f"unet: channels {list(channels)}, attention_levels {list(attends)} and "
            f"num_head_channels {heads} must be of one length"
        )
    for level, (width, attending, head) in enumerate(zip(channels, attends, heads, strict=True)):
        last = level == len(channels) - 1
        if (attending or last) and not 1 <= head <= width:
            why = ", below which the middle block attends" if last and not attending else ""
            raise ValueError(
                f"unet: num_head_channels is {head} at level {level + 1}{why}: give a divisor of "
                f"its {width} channels"
            )


def control_net(unet: dict[str, Any], channels: int) -> ControlNet:
    """MONAI's ControlNet for a UNet (Zhang et al. 2023, arXiv 2302.05543).

    Parameters and their names are MONAI's. What it sees lies on the latent grid, so that its
    embedding halves nothing.

    Args:
        unet: Configuration of the UNet.
        channels: Of a control.
    """
    known = {key: value for key, value in unet.items() if key in signature(ControlNet).parameters}
    return ControlNet(
        **known,
        conditioning_embedding_in_channels=channels,
        conditioning_embedding_num_channels=(unet["channels"][0],),
    )


def create_condition_projector(condition_input_dim: int, cross_attention_dim: int) -> nn.Linear:
    """Linear map of condition tokens `(B, N, condition_input_dim)` to the UNet's width.

    Args:
        condition_input_dim: Width of a token, such as the channels of the condition's latents.
        cross_attention_dim: Width that the UNet's cross-attention expects.
    """
    return nn.Linear(condition_input_dim, cross_attention_dim)


def tokens_of(latent: Tensor) -> Tensor:
    """Sequence `(B, N, C)` of the voxels of `(B, C, *spatial)`, last axis fastest."""
    return rearrange(latent, "b c ... -> b (...) c")


def positions_of(spatial: Sequence[int], width: int) -> Tensor:
    """Sinusoidal code `(N, width)` of where each token lies; attention alone does not know.

    Each axis gets an equal part of the width: sines and cosines of the voxel index with periods
    from 2 pi to about 2 pi 1000 voxels (Vaswani et al. 2017, section 3.5).

    Args:
        spatial: The latent grid.
        width: Of a token.
    """
    half = width // (2 * len(spatial))
    rates = 1000.0 ** (-torch.arange(half) / max(half, 1))
    codes = []
    for grid in torch.meshgrid(*(torch.arange(n) for n in spatial), indexing="ij"):
        angles = grid.reshape(-1, 1) * rates
        codes += [angles.sin(), angles.cos()]
    code = torch.cat(codes, 1)
    return F.pad(code, (0, width - code.shape[1]))


class LatentDiffusion(Described, nn.Module):
    """Everything of the second stage that is trained and saved.

    Latents go in and come out as the VAE makes them; they are standardized per channel inside.

    Args:
        latent_channels: Channels of the latents.
        spatial_dims: 2 or 3.
        unet: Keys of `DiffusionUNet.from_config` beside the channels and conditioning.
        process: `flow` (rectified flow: straight lines between data and noise) or `ddpm`.
        prediction: What the UNet predicts: epsilon, v or sample; None for v with flow and epsilon
            with ddpm. Rectified flow knows v alone.
        schedule: Noise schedule of ddpm: linear_beta, scaled_linear_beta or cosine.
        time_sampling: How training times are drawn: uniform or logit_normal (more in the middle).
        num_train_timesteps: Steps of the noising process.
        classes: Names of the classes; empty for none. One more is kept for "unknown".
        condition_channels: Channels of the conditioning latents; None for none.
        cross_attention_dim: Width of the condition tokens.
        condition_dropout: Part of the samples that are trained without label and condition, as
            classifier-free guidance needs.
        control_channels: Channels of what a ControlNet sees; None for no ControlNet. It alone is
            trained then, all else stays as `begin_with` gives it.
        control_labels: Labels of a map that are these channels; none where they are intensities.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        latent_channels: int,
        spatial_dims: Literal[2, 3],
        unet: dict[str, Any],
        process: Literal["flow", "ddpm"] = "flow",
        prediction: Literal["epsilon", "v", "sample"] | None = None,
        schedule: Literal["linear_beta", "scaled_linear_beta", "cosine"] = "scaled_linear_beta",
        time_sampling: Literal["uniform", "logit_normal"] = "uniform",
        num_train_timesteps: int = 1000,
        classes: tuple[str, ...] = (),
        condition_channels: int | None = None,
        cross_attention_dim: int = 64,
        condition_dropout: float = 0.1,
        control_channels: int | None = None,
        control_labels: tuple[int, ...] = (),
    ):
        super().__init__()
        if process not in SOLVERS:
            raise ValueError(f"process {process!r} is unknown; choose one of {', '.join(SOLVERS)}")
        prediction = prediction or ("v" if process == "flow" else "epsilon")
        if prediction not in PREDICTIONS or (process == "flow" and prediction != "v"):
            raise ValueError(
                f"prediction {prediction!r} does not go with process {process}: "
                "flow predicts v; ddpm predicts epsilon, v or sample"
            )
        self.latent_channels, self.spatial_dims = latent_channels, spatial_dims
        self.process, self.prediction, self.time_sampling = process, prediction, time_sampling
        self.schedule, self.num_train_timesteps = schedule, num_train_timesteps
        self.classes, self.condition_dropout = tuple(classes), condition_dropout

        config = {
            **unet,
            "spatial_dims": spatial_dims,
            "in_channels": latent_channels,
            "out_channels": latent_channels,
            "num_class_embeds": len(classes) + 1 if classes else None,
            "with_conditioning": condition_channels is not None,
        }
        if condition_channels is not None:
            config["cross_attention_dim"] = cross_attention_dim
            self.projector = create_condition_projector(condition_channels, cross_attention_dim)
            self.null_token = nn.Parameter(torch.zeros(cross_attention_dim))
        self.unet = DiffusionUNet.from_config(config)
        self.condition_channels = condition_channels
        self.scheduler = (self._scheduler("train"),)  # in a tuple: it is no part of the weights
        for name, channels in (("latent", latent_channels), ("condition", condition_channels or 0)):
            self.register_buffer(f"{name}_mean", torch.zeros(channels))
            self.register_buffer(f"{name}_std", torch.ones(channels))
        self.control_channels, self.control_labels = control_channels, tuple(control_labels)
        self.controlnet: ControlNet | None = None
        if control_channels is not None:
            self.requires_grad_(False)
            self.controlnet = control_net(config, control_channels)

    def begin_with(self, base: LatentDiffusion) -> None:
        """Take over a trained model, whose encoder the ControlNet copies; as yet it adds zero."""
        assert self.controlnet is not None
        own, encoder = self.controlnet.state_dict(), base.unet.state_dict()
        self.controlnet.load_state_dict({name: encoder.get(name, own[name]) for name in own})
        mine = {f"controlnet.{k}": v for k, v in self.controlnet.state_dict().items()}
        self.load_state_dict(base.state_dict() | mine)

    def set_statistics(self, latents: Statistics, conditions: Statistics | None = None) -> None:
        """Take over the statistics with which latents and conditions are standardized."""
        for name, statistics in (("latent", latents), ("condition", conditions)):
            if statistics is not None:
                getattr(self, f"{name}_mean").copy_(torch.tensor(statistics.mean))
                getattr(self, f"{name}_std").copy_(torch.tensor(statistics.std))

    def class_index(self, name: str | None) -> int:
        """Number of a class; None is the "unknown" class."""
        if name is None:
            return len(self.classes)
        if name not in self.classes:
            known = ", ".join(self.classes) or "none: it was trained without labels"
            raise ValueError(f"label {name!r} is unknown to the model; it knows {known}")
        return self.classes.index(name)

    def time_of(self, normal: Tensor) -> Tensor:
        """Training times in [0, 1] from standard normal numbers."""
        if self.time_sampling == "logit_normal":
            return normal.sigmoid()  # Esser et al. 2024, section 3.1
        return torch.special.ndtr(normal)

    def loss(
        self,
        z: Tensor,
        noise: Tensor,
        time: Tensor,
        keep: Tensor | None = None,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        control: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the prediction, over standardized latents.

        Args:
            z: Latents `(B, C, *spatial)`.
            noise: Standard normal, same shape.
            time: `(B,)` in [0, 1): how far towards noise.
            keep: `(B,)` bool: which samples keep their label and condition; None for all.
            label: `(B,)` class numbers.
            condition: Latents `(B, C', *grid)` to attend to.
            control: What the ControlNet sees, `(B, K, *spatial)` on the grid of `z`.
        """
        z = self._standardize(z, "latent")
        (scheduler,) = self.scheduler
        timesteps = time * self.num_train_timesteps
        if self.process == "ddpm":
            timesteps = timesteps.long()
        noisy = scheduler.add_noise(z, noise, timesteps)
        labels, context = self._labels(label, keep, len(z)), self.context(condition, keep)
        prediction = self.predict(noisy, timesteps, context, labels, control)
        return F.mse_loss(wide(prediction), self._target(z, noise, timesteps))

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        labels: Tensor | None = None,
        control: Tensor | None = None,
        control_scale: float = 1.0,
    ) -> Tensor:
        """The UNet's prediction, with what the ControlNet adds to its skips and its middle.

        Args:
            x: Noisy latents `(B, C, *spatial)`, standardized.
            timesteps: `(B,)`.
            context: Tokens `(B, N, D)` of the cross-attention.
            labels: `(B,)` class numbers.
            control: `(B, K, *spatial)`; None for the UNet alone.
            control_scale: Factor of all that the ControlNet adds.
        """
        if control is None:
            return self.unet(x, timesteps, context, labels)
        assert self.controlnet is not None, "a control is for a model with a ControlNet"
        seen = self.unet.padded(x), timesteps, self.unet.padded(control)
        down, middle = self.controlnet(*seen, control_scale, context, labels)
        return self.unet(x, timesteps, context, labels, down, middle)

    def _target(self, z: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.process == "flow":
            return z - noise  # MONAI's direction: from noise to data
        (scheduler,) = self.scheduler
        return {
            "epsilon": lambda: noise,
            "sample": lambda: z,
            "v": lambda: scheduler.get_velocity(z, noise, timesteps),
        }[self.prediction]()

    def context(self, condition: Tensor | None, keep: Tensor | None = None) -> Tensor | None:
        """Tokens `(B, N, D)` for the cross-attention, each sample's own.

        Args:
            condition: Latents `(B, C', *grid)`; None stands for the null token.
            keep: `(B,)` bool; where False the sample's tokens are null tokens.
        """
        if self.condition_channels is None:
            return None
        if condition is None:
            return self.null_token[None, None]
        tokens = self.projector(tokens_of(self._standardize(condition, "condition")))
        tokens = tokens + there(tokens, positions_of, condition.shape[2:], tokens.shape[-1])
        # Multiplied, not chosen: every parameter has a gradient on every rank, whatever is dropped.
        keep = tokens.new_ones(len(tokens)) if keep is None else keep.to(tokens.dtype)
        keep = keep[:, None, None]
        return tokens * keep + self.null_token * (1 - keep)

    def _labels(self, label: Tensor | None, keep: Tensor | None, batch: int) -> Tensor | None:
        if not self.classes:
            return None
        unknown = torch.full((batch,), len(self.classes), device=self.latent_mean.device)
        label = unknown if label is None else label
        return label if keep is None else torch.where(keep, label, unknown)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        steps: int = 50,
        solver: Literal["ddim", "ddpm", "euler", "heun"] | None = None,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        guidance: float = 1.0,
        control: Tensor | None = None,
        control_scale: float = 1.0,
    ) -> Tensor:
        """Turn noise into latents as the VAE decodes them.

        Args:
            noise: `(B, C, *spatial)`, standard normal.
            steps: Evaluations of the UNet (twice as many with heun and with guidance). The solver
                ddpm always takes all training steps, and draws from torch's global generator.
            solver: ddim or ddpm for a ddpm model, euler or heun for a flow; None for the first.
            label: `(B,)` class numbers.
            condition: Latents `(B, C', *grid)` to attend to.
            guidance: Classifier-free guidance: 1 for none, 0 ignores label and condition, above 1
                follows them more closely.
            control: What the ControlNet sees, `(B, K, *spatial)` on the grid of `noise`; guidance
                is of label and condition, it stays.
            control_scale: Factor of all that the ControlNet adds; 0 for the model without it.
        """
        chosen = solver or SOLVERS[self.process][0]
        if chosen not in SOLVERS[self.process]:
            raise ValueError(
                f"solver {chosen!r} does not solve {self.process}; choose one of "
                + ", ".join(SOLVERS[self.process])
            )
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"steps {steps} must lie between 1 and {self.num_train_timesteps}")
        scheduler = self._scheduler(chosen, steps)
        each = 1 / len(scheduler.timesteps)
        guided = partial(
            self._guided, label=label, condition=condition, guidance=guidance, control=control,
            control_scale=control_scale,
        )  # fmt: skip
        kind = noise.device.type
        as_called = (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def model(x: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
            with torch.autocast(kind, *as_called):
                return guided(x, timesteps)

        # MONAI's types ask for a network, where any function will do.
        sampler: Any = DiffusionInferer(scheduler)
        solve = partial(_heun, model, scheduler) if chosen == "heun" else model

        def step(x: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
            found = solve(x, timesteps)
            passed(each)
            return found

        # Under autocast is the network alone: MONAI's times are float64, which it does not know.
        with torch.autocast(kind, enabled=False):
            z = sampler.sample(noise, step, verbose=False)
        return z * _as_channels(self.latent_std, z) + _as_channels(self.latent_mean, z)

    def _guided(self, x: Tensor, timesteps: Tensor, *, label: Tensor | None,
                condition: Tensor | None, guidance: float, control: Tensor | None = None,
                control_scale: float = 1.0) -> Tensor:  # fmt: skip
        """Prediction with classifier-free guidance (Ho & Salimans 2022, equation 6)."""

        def predict(label: Tensor | None, condition: Tensor | None) -> Tensor:
            labels = self._labels(label, None, len(x))
            context = self.context(condition)
            if context is not None:
                context = context.expand(len(x), -1, -1)
            times = timesteps.expand(len(x))
            return wide(self.predict(x, times, context, labels, control, control_scale))

        if label is None and condition is None:
            return predict(None, None)
        if guidance == 1:
            return predict(label, condition)
        without = predict(None, None)
        return without + guidance * (predict(label, condition) - without)

    def _scheduler(self, solver: str, steps: int | None = None) -> Scheduler:
        """MONAI's scheduler for training or for a solver. Latents are never clipped to [-1, 1]."""
        total = self.num_train_timesteps
        if self.process == "flow":
            flow = RFlowScheduler(total, use_discrete_timesteps=False)
            if steps is not None:
                flow.set_timesteps(steps)
            return flow
        options: dict[str, Any] = dict(
            num_train_timesteps=total,
            schedule=self.schedule,
            prediction_type=PREDICTIONS[self.prediction],
            clip_sample=False,
        )
        if self.schedule == "scaled_linear_beta":
            options |= dict(beta_start=0.0015, beta_end=0.0195)  # as in Rombach et al. 2022
        if solver != "ddim" or steps is None:
            return DDPMScheduler(**options)
        if total % steps:
            divisors = [n for n in range(1, total + 1) if total % n == 0]
            nearest = min((abs(n - steps), n) for n in divisors)[1]
            raise ValueError(
                f"steps must divide {total} for ddim; {steps} does not, {nearest} does"
            )
        scheduler = DDIMScheduler(**options)
        scheduler.set_timesteps(steps)
        # MONAI's steps are total // steps long, but its times lie (total - 1) / (steps - 1) apart:
        # each step would start from another time than the one before has reached.
        scheduler.timesteps = total - 1 - torch.arange(steps) * (total // steps)
        return scheduler

    def _standardize(self, z: Tensor, name: str) -> Tensor:
        mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
        return (z - _as_channels(mean, z)) / _as_channels(std, z)


def _heun(
    model: Callable, scheduler: Scheduler, x: Tensor, timesteps: Tensor, context: None = None
) -> Tensor:
    """Mean of the velocity here and where Euler's step would lead: second order."""
    velocity = model(x, timesteps)
    later = scheduler.timesteps[scheduler.timesteps < timesteps.item()]
    if len(later) == 0:
        return velocity  # the last step ends at the data, where there is no velocity to learn
    dt = (timesteps - later[0]) / scheduler.num_train_timesteps
    ahead = model(x + velocity * dt, later[:1].to(timesteps))
    return (velocity + ahead) / 2


def _as_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 2))
