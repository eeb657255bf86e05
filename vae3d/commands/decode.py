"""`vae3d decode latents --checkpoint runs/a --out_dir out`: latents to volumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from vae3d.models.custom_vae import CustomVAE


def decode(
    latents: str,
    /,
    checkpoint: str,
    out_dir: str,
    split: Literal["train", "val", "test", "all"] = "all",
    mode: Literal["auto", "full", "patch", "exact"] | None = None,
    patch_size: tuple[int, ...] | None = None,
    overlap: int | float | None = None,
    blend: Literal["hann", "gaussian", "average", "crop"] | None = None,
    memory_gb: float | None = None,
    amp: Literal["off", "bf16", "fp16"] = "off",
    recon_format: Literal["ome-zarr", "nifti", "tiff"] | None = None,
    sharding: Literal["spatial"] | None = None,
    slab_axis: Literal["x", "y", "z"] = "x",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    trust: tuple[str, ...] = (),
) -> None:
    """Turn latents back into volumes in the original format, intensities, grid and affine.

        vae3d decode latents --checkpoint runs/a --out_dir decoded

    Decodes posterior means, or the codes where the files have some, in the way they were encoded
    unless told otherwise; then the volumes are those that `evaluate.py` reconstructs. The files
    need neither the volumes nor their cache. Under torchrun ranks share the latents out.

    Args:
        latents: Folder that `vae3d encode` wrote, or one of its files.
        checkpoint: Run folder, checkpoint file or folder of save_pretrained of the VAE that
            encoded them, or hf://owner/name.
        out_dir: Where `<subject>.nii.gz` (`.ome.zarr`, `.ome.tif`, `.png`) go.
        split: Only subjects of this part of the split.
        mode: auto | full | patch | exact; null for patch where they were encoded in patches or its
            options are given, else auto, the cheaper of full and exact that fits in memory.
        patch_size: Patch in voxels for mode patch; null for that of encoding.
        overlap: Overlap of neighboring patches: below 1 a fraction of the patch, else [voxels];
            null as encoded.
        blend: How overlapping patches are mixed; null as encoded.
        memory_gb: Memory budget of modes exact and auto on the device [GiB]; null for half of what
            is free.
        amp: off | bf16 | fp16, precision of convolutions and matrix products.
        recon_format: ome-zarr | nifti | tiff, what the volumes are written as; null for what came
            in.
        sharding: spatial (ranks share each volume, cut into slabs, in mode full) | null (they share
            the volumes out).
        slab_axis: x | y | z, the axis along which they are cut; the longest is the best.
        device: auto | cpu | cuda | mps.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
    """
    from loaders.undo import write_undone
    from vae3d.inference.estimate import told
    from vae3d.inference.reconstruct import coding_of
    from vae3d.stage2.latents import check_header, find_latents, read_info, read_latent
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import SMALLER_PASSES, telling_of_device
    from vae3d.training.shares import Shares, cut_along

    path = Path(latents)
    paths = [path] if path.is_file() else find_latents(path, None if split == "all" else split)
    info = read_info(paths[0])
    check_header(info, paths[0])
    made_by = info["made_by"]
    patching = dict(patch_size=patch_size, overlap=overlap, blend=blend)
    coding, lines = coding_of(made_by, mode, patching, memory_gb=memory_gb, amp=amp)
    vae = load_encoder(checkpoint, made_by, trust)
    coding.check(vae)
    coding, axis = cut_along(coding, vae, sharding, slab_axis)
    with open_world(device) as world, telling_of_device(*SMALLER_PASSES):
        vae.to(world.device)
        shares = Shares(vae, world, len(paths), axis)
        sizes = {i: size_of(paths[i], made_by) for i in shares.mine}
        if world.is_main:
            cost = told(coding, vae, [*sizes.values()], ("decode",), shares.team.size)
            print(*lines, cost, sep="\n", flush=True)
        with shares.at_work("decode", sizes) as work:
            for index, size in sizes.items():
                path = paths[index]
                latent = read_latent(path)
                z = latent.mean if latent.codes is None else values_of(vae, latent.codes, path)
                with work.on(index):
                    x = coding.decode(vae, z, size, str(path), Path(out_dir))
                record = latent.info["source"]["undo"]
                print(write_undone(Path(out_dir), path.stem, x, record, recon_format))


def values_of(vae: CustomVAE, codes: Tensor, path: Path) -> Tensor:
    """What the codes of a file stand for, `(C, *spatial)`; refuse those of no codebook of `vae`."""
    known = vae.head.num_codes
    if int(codes.min()) < 0 or int(codes.max()) >= known:
        raise ValueError(f"{path}: has codes beyond the {known} of the codebook; encode it again")
    home = next(vae.parameters()).device
    return vae.head.values(codes[None].long().to(home))[0].cpu()


def size_of(path: Path, made_by: dict) -> list[int]:
    """Voxels of the volume of a latent, by its header, which has to be of the same model."""
    from vae3d.stage2.latents import check_header, read_info

    info = read_info(path)
    check_header(info, path)
    if info["made_by"]["checkpoint"] != made_by["checkpoint"]:
        raise ValueError(f"{path}: from another model than the first; encode them anew")
    return info["volume_shape"][1:]


def load_encoder(checkpoint: str, made_by: dict, trust: tuple[str, ...] = ()) -> CustomVAE:
    """Load the VAE that wrote some latents; refuse another one.

    Args:
        checkpoint: Run folder or checkpoint file.
        made_by: What the latents say of their origin.
        trust: Module prefixes whose classes may be imported.
    """
    from vae3d.training.checkpoint import load_checkpoint

    return encoder_of(load_checkpoint(checkpoint), checkpoint, made_by, trust)


def encoder_of(
    state: dict[str, Any], checkpoint: str, made_by: dict, trust: tuple[str, ...] = ()
) -> CustomVAE:
    """`load_encoder` from a checkpoint that was read."""
    from vae3d.commands.encode import weights_hash
    from vae3d.training.checkpoint import vae_of

    vae = vae_of(state, checkpoint, made_by["ema"], trust)
    if weights_hash(vae) != made_by["checkpoint"]:
        raise ValueError(
            f"{checkpoint}: not the weights that wrote the latents (theirs are of step "
            f"{made_by['step']}); name that checkpoint, or encode again"
        )
    return vae
