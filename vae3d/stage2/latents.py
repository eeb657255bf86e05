"""Latents of whole volumes on disk: what stage 1 hands to stage 2.

    latents/
      latents.json                statistics over all files, encoding, subjects
      IXI013.safetensors          mean and logvar (C, X, Y, Z) float32, and what they belong to;
                                  codes int32 in the place of logvar where there is a codebook

A file keeps the posterior, never a draw from it: sampling and scaling happen when it is read. Its
header holds the affine and spacing of the latent grid, the subject and its labels, where it came
from, and the moments of its own values, so the statistics of a folder are merged from headers
alone, in the order of names: any number of ranks writes the same bytes as one.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loaders.texts import load_json, misfit, read_json
from loaders.whole import whole_file, write_text
from vae3d.tracking.media import case_stem

if TYPE_CHECKING:
    from safetensors import safe_open

FORMAT = "vae3d latents 1"
INDEX = "latents.json"
# What a latent says of itself, and an index of its files; see `loaders.texts.misfit`.
MADE_BY = {"checkpoint": str, "step": int, "ema": bool, "mode": str}
ABOUT = {"split": (str, None), "labels": {str: str}, "shape": [int], "crc32": int}
UNDO = {
    **{key: [float] for key in ("gain", "bias", "scale", "offset")},
    "affine": [[float]],
    "geometry": {"source_affine": [[float]]},
    "background": ([float], float),
}
HEADER = {
    **ABOUT,
    "subject": str,
    "spacing_mm": [float],
    "factor": [int],
    "volume_shape": [int],
    "moments": {"count": int, "mean": [float], "squares": [float], "noise": [float]},
    "source": {"fingerprint": str, "undo": UNDO},
    "made_by": MADE_BY,
}
PARTS = [{"mean", "logvar"}, {"mean", "codes"}]  # tensors of a file
NEEDED = ("shape", "moments", "crc32")  # that `write_latent` adds
INDEX_SHAPE = {
    "vae": str,
    "made_by": {},
    "subjects": {str: ABOUT},
    "statistics": {
        str: {
            **{key: [float] for key in ("mean", "std", "std_of_means", "noise_share")},
            **dict.fromkeys(("total_noise_share", "scaling_factor"), float),
            **dict.fromkeys(("subjects", "count"), int),
        }
    },
}
OPEN_LATENTS = 512  # kept in memory; a latent of 4 x 32^3 with its log-variance takes 1 MB


@dataclass(frozen=True)
class Latent:
    """The latent of one volume.

    Args:
        mean: Posterior mean, `(C, X, Y, Z)` or `(C, X, Y)`, float32, as the encoder gives it.
        logvar: Log of the posterior variance, same shape.
        info: What the header says: subject, split, labels, affine, spacing_mm, source, ...
        codes: Places in the codebook, `(codes of a latent voxel, X, Y, Z)` int32, whose values
            `mean` has; None where the latent is no code. Then `logvar` is minus infinity.
    """

    mean: Tensor
    logvar: Tensor
    info: dict[str, Any]
    codes: Tensor | None = None

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the posterior, `mean + std * noise`."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + torch.exp(self.logvar / 2) * noise


def latent_path(folder: str | Path, subject: str) -> Path:
    """File of a subject; names that a file cannot bear are percent-encoded."""
    return Path(folder) / f"{case_stem(subject)}.safetensors"


def write_latent(
    path: Path, mean: Tensor, logvar: Tensor, info: dict[str, Any], codes: Tensor | None = None
) -> None:
    """Write a latent so that `path` is whole or absent at any moment.

    Args:
        path: The file.
        mean: Posterior mean `(C, *spatial)`.
        logvar: Log of the posterior variance `(C, *spatial)`.
        info: JSON-able; `shape`, `moments` and a checksum are added.
        codes: `(codes of a latent voxel, *spatial)` where `mean` has their values; written in the
            place of `logvar`.

    Raises:
        ValueError: The latent holds values that are not finite.
    """
    from safetensors.torch import save

    tensors = {"mean": _plain(mean)}
    if codes is None:
        tensors["logvar"] = _plain(logvar)
    else:
        tensors["codes"] = codes.detach().to("cpu", torch.int32).contiguous()
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"{path}: the latent holds NaN or infinity; the checkpoint is broken")
    header = {
        "format": FORMAT,
        **info,
        "shape": list(mean.shape),
        "moments": moments(_plain(mean), _plain(logvar)),
        "crc32": _checksum(*tensors.values()),
    }
    # One key: safetensors keeps several in an order that changes from process to process.
    data = save(tensors, metadata={"vae3d": json.dumps(header, sort_keys=True)})
    with whole_file(path, durable=True) as temporary:
        temporary.write_bytes(data)


def read_info(path: str | Path) -> dict[str, Any]:
    """Read the header of a latent file; the tensors stay on the disk."""
    with _open(path) as file:
        return _header(file, path)


def read_latent(path: str | Path) -> Latent:
    """Read a latent file and verify its checksum.

    Raises:
        ValueError: Missing, damaged, or not a latent file.
    """
    with _open(path) as file:
        info = _header(file, path)
        mean = file.get_tensor("mean")
        codes = file.get_tensor("codes") if "codes" in {*file.keys()} else None
        beside = file.get_tensor("logvar") if codes is None else codes
    like = mean if codes is None else mean[0]
    if not (list(mean.shape) == info["shape"] and beside.shape[-like.ndim :] == like.shape):
        raise ValueError(f"{path}: damaged, not of the shape it tells; delete it and encode again")
    if _checksum(mean, beside) != info["crc32"]:
        raise ValueError(f"{path}: damaged, its checksum is wrong; delete it and encode again")
    logvar = torch.full_like(mean, -math.inf) if codes is not None else beside
    return Latent(mean, logvar, info, codes)


def find_latents(folder: str | Path, split: str | None = None) -> list[Path]:
    """Latent files of a folder in the order of their names.

    Args:
        folder: What `vae3d encode` wrote.
        split: Only subjects of this part of the split (train, val or test); None for all.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder}: holds no latents; write some with vae3d encode")
    if split is None:
        return paths
    chosen = [p for p in paths if read_info(p)["split"] == split]
    if not chosen:
        raise ValueError(f"{folder}: none of {len(paths)} latents is of split {split!r}")
    return chosen


