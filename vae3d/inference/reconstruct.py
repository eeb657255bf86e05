"""Volumes to latents and back: in one full pass, in blended patches, or exactly in bounded memory.

A reconstruction is what the latent of the volume decodes to, in every mode: the latent that is
measured, exported and diffused is the one that made the picture. In mode patch the latents of
overlapping patches are blended into one, and that one is decoded, in overlapping patches again.
(Blending reconstructions of patches instead would take 8 times the latent values at an overlap of
one half.) A 2D model codes a volume slice by slice; its latent keeps the axis that is sliced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loaders import VolumeStore
from vae3d.exact.executor import (
    WORTH_TELLING,
    check_budget,
    check_size,
    decode_exact,
    encode_exact,
    half_of_free,
)
from vae3d.inference.costs import BOTH, What, cost, gib, no_exact
from vae3d.inference.stitching import BLENDS, check_patch, overlap_voxels, stitch, tile_faces
from vae3d.kernels import large
from vae3d.kernels.device import bytes_taken, free_bytes
from vae3d.kernels.large import Lazy, Values, held, room, whole_of
from vae3d.kernels.precision import AMP, Amp, autocast
from vae3d.kernels.progress import is_watched, part, passed
from vae3d.models.attention import Attention
from vae3d.models.blocks import Block
from vae3d.models.custom_vae import Chain, CustomVAE
from vae3d.models.downsample import Down
from vae3d.models.upsample import Up

MODES = ("auto", "full", "patch", "exact")
MOST_TOGETHER = 32  # inputs of a forward pass on a GPU, which has enough to do by then
SHARE_OF_VOLUMES = 0.25  # of a GPU's free memory, for volumes beside the network's own tensors
SHARE_OF_BATCH = 0.5
ENCODING = 0.4  # of the time of both halves, for the progress
T = TypeVar("T")
Pass = Callable[[CustomVAE, Tensor], Tensor | tuple[Tensor, Tensor]]

# What one input takes on a GPU [bytes], by what is done with it and its shape.
_taken: WeakKeyDictionary[CustomVAE, dict[tuple, int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Choice:
    """What mode auto takes for a volume.

    Args:
        mode: full | exact | patch.
        why: What speaks against a cheaper one; empty where nothing does.
    """

    mode: str
    why: str = ""


@dataclass(frozen=True)
class Coding:
    """How a volume goes through a VAE.

    Args:
        mode: full (one pass) | patch (overlapped patches, blended) | exact (equal to full, layer by
            layer in bounded memory) | auto (full where it fits in memory, else exact; patch where
            both are refused).
        patch_size: Patch in voxels for mode patch, a multiple of the model's factor.
        overlap: Overlap of neighboring patches: fraction of the patch (float) or voxels (int), one
            or one per axis.
        blend: hann | gaussian | average | crop.
        batch_size: Patches in a forward pass, or slices of a 2D model; None for one on the CPU, on
            a GPU for as many as its free memory takes.
        memory_gb: Memory budget of modes exact and auto in GiB, of the device that the model is on;
            None takes half of what is free.
        amp: off | bf16 | fp16, precision of convolutions and matrix products; off leaves it to the
            context. Mode exact is exact: off.
        slice_axis: For a 2D model: the axis that slices are cut across.
        num_slices: For a 2D model: neighboring slices that are its input channels.
    """

    mode: str = "full"
    patch_size: Sequence[int] | None = None
    overlap: float | int | Sequence = 0.5
    blend: str = "hann"
    batch_size: int | None = None
    memory_gb: float | None = None
    amp: Amp = "off"
    slice_axis: int = 2
    num_slices: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.mode == "patch" and self.patch_size is None:
            raise ValueError("mode patch needs patch_size, for example '[64,64,64]'")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more")
        if self.amp not in AMP:
            raise ValueError(f"amp {self.amp!r} is unknown; choose one of {', '.join(AMP)}")
        if self.amp != "off" and self.mode == "exact":
            raise ValueError(f"mode exact computes in float32; leave out amp {self.amp}")
        check_budget(self.memory_gb)
        if self.slice_axis not in (0, 1, 2) or self.num_slices not in range(1, 2**16, 2):
            raise ValueError(
                f"slice_axis is {self.slice_axis} and num_slices {self.num_slices}: use 0 to 2, and"
                " an odd number"
            )
        if self.blend not in BLENDS:
            raise ValueError(f"blend {self.blend!r} is unknown; choose one of {', '.join(BLENDS)}")

    def choice(self, vae: CustomVAE, shape: Sequence[int], what: Sequence[What] = BOTH) -> Choice:
        """The mode for a volume: its own, or the cheapest exact one that fits, else patches.

        Args:
            vae: The model, in eval mode on its device.
            shape: Spatial shape of the volume.
            what: Which halves of the model are used.

        Raises:
            ValueError: Mode auto finds that nothing fits.
        """
        if self.mode != "auto":
            return Choice(self.mode)
        if self.memory_gb is None and math.prod(self.plane(vae, shape)) < WORTH_TELLING:
            return Choice("full")
        free = half_of_free(_home(vae)) if self.memory_gb is None else self.memory_gb * 2**30
        needed = self.full_bytes(vae, shape, what)
        if needed <= free:
            return Choice("full")
        why = f"a full pass takes about {gib(needed)} of the {gib(free)} that it may"
        refused = no_exact(vae, self.amp)
        if refused is None:
            return Choice("exact", why)
        if self.patch_size is None:
            raise ValueError(f"{why}, and {refused}; give --patch_size, or more --memory_gb")
        return Choice("patch", f"{why}, and {refused}")

    def settled(self, vae: CustomVAE, shape: Sequence[int], what: Sequence[What] = BOTH) -> Coding:
        """The same in the mode of `choice`."""
        return replace(self, mode=self.choice(vae, shape, what).mode)

    def full_bytes(self, vae: CustomVAE, shape: Sequence[int], what: Sequence[What]) -> float:
        """Memory of a full pass at its peak, weights and the volume apart, by two small ones."""
        voxels = math.prod(self.plane(vae, shape))
        return max(cost(vae, half).bytes(voxels) for half in what)

    def plane(self, vae: CustomVAE, shape: Sequence[int]) -> list[int]:
        """Spatial shape of what goes through a model at once: a volume, or a slice of it."""
        sliced = len(shape) > vae.spatial_dims
        return [n for i, n in enumerate(shape) if not (sliced and i == self.slice_axis)]

    def facts(self) -> dict:
        """What the latents depend on, JSON-able; `Coding(**facts)` decodes alike."""
        names = ["mode", "slice_axis", "num_slices"]
        if self.mode == "patch":
            names += ["patch_size", "overlap", "blend"]
        if self.amp != "off":
            names += ["amp"]
        facts = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}

    @torch.no_grad()
    def encode(self, vae: CustomVAE, x: Values, name: str = "the volume") -> tuple[Tensor, Tensor]:
        """Posterior of a volume.

        Args:
            vae: The model, in eval mode.
            x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized as the model was trained; any device. Modes
                patch and exact read a `Lazy` one piece by piece.
            name: Of the volume, for messages.

        Returns:
            mean and logvar, `(C', *spatial)`, float32 on the device of `x`.

        Raises:
            ValueError: It is not finite.
        """
        if self.mode == "auto":
            return self.settled(vae, x.shape[1:], ("encode",)).encode(vae, x, name)
        if isinstance(x, Lazy):
            x = x.map(lambda part: check_finite(part, name))
        else:
            check_finite(x, name)
        near = _near(vae, x, 4 * math.prod(x.shape))
        with self._precision(vae):
            sliced = x.ndim == 4 and vae.spatial_dims == 2
            mean, logvar = (self._encode_slices if sliced else self._encode)(vae, near)
        home = torch.device("cpu") if isinstance(x, Lazy) else x.device
        return mean.to(home), logvar.to(home)

    @torch.no_grad()
    def decode(
        self, vae: CustomVAE, z: Tensor, size: Sequence[int] | None = None,
        name: str = "the latent", folder: Path | None = None,
    ) -> Tensor:  # fmt: skip
        """Reconstruction of a latent, of a network with a codebook that of its nearest codes.

        Args:
            vae: The model, in eval mode.
            z: `(C', *spatial)`, as `encode` gives its mean; any device.
            size: Voxels per axis of the volume; None for those of the latent times the factor.
            name: Of the latent, for messages.
            folder: Where modes patch and exact may put a large volume, out of memory; None for
                nowhere.

        Returns:
            `(C, *size)`, normalized intensities, float32 on the device of `z`.

        Raises:
            ValueError: It is not finite.
        """
        check_finite(z, name)
        if vae.head.num_codes:
            z = vae.snapped(z[None].to(_home(vae)))[0].to(z.device)
        return self.decode_as_it_is(vae, z, size, folder)

    @torch.no_grad()
    def decode_as_it_is(
        self, vae: CustomVAE, z: Tensor, size: Sequence[int] | None = None,
        folder: Path | None = None,
    ) -> Tensor:  # fmt: skip
        """`decode` of a latent that nobody has looked at."""
        factor = self.factor(vae, z.ndim - 1)
        size = size or [n * f for n, f in zip(z.shape[1:], factor, strict=True)]
        if self.mode == "auto":
            return self.settled(vae, size, ("decode",)).decode_as_it_is(vae, z, size, folder)
        near = whole_of(_near(vae, z, 4 * vae.in_channels * math.prod(size)))
        with self._precision(vae):
            sliced = z.ndim == 4 and vae.spatial_dims == 2
            x = (self._decode_slices if sliced else self._decode)(vae, near, size, folder)
        return x.to(z.device)

    def _encode(self, vae: CustomVAE, x: Values) -> tuple[Tensor, Tensor]:
        """Posterior of a volume of as many axes as the model has."""
        if self.mode == "exact":
            posterior = encode_exact(vae, x, self.memory_gb)
            return posterior.mean.float(), posterior.logvar.float()
        if self.mode == "full":
            with telling_of_layers(vae, "encoder"):
                mean, logvar = _posterior(vae, whole_of(x)[None])
            return mean[0], logvar[0]
        scale = [Fraction(1, f) for f in vae.factor]
        patch, overlap = self._tiling(vae)
        together = self._together(vae, _posterior, (x.shape[0], *patch))
        options = (patch, overlap, self.blend, together)
        if vae.head.num_codes:  # blended before they are codes: means of two codes are none
            moments = stitch(lambda batch: _moments(vae, batch), x, *options, scale=scale)
            posterior = vae.head(moments[None].to(_home(vae)))
            mean, logvar = (t[0].to(moments.device) for t in (posterior.mean, posterior.logvar))
        else:
            mean, logvar = stitch(lambda batch: _posterior(vae, batch), x, *options, scale=scale)
        return mean, logvar

    def _decode(
        self, vae: CustomVAE, z: Tensor, size: Sequence[int], folder: Path | None = None
    ) -> Tensor:
        """Reconstruction of a latent of as many axes as the model has."""
        decoded = (vae.out_channels, *(n * f for n, f in zip(z.shape[1:], vae.factor, strict=True)))
        if 4 * math.prod(decoded) <= large.LARGE:
            folder = None
        if self.mode == "exact":
            check_size(size, decoded[1:])
            out = room((vae.out_channels, *size), folder) if folder else None
            return decode_exact(vae, z, self.memory_gb, size=size, out=out).float()
        if self.mode == "full":
            with telling_of_layers(vae, "decoder"):
                x = _volume(vae, z[None])[0]
        else:
            tiling = self._tiling(vae)
            tile, overlap = ([n // f for n, f in zip(s, vae.factor, strict=True)] for s in tiling)
            together = self._together(vae, _volume, (len(z), *tile))
            options = (tile, overlap, self.blend, together)
            scale, out = list(vae.factor), room(decoded, folder) if folder else None
            x = stitch(lambda batch: _volume(vae, batch), z, *options, scale=scale, out=out)
        check_size(size, x.shape[1:])
        return x[(slice(None), *(slice(n) for n in size))]

    def _encode_slices(self, vae: CustomVAE, x: Values) -> tuple[Tensor, Tensor]:
        """Posterior of a volume by a 2D model, slice by slice."""
        axis, count = 1 + self.slice_axis, x.shape[1 + self.slice_axis]
        if self.mode == "full":
            plane = [n for i, n in enumerate(x.shape) if i not in (0, axis)]
            together = self._together(vae, _posterior, (self.num_slices * x.shape[0], *plane))
            batches = []
            for first in range(0, count, together):
                numbers = range(first, min(first + together, count))
                batch = torch.stack([self._stack(x, number) for number in numbers])
                batches.append(_posterior(vae, batch))
                passed(len(numbers) / count)
            mean, logvar = (torch.cat(part).movedim(0, axis) for part in zip(*batches, strict=True))
        else:
            parts = []
            for number in range(count):
                with part(1 / count):
                    parts.append(self._encode(vae, self._stack(x, number)))
            mean, logvar = (torch.stack(part, axis) for part in zip(*parts, strict=True))
        return mean.contiguous(), logvar.contiguous()

    def _stack(self, x: Values, number: int) -> Tensor:
        """A slice of a volume and its neighbors as channels; beyond an end the last again."""
        axis, half = 1 + self.slice_axis, self.num_slices // 2
        last = x.shape[axis] - 1
        near = torch.arange(number - half, number + half + 1).clamp(0, last)
        box = [slice(None)] * 4
        box[axis] = slice(int(near[0]), int(near[-1]) + 1)
        return x[tuple(box)].movedim(axis, 0)[near - near[0]].flatten(0, 1)

    def _decode_slices(
        self, vae: CustomVAE, z: Tensor, size: Sequence[int], folder: Path | None = None
    ) -> Tensor:
        """Reconstruction of a latent by a 2D model, slice by slice."""
        axis = 1 + self.slice_axis
        plane = [n for i, n in enumerate(size) if i != self.slice_axis]
        crop = (slice(None), slice(None), *(slice(n) for n in plane))
        latents = z.movedim(axis, 0)
        together = self._together(vae, _volume, latents.shape[1:]) if self.mode == "full" else 1
        out, done = torch.empty(0), 0
        for piece in latents.split(together):
            with part(len(piece) / len(latents)):
                if self.mode == "full":
                    planes = _volume(vae, piece)
                    check_size(plane, planes.shape[2:])
                else:
                    planes = self._decode(vae, piece[0], plane)[None]
            for one in planes[crop]:
                middle = self._middle(vae, one)
                if not done:
                    out = room((len(middle), *size), folder if z.device.type == "cpu" else None)
                    out = out.to(middle.device)
                out.select(axis, done).copy_(middle)
                done += 1
        return out

    def factor(self, vae: CustomVAE, dims: int) -> list[int]:
        """Voxels per latent voxel and axis; a 2D model does not shrink the axis that is sliced.

        Args:
            vae: The model.
            dims: Spatial axes of the latents.
        """
        factor = list(vae.factor)
        if dims > len(factor):
            factor.insert(self.slice_axis, 1)
        return factor

    def check(self, vae: CustomVAE) -> None:
        """Refuse patches that do not go with a model, before anything is read or written."""
        if self.mode in ("patch", "auto") and self.patch_size is not None:
            check_patch(self.patch_size, vae.factor)
            ends = [1] * vae.spatial_dims
            tile_faces(ends, self.patch_size, self.overlap, self.blend)  # overlap < patch

    def slices_of(self, vae: CustomVAE) -> int:
        """Slices of a volume that become input channels of the model."""
        return self.num_slices if vae.spatial_dims == 2 else 1

    def _tiling(self, vae: CustomVAE) -> tuple[Sequence[int], Sequence[int]]:
        """Patch and overlap in whole latent voxels, so that both ways have the same tiles."""
        assert self.patch_size is not None  # said on the way in, in mode patch
        check_patch(self.patch_size, vae.factor)
        return self.patch_size, overlap_voxels(self.patch_size, self.overlap, vae.factor)

    def _precision(self, vae: CustomVAE) -> AbstractContextManager:
        """Context of the forward passes; without `amp` that of the caller, such as validation's."""
        return nullcontext() if self.amp == "off" else autocast(_home(vae), self.amp)

    def _together(self, vae: CustomVAE, run: Pass, shape: Sequence[int]) -> int:
        """Inputs of a shape that go through the network at once: as asked, or as memory allows."""
        device = _home(vae)
        if self.batch_size is not None or device.type != "cuda":
            return self.batch_size or 1
        key = run, tuple(shape), torch.is_autocast_enabled("cuda")
        taken = _taken.setdefault(vae, {})
        if key not in taken:
            taken[key] = bytes_taken(
                lambda: run(vae, torch.zeros(1, *shape, device=device)), device
            )
        return fitting(taken[key], free_bytes(device))

    def _middle(self, vae: CustomVAE, plane: Tensor) -> Tensor:
        """Of a reconstruction of neighboring slices `(n C, X, Y)`, the middle one."""
        if len(plane) < vae.in_channels:
            return plane  # the model gives one slice for several
        channels = len(plane) // self.num_slices
        first = self.num_slices // 2 * channels
        return plane[first : first + channels]


