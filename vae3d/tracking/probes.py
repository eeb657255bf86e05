"""What the latent space of a VAE holds, as pictures and numbers, measured on fixed volumes.

Pictures: how a reconstruction changes with the posterior's noise, the way between two volumes,
decoded draws from N(0, 1) and from a Gaussian fitted to the latents, the latents themselves, and
their distribution per channel.

    probes = LatentProbes([x_a, x_b], patch_size=(64, 64, 64), data_range=(0, 1))
    measured = probes.measure(vae)                     # a few forward passes on the model's device
    tracker.log(measured.numbers, step)
    tracker.in_background(probes.draw, measured, folder, step=step)

Measuring leaves the global random state alone, so a run with probes trains as one without.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageDraw

from loaders.layout import Layout
from vae3d.tracking.media import (
    BACKGROUND,
    FAINT,
    GAP,
    TEXT,
    center_of_mass,
    error_colors,
    even,
    font,
    gray_colors,
    resize,
    write_png,
)

NOISE = (0.0, 0.25, 0.5, 1.0, 2.0)  # multiples of the posterior's std
BETWEEN = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # share of the second volume
DRAWS = 6
Slices = dict[str | int, np.ndarray]  # by label; a number is not drawn
ACTIVE_NATS = 0.01  # a channel with less KL per latent element says nothing about its input


class Posterior(Protocol):
    """What a volume is encoded to: a Gaussian for each latent element, or codes.

    Codes have a `use` (perplexity, part of the codebook), a std of 0 and no KL divergence.
    """

    @property
    def mean(self) -> torch.Tensor:
        """`(B, C, *spatial)`."""

    @property
    def std(self) -> torch.Tensor:
        """Same shape."""

    def kl(self, reduction: Literal["none"]) -> torch.Tensor:
        """KL divergence of each latent element from N(0, 1) [nats]."""


@runtime_checkable
class Coded(Protocol):
    """A posterior of codes."""

    def use(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Perplexity of the codes, and the part of the codebook that occurs."""


class Autoencoder(Protocol):
    """What the probes ask of a model."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Weights, which say where and how precise the model is."""

    def encode(self, x: torch.Tensor) -> Posterior:
        """Posterior of `(B, C, *spatial)`."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction of a latent."""


@dataclass
class Measured:
    """What `LatentProbes.measure` found; slices are float32 `(W, H)` through the middle of z.

    Args:
        numbers: Scalars for the log.
        noise: Decodings of mean + s x std, for s in `NOISE`; empty for codes.
        between: Decodings between two volumes; empty with one volume.
        prior: Decodings of draws from N(0, 1); empty for codes.
        fitted: Decodings of draws from the Gaussian fitted to the latents; empty for codes.
        latents: Posterior mean per channel, of the first volume.
        values: Posterior means, `(C, n)`, of all volumes.
        std: Posterior std, `(C, n)`; empty for codes.
        kl: KL of each latent element [nats], `(C, n)`; empty for codes.
    """

    numbers: dict[str, float]
    noise: list[np.ndarray]
    between: list[np.ndarray]
    prior: list[np.ndarray]
    fitted: list[np.ndarray]
    latents: list[np.ndarray]
    values: np.ndarray
    std: np.ndarray
    kl: np.ndarray

    @property
    def nbytes(self) -> int:
        """Memory that a waiting drawing job holds."""
        slices = (*self.noise, *self.between, *self.prior, *self.fitted, *self.latents)
        return sum(array.nbytes for array in (self.values, self.std, self.kl, *slices))


