"""A volume's file to its latent and back, in the grid and the intensities of the file.

    vae = vae3d.load_model("runs/a")                 # or a folder or repository of save_pretrained
    latent = vae3d.encode_file(vae, "scan.nii.gz")   # latent.mean is (C, X, Y, Z)
    write_volume("again.nii.gz", vae3d.decode_file(vae, latent))

How the file is prepared stands in `vae.contract`, which comes with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from loaders import Preprocess, VolumeStore
from loaders.readers import Reading
from loaders.undo import undo
from vae3d.inference.reconstruct import Coding, coding_of, volume_of

if TYPE_CHECKING:
    from loaders import Volume
    from vae3d.models.custom_vae import CustomVAE


@dataclass(frozen=True)
class Encoded:
    """The latent of one file.

    Args:
        mean: Posterior mean, `(C, X, Y, Z)` float32, as the encoder gives it.
        logvar: Log of the posterior variance, same shape.
        info: What leads back to the file, and affine and spacing_mm of the latent grid; JSON-able,
            as in the files of `vae3d encode`.
        codes: Places in the codebook, `(codes of a latent voxel, X, Y, Z)` int64, of a network with
            one; `mean` has their values.
    """

    mean: Tensor
    logvar: Tensor
    info: dict
    codes: Tensor | None = None


def encode_file(vae: CustomVAE, path: str | Path, mode: str = "auto", **how: object) -> Encoded:
    """Encode one volume, prepared as those that the network was trained on.

    Args:
        vae: From `load_model` or `from_pretrained`.
        path: Any file that `loaders.read_volume` reads.
        mode: auto (full where it fits in memory, else exact) | full | patch | exact.
        **how: Further options of `Coding`.
    """
    known = vae.contract or {}
    data = known.get("data") or {}
    slicing = {k: data[k] for k in ("slice_axis", "num_slices") if k in data}
    coding = Coding(mode, **{"patch_size": known.get("patch_size"), **slicing, **how})
    prepared = Preprocess.of_checkpoint(known.get("preprocess"))
    with TemporaryDirectory() as cache:
        store = VolumeStore.build(
            [path],
            cache,
            prepared,
            progress=False,
            reading=Reading.of(data),
            in_channels=vae.in_channels,
            num_slices=coding.slices_of(vae),
        )
        if len(store) > 1:
            raise ValueError(
                f"{path}: a series of {len(store)} time points: encode it by `vae3d encode`"
            )
        x = volume_of(store, 0)
        coding = coding.settled(vae, x.shape[1:], ("encode",))
        mean, logvar = coding.encode(vae, x, str(path))
        info = latent_info(store, 0, coding.factor(vae, x.ndim - 1))
    return Encoded(mean, logvar, {**info, "made_by": coding.facts()}, codes_of(vae, mean))


def codes_of(vae: CustomVAE, z: Tensor) -> Tensor | None:
    """Codes nearest to a latent `(C, *spatial)`, on its device; None without a codebook."""
    if not vae.head.num_codes:
        return None
    return vae.head.codes(z[None].to(next(vae.parameters()).device))[0].to(z.device)


def decode_file(vae: CustomVAE, latent: Encoded, mode: str | None = None, **how: object) -> Volume:
    """Decode a latent onto the grid of the file that it was made of, in its intensities.

    Args:
        vae: The network that encoded it.
        latent: What `encode_file` returned, with its `mean` or another in its place, or what
            `stage2.latents.read_latent` read.
        mode: auto | full | patch | exact; None for patch where it was encoded in patches, else
            auto.
        **how: Further options of `Coding` that shall differ from those of encoding.

    Returns:
        Float32 intensities with the file's affine, as `loaders.write_volume` takes them.
    """
    coding, _ = coding_of(latent.info["made_by"], mode, None, **how)
    x = coding.decode(vae, latent.mean, latent.info["volume_shape"][1:])
    return undo(x.cpu().numpy(), latent.info["source"]["undo"])


def latent_info(store: VolumeStore, index: int, factor: list[int]) -> dict[str, object]:
    """Where a latent lies in space, and what leads from it back to the file.

    Args:
        store: Volumes.
        index: Which of them was encoded.
        factor: Voxels per latent voxel.
    """
    record = store.undo_record(index)
    spacing = zip(store.spacing_mm(index), (*factor, 1), strict=False)
    return {
        "subject": store.ids[index],
        "affine": latent_affine(record["affine"], factor).tolist(),
        "spacing_mm": [mm * f for mm, f in spacing],
        "factor": factor,
        "volume_shape": list(store.shape(index)),
        "intensity": store.preprocess.channel(0).intensity,  # the channel that pictures show
        "source": {"fingerprint": store.meta(index)["key"], "undo": record},
    }


def latent_affine(affine: Any, factor: Sequence[int]) -> np.ndarray:
    """Affine (4, 4) of a latent grid: voxel 0 is centered on the first `factor` voxels.

    Args:
        affine: Of the encoded volume, voxel to mm.
        factor: Voxels per latent voxel, two or three axes.
    """
    step = np.ones(3)
    step[: len(factor)] = factor
    to_voxel = np.diag([*step, 1.0])
    to_voxel[:3, 3] = (step - 1) / 2
    return np.asarray(affine, dtype=np.float64) @ to_voxel