def mode_of(mode: str, **patching: object) -> tuple[str, list[str]]:
    """Mode patch in the place of auto where the options of patches are given, and a line on it.

    Args:
        mode: As asked for.
        **patching: Options of patches; None where they are not given.
    """
    given = " and ".join(f"--{name}" for name, value in patching.items() if value is not None)
    if mode != "auto" or not given:
        return mode, []
    return "patch", [f"mode patch, as {given} asks for patches; without it mode is auto"]


def check_finite(values: Tensor, name: str) -> Tensor:
    """Refuse a volume or latent, or a part of it, that is not finite; else give it back.

    Statistics of norms would make all of it NaN, and without norms the sums over four rows at once,
    which serve at inference, would carry it to rows that it does not touch.
    """
    if not (finite := values.isfinite()).all():
        count = values.numel() - int(finite.sum())
        raise ValueError(f"{name}: {count} of {values.numel()} values are NaN or infinite")
    return values


def of_training(config: dict) -> dict:
    """How volumes went through the network in training, as the usual options of `coding_of`.

    Args:
        config: Of the run, as its checkpoints hold it.
    """
    slicing = {name: config["data"][name] for name in ("slice_axis", "num_slices")}
    return {"patch_size": config["patch_size"], **slicing}


def coding_of(
    usual: dict, mode: str | None = None, patching: dict | None = None, **given: object
) -> tuple[Coding, list[str]]:
    """The `Coding` that a user asks for, and what there is to tell about it.

    Latents of patches are decoded in patches. Of a full pass and of mode exact the latents are the
    same, and decoding takes more memory than encoding, so mode auto chooses between the two.

    Args:
        usual: Options where nothing is asked for: what latents say of their origin, or those of
            training. What is no option of `Coding` is left aside.
        mode: As asked for; None for that.
        patching: Options of patches as asked for; None for the usual.
        **given: Further options of `Coding`.
    """
    names = {field.name for field in fields(Coding)}
    kept: dict = {k: v for k, v in usual.items() if k in names}
    made = "patch" if kept.get("mode") == "patch" else "auto"
    patching = {k: v for k, v in (patching or {}).items() if v is not None}
    kept["mode"], lines = mode_of(mode or made, **patching)
    kept.update(patching | given)
    return Coding(**kept), lines


