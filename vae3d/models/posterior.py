"""The posterior, Gaussian or a code out of a codebook, and the heads that make it of moments.

Names: `mean`, `logvar` (log of the variance) and `std` never stand for one another. A code is an
integer, its place in the codebook; its value is what is decoded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.models.norm import wide

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # clamp of the log-variance in Stable Diffusion and MONAI
MOST_CODES = 2**20  # of a codebook; their use is counted one by one
LLOYD_STEPS = 10  # from a linear code to a codebook
SMOOTHING = 1e-5  # of the counts of VQ, as in van den Oord et al. 2017


@dataclass(frozen=True)
class DiagonalGaussian:
    """Normal distribution with a mean and a variance per latent element.

    Args:
        mean: `(B, C, *spatial)`.
        logvar: Log of the variance, same shape.
    """

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation, `exp(logvar / 2)`."""
        return torch.exp(self.logvar / 2)

    def mode(self) -> Tensor:
        """Most likely latent, the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw `mean + std * noise`, differentiable in both.

        Args:
            generator: Source of the noise; the global one of the device when None.
        """
        std = self.std
        if generator is None:
            # Laid out contiguously, so that a seed gives one volume whatever the strides of `std`.
            noise = torch.randn_like(std, memory_format=torch.contiguous_format)
            return self.mean + noise * std
        noise = torch.randn(std.shape, generator=generator, dtype=std.dtype, device=std.device)
        return self.mean + noise * std

    def kl(self, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """KL divergence to the standard normal, in nats.

        `mean` averages over the batch and every latent element, in 2D and 3D alike, so a weight
        fitted at one patch size holds at another. `sum` adds the latent elements of a sample and
        averages over the batch, the convention of latent-diffusion codes; it is `mean` times the
        number of latent elements of a sample: a weight of 1e-6 on `sum` at a latent of 4x16x16x16
        is a weight of 1e-6 * 16384 = 0.016 on `mean`.

        Args:
            reduction: `mean`, `sum`, or `none` for one value per latent element.
        """
        kl = 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)
        if reduction == "none":
            return kl
        return kl.mean() if reduction == "mean" else kl.flatten(1).sum(1).mean()