def moments(mean: Tensor, logvar: Tensor) -> dict[str, Any]:
    """Count, mean, sum of squared deviations and posterior variance per channel, in float64."""
    found: dict[str, list[float]] = {"mean": [], "squares": [], "noise": []}
    for ours, spread in zip(mean, logvar, strict=True):  # latents may be large
        values = ours.to(torch.float64, copy=True)
        center = values.mean()
        found["mean"].append(float(center))
        found["squares"].append(float(values.sub_(center).square_().sum()))
        found["noise"].append(float(spread.to(torch.float64, copy=True).exp_().sum()))
    return {"count": mean[0].numel(), **found}


@dataclass(frozen=True)
class Statistics:
    """Per-channel statistics of the latents of a set, over all voxels of all its files.

    Args:
        subjects: Number of files.
        count: Latent voxels per channel.
        mean: Mean per channel.
        std: Standard deviation per channel of draws: spread of the means plus posterior variance.
        std_of_means: Standard deviation per channel of the posterior means alone.
        noise_share: Part of the variance per channel that is posterior noise; near 1 is a dead
            channel.
        total_noise_share: The same over all channels.
        scaling_factor: One over the standard deviation of all values of all channels, the single
            number of latent-diffusion codes.
    """

    subjects: int
    count: int
    mean: list[float]
    std: list[float]
    std_of_means: list[float]
    noise_share: list[float]
    total_noise_share: float
    scaling_factor: float

    @classmethod
    def merge(cls, parts: Iterable[dict[str, Any]]) -> Statistics:
        """Merge the `moments` of files, exactly and in one pass (Chan et al. 1979).

        Args:
            parts: One dictionary of `moments` per file.
        """
        files, count, mean, squares, noise = 0, 0, *np.zeros((3, 1))
        for part in parts:
            files += 1
            added, total = part["count"], count + part["count"]
            delta = np.asarray(part["mean"]) - mean
            mean = mean + delta * (added / total)
            squares = squares + np.asarray(part["squares"]) + delta**2 * (count * added / total)
            noise = noise + np.asarray(part["noise"])
            count = total
        of_means, of_noise = squares / count, noise / count
        variance = of_means + of_noise
        some = np.where(variance > 0, variance, 1.0)  # 0 for a channel of codes that are all alike
        overall = variance.mean() + mean.var()  # the channels' means differ, too
        return cls(
            subjects=files,
            count=count,
            mean=mean.tolist(),
            std=np.sqrt(variance).tolist(),
            std_of_means=np.sqrt(of_means).tolist(),
            noise_share=(of_noise / some).tolist(),
            total_noise_share=float(of_noise.sum() / (variance.sum() or 1.0)),
            scaling_factor=float(1 / np.sqrt(overall or 1.0)),
        )

    def standardize(self, z: Tensor) -> Tensor:
        """Bring a latent `(C, *spatial)` to mean 0 and standard deviation 1 per channel."""
        return (z - _per_channel(self.mean, z)) / _per_channel(self.std, z)

    def restore(self, z: Tensor) -> Tensor:
        """Undo `standardize`."""
        return z * _per_channel(self.std, z) + _per_channel(self.mean, z)


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).reshape(-1, *(1,) * (like.ndim - 1))