def volume_of(store: VolumeStore, index: int, folder: Path | None = None) -> Values:
    """A volume of a store; a large one is read where it is sliced.

    Args:
        store: Volumes.
        index: Which of them.
        folder: Where a large one that lies in chunks, perhaps in a bucket, is unpacked for those
            who read it many times; None to read its chunks each time.
    """
    shape = store.shape(index)
    if 4 * math.prod(shape) <= large.LARGE:
        return torch.from_numpy(store.read(index))
    lazy = Lazy(shape, lambda box: torch.from_numpy(store.read(index, box[1:]))[box[0]])
    chunks = store.chunks(index)
    if folder is None or chunks is None:
        return lazy
    return Lazy.of(held(lazy, folder, chunks))


def reconstruct(vae: CustomVAE, x: Tensor, mode: str = "patch", **how: Any) -> Tensor:
    """The reconstruction of one volume through the posterior mean.

    Args:
        vae: The model, in eval mode.
        x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized as the model was trained; any device.
        mode: auto | full | patch | exact.
        **how: Further options of `Coding`.

    Returns:
        `(C, X, Y, Z)` float32 on the device of `x`.
    """
    return autoencode(vae, x, mode, **how)[0]


def autoencode(
    vae: CustomVAE, x: Values, mode: str = "patch", name: str = "the volume",
    folder: Path | None = None, **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Reconstruct one volume through the posterior mean, and return the posterior as well.

    Args:
        vae: The model, in eval mode.
        x: `(C, X, Y, Z)` or `(C, X, Y)`, normalized as the model was trained; any device.
        mode: auto | full | patch | exact.
        name: Of the volume, for messages.
        folder: Where a large reconstruction may lie, out of memory; None for nowhere.
        **how: Further options of `Coding`.

    Returns:
        recon `(C, X, Y, Z)`, and mean and logvar of the latent; float32 on the device of `x`.
    """
    coding = Coding(mode, **how)
    coding = coding.settled(vae, x.shape[1:])
    with part(ENCODING):
        mean, logvar = coding.encode(vae, x, name)
    with part(1 - ENCODING):
        # What a network that has diverged makes of it is measured, not refused.
        recon = coding.decode_as_it_is(vae, mean, x.shape[1:], folder)
    return recon, mean, logvar


def fitting(each: int, free: int) -> int:
    """How many inputs go through the network together.

    Args:
        each: What one takes [bytes].
        free: What is free [bytes].
    """
    return max(1, min(int(SHARE_OF_BATCH * free) // max(each, 1), MOST_TOGETHER))


@contextmanager
def telling_of_layers(vae: CustomVAE, half: Literal["encoder", "decoder"]) -> Iterator[None]:
    """Let half of a model tell how far a pass has come, by the products of its convolutions.

    Only layers of several steps tell: a hook on a convolution would keep it from its fast path.
    """
    chain = getattr(vae, half, None)
    if not is_watched() or not isinstance(chain, Chain):  # a network of another library
        yield
        return
    scale, works = 1.0, []
    for layer in chain:
        factor = math.prod(getattr(layer, "factor", (1,)))
        before = scale
        scale = scale * factor if isinstance(layer, Up) else scale / factor
        works.append(sum(p.numel() for p in layer.parameters()) * max(before, scale))
    whole = sum(works) or 1
    told = [
        layer.register_forward_hook(lambda *_, done=work / whole: passed(done))
        for layer, work in zip(chain, works, strict=True)
        if isinstance(layer, (Block, Attention, Up, Down))
    ]
    try:
        yield
    finally:
        for hook in told:
            hook.remove()


def _near(vae: CustomVAE, volume: Values, nbytes: int) -> Values:
    """A volume on the model's GPU, if it and as much as `nbytes` beside it are little there."""
    device = _home(vae)
    if device.type != "cuda" or (isinstance(volume, Tensor) and volume.device == device):
        return volume
    fits = 4 * math.prod(volume.shape) + nbytes <= SHARE_OF_VOLUMES * free_bytes(device)
    return whole_of(volume).to(device) if fits else volume


def _posterior(vae: CustomVAE, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logvar of a batch, float32 where the batch is."""
    posterior = vae.encode(batch.to(_home(vae)))
    return posterior.mean.float().to(batch.device), posterior.logvar.float().to(batch.device)


def _moments(vae: CustomVAE, batch: Tensor) -> Tensor:
    """What the head makes the posterior of, float32 where the batch is."""
    return vae.moments(vae.pad(batch.to(_home(vae)))).float().to(batch.device)


def _volume(vae: CustomVAE, batch: Tensor) -> Tensor:
    """What a batch of latents decodes to, float32 where the batch is."""
    return vae.decode(batch.to(_home(vae))).float().to(batch.device)


def _home(vae: CustomVAE) -> torch.device:
    return next(vae.parameters()).device