@dataclass(frozen=True)
class Quantized(DiagonalGaussian):
    """Latents out of a codebook: `mean` is their values, with no spread round them.

    `logvar` is minus infinity, so that a draw is the value itself. What is not finite in it has no
    KL divergence: losses and metrics leave that out.

    Args:
        mean: Values of the codes, `(B, C, *spatial)`; their gradient goes straight through.
        logvar: Minus infinity, same shape.
        codes: Places in the codebook, `(B, codes of a latent voxel, *spatial)`, int64.
        num_codes: Size of the codebook.
        encoded: What was quantized, `(B, C, *spatial)`, with its gradient; None where nothing is
            learned of it.
    """

    codes: Tensor
    num_codes: int
    encoded: Tensor | None = None

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The values: there is nothing to draw."""
        return self.mean

    def kl(self, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """Refuse: a latent without a spread is infinitely far from any density."""
        raise ValueError("codes have no KL divergence; look at their `use`")

    def use(self) -> tuple[Tensor, Tensor]:
        """Perplexity of the codes and the part of the codebook that is used, see `use_of`."""
        return use_of(self.codes, self.num_codes)


def use_of(
    codes: Tensor, num_codes: int, total: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[Tensor, Tensor]:
    """How the codes of a batch lie over their codebook.

    Args:
        codes: `(B, codes of a latent voxel, *spatial)`.
        num_codes: Size of the codebook.
        total: Adds up the counts of those who hold parts of the batch.

    Returns:
        Perplexity, the exponential of the entropy: how many codes would be in use if all were used
        alike; and the part of the codebook that occurs. Means over the codes of a latent voxel.
    """
    each = codes.transpose(0, 1).flatten(1)
    counts = each.new_zeros(len(each), num_codes).scatter_add_(1, each, torch.ones_like(each))
    counts = total(counts)
    share = counts.float() / counts.sum(1, keepdim=True)
    perplexity = torch.special.entr(share).sum(1).exp()
    return perplexity.mean(), (counts > 0).float().mean()


class PosteriorHead(nn.Module):
    """Contract of a head: maps `num_moments * latent_channels` channels to a `DiagonalGaussian`.

    The first C channels of the moments are the mean's: to them a linear code is added.

    A head with a codebook gives `Quantized`, tells `num_codes` and has `codes` and `values`, which
    are each other's inverse.

    Attributes:
        num_moments: Channels of the moments for each of the latent.
        linear_std: Standard deviation that a linear code gives each channel; None for their own
            proportions, in which distances between latents are those between blocks.
    """

    num_moments: int
    linear_std: float | None = 1.0
    num_codes = 0  # size of the codebook; 0 for latents that are no codes

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, num_moments * C, *spatial)`."""
        raise NotImplementedError

    def fit(self, latent_channels: int) -> None:
        """Make what depends on the latent's channels, or refuse them; the network calls it once."""

    def begin(self, latents: Tensor) -> None:
        """Take over what a linear code gives, `(n, C)`, before the first step."""

    def codes(self, z: Tensor) -> Tensor:
        """Nearest codes `(B, codes of a latent voxel, *spatial)` of any `(B, C, *spatial)`."""
        raise NotImplementedError

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, `(B, C, *spatial)` float32."""
        raise NotImplementedError

    def observe(self, posterior: DiagonalGaussian, normal: Callable[..., Tensor]) -> None:
        """Note what a micro-batch of training tells of the codebook, once a forward pass.

        Args:
            posterior: What the head has made.
            normal: `normal(shape, word)`, numbers of the samples: see `vae3d.losses.term`.
        """

    def after_step(self) -> None:
        """Move the codebook, once an optimizer update; every rank calls it."""


class LogVarianceHead(PosteriorHead):
    """Second half of the channels is the log-variance, clamped (as in Stable Diffusion and MONAI).

    Args:
        min_logvar: Lower clamp.
        max_logvar: Upper clamp.
        init_logvar: Added before the clamp. A new network's own log-variance is near 0, that is
            noise as strong as the signal; -6 lets training begin with a std of 0.05.
    """

    num_moments = 2

    def __init__(
        self,
        min_logvar: float = MIN_LOGVAR,
        max_logvar: float = MAX_LOGVAR,
        init_logvar: float = 0.0,
    ):
        super().__init__()
        self.min_logvar, self.max_logvar = min_logvar, max_logvar
        self.init_logvar = init_logvar

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, 2 C, *spatial)`, in float32."""
        mean, logvar = wide(moments).chunk(2, dim=1)
        logvar = (logvar + self.init_logvar).clamp(self.min_logvar, self.max_logvar)
        return DiagonalGaussian(mean, logvar)