class LatentProbes:
    """Looks into the latent space of a VAE with a few fixed volumes.

    Args:
        volumes: One or more inputs `(C, X, Y, Z)` or `(C, X, Y)`, normalized as in training.
        patch_size: Each volume is cut to this size round its center of mass [voxels]; None keeps it
            whole, which has to fit into memory.
        spacing_mm: Voxel size, for the proportions of the pictures.
        data_range: Intensities drawn black and white.
        seed: Of the draws, the same at every call.
        layout: Which way is up; see `VolumeStore.layout`.
    """

    def __init__(
        self,
        volumes: Sequence[torch.Tensor],
        patch_size: Sequence[int] | None = None,
        spacing_mm: Sequence[float] | None = None,
        data_range: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        layout: Layout | None = None,
    ):
        if not len(volumes):
            raise ValueError("latent probes need at least one volume")
        self.patches = [cut_patch(torch.as_tensor(x), patch_size) for x in volumes]
        if len({x.shape for x in self.patches}) > 1:  # whole volumes of different sizes
            shapes = [x.shape[1:] for x in self.patches]
            smallest = [min(sizes) for sizes in zip(*shapes, strict=True)]
            self.patches = [cut_patch(x, smallest) for x in self.patches]
        self.layout = layout or Layout()
        (_, self.axis), *_ = self.layout.planes(
            self.layout.arranged(self.patches[0].numpy()).shape[1:]
        )
        sizes = self.layout.spacing(spacing_mm)
        self.spacing = tuple(size for axis, size in enumerate(sizes) if axis != self.axis)
        self.data_range, self.seed = data_range, seed

    @torch.no_grad()
    def measure(self, vae: Autoencoder) -> Measured:
        """Encode the volumes and decode all probes, one at a time; slices go to the CPU.

        Args:
            vae: The model, in eval mode on its device.
        """
        like = next(vae.parameters())
        posteriors = [vae.encode(x[None].to(like.device, like.dtype)) for x in self.patches]
        means = torch.cat([p.mean.float() for p in posteriors])
        uses = [p.use() for p in posteriors if isinstance(p, Coded)]
        spread = [] if uses else posteriors
        stds = torch.cat([means[:0], *(p.std.float() for p in spread)])
        kl = torch.cat([means[:0], *(p.kl("none").float() for p in spread)])
        noise = torch.Generator().manual_seed(self.seed)

        def decode(z: torch.Tensor) -> np.ndarray:
            return self._middle(vae.decode(z.to(like.dtype))[0, :1].float())

        def draw(shape: torch.Size) -> torch.Tensor:
            return torch.randn(shape, generator=noise).to(like.device)

        first, last = means[:1], means[-1:]
        eps = draw(first.shape)
        values = means.transpose(0, 1).flatten(1)  # (C, n)
        center, root = _fit(values)
        z_prior = [draw(first.shape) for _ in range(DRAWS)]
        center = center.reshape(1, -1, *(1,) * (first.ndim - 2))
        z_fitted = [torch.einsum("ij,bj...->bi...", root, z) + center for z in z_prior]
        stds, kl = (t.transpose(0, 1).flatten(1) for t in (stds, kl))
        if uses:
            both = torch.tensor(uses).mean(0).tolist()
            numbers = dict(zip(("latent/perplexity", "latent/usage"), both, strict=True))
        else:
            numbers = {
                "latent/kl": float(kl.mean()),
                "latent/channels": float(len(kl)),
                "latent/active_channels": float((kl.mean(dim=1) > ACTIVE_NATS).sum()),
                "latent/mean_std": float(values.std(dim=1).mean()),
                "latent/posterior_std": float(stds.mean()),
            }
        return Measured(
            numbers=numbers,
            noise=[decode(first + s * p.std.float() * eps) for p in spread[:1] for s in NOISE],
            between=[decode(first + t * (last - first)) for t in BETWEEN * (len(means) > 1)],
            prior=[decode(z) for z in z_prior if not uses],
            fitted=[decode(z) for z in z_fitted if not uses],
            latents=[self._middle(channel[None]) for channel in first[0]],
            values=values.cpu().numpy(),
            std=stds.cpu().numpy(),
            kl=kl.cpu().numpy(),
        )

    def draw(self, measured: Measured, folder: Path | str) -> dict[str, Path]:
        """Draw everything as PNG into `folder`; return the files by panel name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        between = zip((f"{t:.0%}" for t in BETWEEN), measured.between, strict=False)
        noise = zip((f"s {s:g}" for s in NOISE), measured.noise, strict=False)
        rows: dict[str, dict[str, Slices]] = {
            "noise": {"mean + s x std": dict(noise)},
            "between": {"between two volumes": dict(between)},
            "draws": {
                "draws from N(0, 1)": dict(enumerate(measured.prior)),
                "draws from the fitted Gaussian": dict(enumerate(measured.fitted)),
            },
        }
        pictures = {name: self._strip(row) for name, row in rows.items() if all(row.values())}
        pictures["slices"] = self._latents(measured)
        if measured.kl.size:
            pictures["channels"] = draw_channels(measured)
        return {
            f"latent/{name}": write_png(folder / f"latent_{name}.png", picture)
            for name, picture in pictures.items()
        }

    def _strip(self, rows: Mapping[str, Slices], width: int = 150) -> np.ndarray:
        """Rows of gray slices, a title above each row and a label in each slice."""
        lo, hi = self.data_range
        size = self._size(next(iter(next(iter(rows.values())).values())).shape, width)
        count = max(map(len, rows.values()))
        height = GAP + len(rows) * (size[1] + 22 + GAP)
        canvas = Image.new("RGB", even(GAP + count * (size[0] + GAP), height), BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        for r, (title, slices) in enumerate(rows.items()):
            y = GAP + r * (size[1] + 22 + GAP)
            pen.text((GAP, y - 2), title, TEXT, font(13))
            for k, (label, values) in enumerate(slices.items()):
                x = GAP + k * (size[0] + GAP)
                gray = gray_colors(resize(self.layout.upright((values - lo) / (hi - lo)), size))
                canvas.paste(Image.fromarray(gray), (x, y + 20))
                if isinstance(label, str):
                    pen.text((x + 4, y + 22), label, TEXT, font(11), stroke_width=1, stroke_fill=0)
        return np.asarray(canvas)

    def _latents(self, measured: Measured, width: int = 150, columns: int = 8) -> np.ndarray:
        """The posterior mean of every channel, on one color scale that holds nearly all of it."""
        end = float(np.quantile(np.abs(measured.values), 0.995)) or 1.0
        size = self._size(measured.latents[0].shape, width)
        rows = -(-len(measured.latents) // columns)
        wide = min(len(measured.latents), columns)
        whole = even(max(GAP + wide * (size[0] + GAP), 330), 34 + rows * (size[1] + GAP))
        canvas = Image.new("RGB", whole, BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        title = f"posterior mean per channel, -{end:.3g} to +{end:.3g}"
        pen.text((GAP, GAP - 2), title, TEXT, font(13))
        for c, values in enumerate(measured.latents):
            x = GAP + c % columns * (size[0] + GAP)
            y = 30 + c // columns * (size[1] + GAP)
            picture = Image.fromarray(error_colors(self.layout.upright(values / end)))
            canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
            pen.text((x + 4, y + 2), str(c), TEXT, font(11), stroke_width=1, stroke_fill=0)
        return np.asarray(canvas)

    def _middle(self, volume: torch.Tensor) -> np.ndarray:
        """`(1, X, Y, Z)` or `(1, X, Y)` -> the plane in the middle, as float32 on the CPU."""
        arranged = self.layout.arranged(volume.cpu().numpy())[0]
        return np.take(arranged, arranged.shape[self.axis] // 2, self.axis)

    def _size(self, shape: tuple[int, int], width: int) -> tuple[int, int]:
        return width, max(2, round(width * shape[1] * self.spacing[1] / shape[0] / self.spacing[0]))


def draw_channels(measured: Measured, scale: int = 2) -> np.ndarray:
    """Histograms of each channel's posterior mean (over N(0, 1)), posterior std and KL."""
    count, blocks = len(measured.kl), 1 if len(measured.kl) <= 8 else 2
    w, h, pad, top = 230, 84, 38, 34
    rows = -(-count // blocks)
    size = even(GAP + 3 * blocks * (w + GAP), top + rows * (h + pad))
    canvas = Image.new("RGB", (size[0] * scale, size[1] * scale), BACKGROUND)  # drawn at twice
    pen = ImageDraw.Draw(canvas)
    end = 4 * max(1.0, float(measured.values.std(axis=1).max()))
    std_end, kl_end = (float(np.quantile(v, 0.998)) or 1.0 for v in (measured.std, measured.kl))
    columns = (  # values, lowest, highest, unit
        ("mean", measured.values, -end, end, "(line: N(0, 1))"),
        ("posterior std", measured.std, 0.0, std_end, ""),
        ("KL", measured.kl, 0.0, kl_end, "nats"),
    )
    for place in range(3 * blocks):
        name, _, low, high, unit = columns[place % 3]
        title = f"{name}, {low:.3g} to {high:.3g} {unit}"
        at = ((GAP + place * (w + GAP)) * scale, 8 * scale)
        pen.text(at, title, TEXT, font(13 * scale))
    for c in range(count):
        active = measured.kl[c].mean() > ACTIVE_NATS
        for k, (_, values, low, high, _) in enumerate(columns):
            left = GAP + (3 * (c // rows) + k) * (w + GAP)
            bottom = top + c % rows * (h + pad) + h
            box = [v * scale for v in (left, bottom - h, left + w, bottom)]
            _histogram(pen, box, values[c], low, high, active, normal=k == 0)
            mean, std = values[c].mean(), values[c].std()
            both = f"channel {c}   mean {mean:+.2f}   std {std:.2f}"
            text = both if k == 0 else f"mean {mean:.3g}"
            text += "   inactive" if k == 2 and not active else ""
            pen.text((left * scale, (bottom + 5) * scale), text, FAINT, font(11 * scale))
    return np.asarray(canvas.resize(size, Image.Resampling.LANCZOS))


def _histogram(pen: ImageDraw.ImageDraw, box: list[int], values: np.ndarray, low: float,
               high: float, active: bool, normal: bool) -> None:  # fmt: skip
    """Bars of the density of `values`, what lies outside in the outermost; N(0, 1) as a line."""
    left, top, right, bottom = box
    edges = np.linspace(low, high, 65)
    middles = (edges[1:] + edges[:-1]) / 2
    density, _ = np.histogram(np.clip(values, low, high), edges, density=True)
    curve = np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi)
    x = left + (middles - low) / (high - low) * (right - left)
    tall = (bottom - top) / max(density.max(), curve.max() if normal else 0)
    half = (right - left) / 130
    for xi, d in zip(x, density, strict=True):
        pen.rectangle([xi - half, bottom - d * tall, xi + half, bottom], BARS if active else DEAD)
    if normal:
        pen.line(list(zip(x, bottom - curve * tall, strict=True)), TEXT, 2)
    pen.line([(left, bottom), (right, bottom)], FAINT)


BARS, DEAD = (52, 140, 226), (90, 94, 104)


def cut_patch(x: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    """Cut `(C, *spatial)` to `size` round its center of mass; axes that are smaller stay."""
    if size is None:
        return x
    if len(size) != x.ndim - 1:
        raise ValueError(f"patch_size {tuple(size)} has another number of axes than {x.shape[1:]}")
    center = center_of_mass((x - x.min()).numpy())
    for axis, (c, n, p) in enumerate(zip(center, x.shape[1:], size, strict=True), start=1):
        p = min(n, p)
        x = x.narrow(axis, min(max(c - p // 2, 0), n - p), p)
    return x.contiguous()


def _fit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(C,)` and a root `(C, C)` of the covariance of `(C, n)`."""
    covariance = torch.atleast_2d(torch.cov(values.cpu().double()))  # MPS has no float64
    power, axes = torch.linalg.eigh(covariance)
    root = axes * power.clamp(min=0).sqrt()  # the covariance is root @ root.T
    return values.mean(dim=1), root.to(values.dtype).to(values.device)