def write_index(folder: str | Path, made_by: dict[str, Any], vae: str = "") -> dict[str, Any]:
    """Write `latents.json` from the headers of all files and return it.

    Statistics are kept over all files and over each part of the split; the second stage takes
    those of the training subjects, where there are some, so that nothing of the others leaks.

    Args:
        folder: Where the latents are.
        made_by: Checkpoint, mode and the like; every file must agree. Where its mode is auto, the
            index tells that of the files, or auto where they differ.
        vae: Where the checkpoint lies, for who decodes.
    """
    paths = find_latents(folder)
    infos = [read_info(path) for path in paths]
    for path, info in zip(paths, infos, strict=True):
        if not made_alike(info["made_by"], made_by):
            raise ValueError(
                f"{path}: written by another model or mode than the rest; delete it or encode into "
                "another folder"
            )
    if all(info["made_by"] == infos[0]["made_by"] for info in infos):
        made_by = infos[0]["made_by"]
    parts = {"all": infos}
    for name in sorted({info["split"] for info in infos if info["split"]}):
        parts[name] = [info for info in infos if info["split"] == name]
    index = {
        "format": FORMAT,
        "vae": vae,
        "made_by": made_by,
        "statistics": {
            name: asdict(Statistics.merge(info["moments"] for info in part))
            for name, part in parts.items()
        },
        "subjects": {
            info["subject"]: {k: info[k] for k in ("split", "labels", "shape", "crc32")}
            for info in infos
        },
    }
    write_text(Path(folder) / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def made_alike(by: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a latent was made as wanted; mode auto wants any mode."""
    if wanted.get("mode") != "auto":
        return by == wanted
    return all(by.get(name) == value for name, value in wanted.items() if name != "mode")


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read the `latents.json` of a folder."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: missing; write or finish the folder with vae3d encode")
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; run vae3d encode again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: not an index of latents; run vae3d encode again")
    if found := misfit(index, INDEX_SHAPE) or misfit(index, {"statistics": {"all": {}}}):
        raise ValueError(f"{path}: damaged ({found}); run vae3d encode again")
    return index


def read_statistics(folder: str | Path) -> Statistics:
    """Statistics that the second stage uses: of the training subjects, else of all."""
    kept = read_index(folder)["statistics"]
    return Statistics(**kept.get("train", kept["all"]))


class LatentDataset(Dataset):
    """Latents of a folder, drawn from their posteriors when they are read.

    A draw is a function of (seed, epoch, index) alone: it depends neither on the order of reading
    nor on workers or ranks, and each epoch brings new ones.

    Args:
        folder: What `vae3d encode` wrote.
        split: Part of the split (train, val or test); None for all.
        draw: Draw `mean + std * noise`; False gives the mean.
        standardize: Bring each channel to mean 0 and standard deviation 1 with the statistics of
            the folder (`statistics`); `statistics.restore` undoes it.
        seed: Of the draws.

    Example:
        >>> dataset = LatentDataset("latents", split="train")  # doctest: +SKIP
        >>> dataset[0].shape  # doctest: +SKIP
        torch.Size([4, 30, 30, 23])
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        *,
        draw: bool = True,
        standardize: bool = True,
        seed: int = 0,
    ):
        self.paths = find_latents(folder, split)
        self.infos = [read_info(path) for path in self.paths]
        self.subjects = [info["subject"] for info in self.infos]
        self.statistics = read_statistics(folder)
        self.draw, self.standardize = draw, standardize
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the noise."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Latent `(C, *spatial)` number `index`."""
        latent = read_latent(self.paths[index])
        z = latent.mean
        if self.draw:
            z = latent.draw(keyed_generator(self.seed, self.epoch, index))
        return self.statistics.standardize(z) if self.standardize else z


class LatentStore:
    """Latents as a store of volumes, for `loaders.PatchLoader`: channels are mean, then logvar.

    Args:
        folder: What `vae3d encode` wrote.
        subjects: Their names, in this order; None for all of `split`.
        split: Part of the split (train, val or test); None for all.
    """

    def __init__(
        self, folder: str | Path, subjects: Sequence[str] | None = None, split: str | None = None
    ):
        by_name = {info["subject"]: (p, info) for p in find_latents(folder, split)
                   for info in [read_info(p)]}  # fmt: skip
        if missing := [name for name in subjects or [] if name not in by_name]:
            raise ValueError(f"{folder}: has no latent of {missing[0]!r}; encode it, too")
        chosen = [by_name[name] for name in subjects or by_name]
        self.paths, self.infos = [p for p, _ in chosen], [info for _, info in chosen]
        self.statistics = read_statistics(folder)
        lists = (part for part in vars(self.statistics).values() if isinstance(part, list))
        widths = {*map(len, lists), *(info["shape"][0] for info in self.infos)}
        if len(widths) > 1:
            raise ValueError(f"{folder}: its files have {sorted(widths)} channels; encode it again")
        self.spatial_shapes = np.array([info["shape"][1:] for info in self.infos])
        self.array = lru_cache(OPEN_LATENTS)(self._open)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def ids(self) -> list[str]:
        """Names of the subjects."""
        return [info["subject"] for info in self.infos]

    @property
    def num_channels(self) -> int:
        """Channels of mean and logvar together."""
        return 2 * self.infos[0]["shape"][0]

    def shape(self, index: int) -> tuple[int, ...]:
        """(2 C, *spatial) of a latent with its log-variance."""
        channels, *spatial = self.infos[index]["shape"]
        return (2 * channels, *spatial)

    def spacing_mm(self, index: int) -> tuple[float, ...]:
        """Size of a latent voxel in millimeters."""
        return tuple(self.infos[index]["spacing_mm"])

    def labels(self, index: int) -> dict[str, str]:
        """Manifest columns of a subject."""
        return self.infos[index]["labels"]

    def read(self, index: int, slices: Sequence[slice] = ()) -> np.ndarray:
        """Mean and logvar `(2 C, *spatial)`, or a part of them."""
        return self.array(index)[(slice(None), *slices)]

    def read_into(self, index: int, slices: Sequence[slice], out: np.ndarray) -> None:
        """Read as `read` into a float32 buffer."""
        out[...] = self.read(index, slices)

    def foreground_points(self, index: int) -> np.ndarray:
        """Refuse: no voxels of foreground or labels are remembered with latents."""
        raise ValueError("latents know no foreground and no labels: sample them by UniformCorners")

    def label_points(self, index: int) -> dict[int, np.ndarray]:
        """See `foreground_points`."""
        raise ValueError("latents know no foreground and no labels: sample them by UniformCorners")

    def _open(self, index: int) -> np.ndarray:
        latent = read_latent(self.paths[index])
        return torch.cat([latent.mean, latent.logvar]).numpy()


def keyed_generator(*key: int) -> torch.Generator:
    """Random numbers that are a function of `key` alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _checksum(mean: Tensor, beside: Tensor) -> int:
    return zlib.crc32(beside.numpy().data, zlib.crc32(mean.numpy().data))


def _open(path: str | Path) -> safe_open:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such latent file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a latent file, or cut short ({error}); delete it and encode again"
        ) from error


def _header(file: safe_open, path: str | Path) -> dict[str, Any]:
    info = load_json((file.metadata() or {}).get("vae3d", "{}"), f"{path}: its header")
    whole = any(parts <= {*file.keys()} for parts in PARTS)
    if not isinstance(info, dict) or info.get("format") != FORMAT or not whole:
        raise ValueError(f"{path}: a safetensors file, but not one that vae3d encode wrote")
    lent = HEADER | {"made_by": {}, "source": {}}  # who writes latents in Python may say less
    check_header(info, path, {k: v for k, v in lent.items() if k in info or k in NEEDED})
    return info


def check_header(info: object, path: str | Path, shape: object = HEADER) -> None:
    """Refuse what a latent says of itself, if it does not lead back to a volume.

    Args:
        info: Its header.
        path: Its file, for the message.
        shape: What it has to be, see `loaders.texts.misfit`.
    """
    if found := misfit(info, shape):
        raise ValueError(f"{path}: its header is damaged ({found}); delete it and encode again")