class SoftplusHead(PosteriorHead):
    """Second half of the channels is the standard deviation, through a softplus.

    Args:
        min_std: Added to it, so that its log stays finite.
    """

    num_moments = 2

    def __init__(self, min_std: float = 1e-4):
        super().__init__()
        if min_std <= 0:
            raise ValueError(f"min_std={min_std} must be positive, else the log-variance is -inf")
        self.min_std = min_std

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, 2 C, *spatial)`, in float32."""
        mean, raw = wide(moments).chunk(2, dim=1)
        return DiagonalGaussian(mean, 2 * torch.log(F.softplus(raw) + self.min_std))


class FixedStdHead(PosteriorHead):
    """All channels are the mean; the standard deviation is a constant.

    Args:
        std: Standard deviation of every latent element.
    """

    num_moments = 1

    def __init__(self, std: float = 0.5):
        super().__init__()
        if std <= 0:
            raise ValueError(f"std={std} must be positive")
        self.logvar = 2 * math.log(std)

    def forward(self, moments: Tensor) -> DiagonalGaussian:
        """Make the posterior from `(B, C, *spatial)`, in float32."""
        mean = wide(moments)
        return DiagonalGaussian(mean, torch.full_like(mean, self.logvar))


class FSQ(PosteriorHead):
    """Finite scalar quantization: each channel is bounded and rounded to a few levels.

    Mentzer et al. 2023, arXiv 2309.15505. The codebook is the grid of all combinations, so nothing
    of it is learned; codes come into use as the encoder spreads. A latent of as many channels as
    there are levels is one code a latent voxel, one of twice as many is two, and so on. Values lie
    in [-1, 1].

    Args:
        levels: Levels of each channel, 3 or more; the codebook has their product. The paper's:
            (8, 6, 5) for 2^8, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12.
    """

    num_moments = 1
    linear_std = 0.7  # at 1 the long tails of principal components lie in the outermost levels
    levels: Tensor
    place: Tensor

    def __init__(self, levels: tuple[int, ...] = (8, 5, 5, 5)):
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"FSQ.levels is {list(levels)}; give 3 or more for each channel")
        self.num_codes = math.prod(levels)
        if self.num_codes > MOST_CODES:
            raise ValueError(
                f"FSQ.levels {list(levels)} make {self.num_codes} codes, {MOST_CODES} is the most;"
                " give fewer levels: they are repeated over the latent's channels"
            )
        # Integers, which keep their values when a network is cast to half precision.
        places = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("place", torch.tensor(places), persistent=False)

    def fit(self, latent_channels: int) -> None:
        """Refuse channels that the levels do not divide."""
        if latent_channels % len(self.levels):
            raise ValueError(
                f"FSQ.levels {self.levels.tolist()} are of {len(self.levels)} channels, and"
                f" latent_channels is {latent_channels}; give as many, or a multiple"
            )

    def forward(self, moments: Tensor) -> Quantized:
        """Round `(B, C, *spatial)`, in float32."""
        encoded = self._grouped(wide(moments))
        levels = self._along(self.levels, encoded)
        half, offset = (levels - 1) * (1 + 1e-3) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(encoded + torch.atanh(offset / half)) * half - offset
        rounded = bounded.round()
        values = straight_through(rounded, bounded) / (levels // 2)
        return quantized(values.flatten(1, 2), self._number(rounded), self.num_codes)

    def codes(self, z: Tensor) -> Tensor:
        """Codes of the nearest levels."""
        z = self._grouped(wide(z))
        width, levels = self._along(self.levels // 2, z), self._along(self.levels, z)
        return self._number(torch.minimum((z * width).round().maximum(-width), levels - 1 - width))

    def values(self, codes: Tensor) -> Tensor:
        """Values of the levels, in [-1, 1]."""
        codes = codes.unsqueeze(2)
        levels, place = self._along(self.levels, codes), self._along(self.place, codes)
        width = levels // 2
        return ((codes // place % levels - width) / width).flatten(1, 2)

    def _number(self, rounded: Tensor) -> Tensor:
        """Codes of levels `(B, groups, levels, *spatial)` that are counted from their middle."""
        width, place = (self._along(t, rounded) for t in (self.levels // 2, self.place))
        return ((rounded.nan_to_num().long() + width) * place).sum(2)

    def _grouped(self, z: Tensor) -> Tensor:
        return z.unflatten(1, (-1, len(self.levels)))

    def _along(self, values: Tensor, like: Tensor) -> Tensor:
        """A number for each channel of a group, for tensors `(B, groups, levels, *spatial)`."""
        return values.view(-1, *(1,) * (like.dim() - 3))


class VQ(PosteriorHead):
    """Vector quantization: a latent voxel is the nearest of the vectors in a learned codebook.

    Van den Oord et al. 2017, arXiv 1711.00937, with the codebook as the running mean of what is
    nearest to each code (their appendix A.1); the encoder is drawn to it by the term `commitment`
    of the loss. Codes that are hardly used begin anew at latents of the step, drawn by their
    squared distance from the codebook (Arthur and Vassilvitskii 2007), and so does all of it at
    the first step. Who trains by a loop of their own calls `observe` and `after_step`, as
    `vae3d.training.task` does.

    Args:
        codebook: Number of codes.
        ema: Decay of the running means, per step.
        reseed: A code begins anew below this part of an equal share of the latents; 0 for never.
    """

    num_moments = 1
    linear_std = None
    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: int = 1024, ema: float = 0.99, reseed: float = 0.05):
        super().__init__()
        if not 2 <= codebook <= MOST_CODES:
            raise ValueError(f"VQ.codebook is {codebook}; give 2 to {MOST_CODES} codes")
        if not (0 <= ema < 1 and 0 <= reseed < 1):
            raise ValueError(f"VQ.ema is {ema} and VQ.reseed {reseed}; give 0 to below 1")
        self.num_codes, self.ema, self.reseed = codebook, ema, reseed
        self._seen: Tensor | None = None  # count and sum of the latents of each code
        self._seeds: Tensor | None = None  # key and latent of what dead codes may begin at

    def fit(self, latent_channels: int) -> None:
        """Make a codebook of vectors with so many channels."""
        self.register_buffer("codebook", torch.randn(self.num_codes, latent_channels))
        self.register_buffer("counts", torch.zeros(self.num_codes))
        self.register_buffer("sums", torch.zeros(self.num_codes, latent_channels))

    @torch.no_grad()
    def begin(self, latents: Tensor) -> None:
        """Begin at the k-means of latents, drawn where they are many: a few steps of Lloyd's."""
        generator = torch.Generator().manual_seed(0)
        most = max(min(64 * self.num_codes, 2**26 // self.num_codes), self.num_codes)
        rows = latents[torch.randperm(len(latents), generator=generator)[:most]]
        rows = rows.to(wide(self.codebook).dtype)
        self.codebook.copy_(rows[torch.arange(self.num_codes) % len(rows)])
        for _ in range(LLOYD_STEPS):
            codes = self.codes(rows.T[None]).flatten()
            self._count(rows, codes, torch.randn(len(rows), generator=generator).to(rows))
            self._move(ema=0.0)
        share = self.counts.mean()  # one latent a code, so that training soon outweighs them
        self.counts /= share
        self.sums /= share

    def forward(self, moments: Tensor) -> Quantized:
        """Replace each vector of `(B, C, *spatial)` by the nearest of the codebook, in float32."""
        encoded = wide(moments)
        codes = self.codes(encoded)
        values = straight_through(self.values(codes).to(encoded.dtype), encoded)
        return quantized(values, codes, self.num_codes, encoded)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """Code of the nearest vector."""
        z = wide(z)
        rows, book = vectors(z), self.codebook.to(z)
        with torch.autocast(z.device.type, enabled=False):
            if torch.compiler.is_compiling():  # programs of ONNX know no `cdist`
                nearest = (book.square().sum(1) / 2 - rows @ book.T).argmin(1)
            else:
                # Distances one by one: sums of products would lose the nearest among near ones,
                # under TF32 most of all, and depend on how many rows there are.
                exactly = "donot_use_mm_for_euclid_dist"
                pieces = rows.split(max(1, 2**24 // self.num_codes))  # of 64 MB
                nearest = torch.cat(
                    [torch.cdist(p, book, compute_mode=exactly).argmin(1) for p in pieces]
                )
        return nearest.view(z.shape[0], 1, *z.shape[2:])

    def values(self, codes: Tensor) -> Tensor:
        """Vectors of the codebook."""
        return wide(self.codebook)[codes.squeeze(1)].movedim(-1, 1)

    @torch.no_grad()
    def observe(self, posterior: DiagonalGaussian, normal: Callable[..., Tensor]) -> None:
        """Add up count and sum of the latents of each code; keep some for codes to begin at."""
        if not self.training:
            return
        assert isinstance(posterior, Quantized) and posterior.encoded is not None
        rows, codes = vectors(posterior.encoded.detach()), posterior.codes.flatten()
        rows = rows.to(wide(self.codebook))
        self._count(rows, codes, normal(posterior.codes.shape[2:], "codes").flatten())

    def _count(self, rows: Tensor, codes: Tensor, normal: Tensor) -> None:
        """Add latents `(n, C)` of so many codes, with a number of N(0, 1) for each."""
        counted = torch.cat([torch.ones_like(rows[:, :1]), rows], 1)
        seen = torch.zeros_like(counted[:1]).repeat(self.num_codes, 1).index_add_(0, codes, counted)
        self._seen = seen if self._seen is None else self._seen + seen
        if self.reseed:
            # The smallest of exponential numbers over weights are a draw by weight without
            # replacement (Efraimidis and Spirakis 2006), and those of several batches one of all.
            far = (rows - wide(self.codebook)[codes]).square().sum(1)
            keys = -torch.special.log_ndtr(normal) / far.clamp_min(torch.finfo(far.dtype).tiny)
            self._keep(torch.cat([keys[:, None], rows], 1))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move codes to the running mean of their latents, of all micro-batches and ranks."""
        if self._seen is None:  # no training forward since the last call
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._seen)
            if self.reseed:
                assert self._seeds is not None
                everywhere = [torch.empty_like(self._seeds) for _ in range(dist.get_world_size())]
                dist.all_gather(everywhere, self._seeds)
                self._seeds = None
                self._keep(torch.cat(everywhere))
        self._move(self.ema)

    def _move(self, ema: float) -> None:
        """Move codes to the running mean with what was counted."""
        seen, self._seen = self._seen, None
        assert seen is not None
        counts = self.counts.lerp(seen[:, 0], 1 - ema)
        sums = self.sums.lerp(seen[:, 1:], 1 - ema)
        total = counts.sum()
        smoothed = (counts + SMOOTHING) / (total + self.num_codes * SMOOTHING) * total
        met = counts[:, None] > 0
        new = torch.where(met, sums / smoothed[:, None], self.codebook), counts, sums
        if self.reseed:
            new = self._reseeded(*new)
        finite = seen.isfinite().all()
        for old, value in zip((self.codebook, self.counts, self.sums), new, strict=True):
            old.copy_(torch.where(finite, value, old))

    def _reseeded(
        self, codebook: Tensor, counts: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let codes that are hardly used begin anew, with an equal share of the latents."""
        seeds, self._seeds = self._seeds, None
        assert seeds is not None
        keys, latents = seeds[:, 0], seeds[:, 1:]
        share = counts.mean()
        dead = counts < self.reseed * share
        nth = (dead.cumsum(0) - 1).clamp_min(0)
        begins = (dead & keys[nth].isfinite())[:, None]
        return (
            torch.where(begins, latents[nth], codebook),
            torch.where(begins[:, 0], share, counts),
            torch.where(begins, latents[nth] * share, sums),
        )

    def _keep(self, seeds: Tensor) -> None:
        """Keep the smallest keys, one for each code; infinite ones where there are too few."""
        if self._seeds is not None:
            seeds = torch.cat([self._seeds, seeds])
        missing = max(self.num_codes - len(seeds), 0)
        seeds = F.pad(seeds, (0, 0, 0, missing), value=math.inf)
        smallest = seeds[:, 0].topk(self.num_codes, largest=False, sorted=True).indices
        self._seeds = seeds[smallest]


def straight_through(values: Tensor, encoded: Tensor) -> Tensor:
    """`values` to the last bit, with the gradient of `encoded` (Bengio et al. 2013)."""
    return values + (encoded - encoded.detach())


def vectors(z: Tensor) -> Tensor:
    """The vectors `(n, C)` of a latent `(B, C, *spatial)`."""
    return z.movedim(1, -1).flatten(0, -2)


def quantized(
    values: Tensor, codes: Tensor, num_codes: int, encoded: Tensor | None = None
) -> Quantized:
    """`Quantized` with the variance that it has, none."""
    logvar = values.new_full((), -math.inf).expand_as(values)
    return Quantized(values, logvar, codes, num_codes, encoded)
