"""`vae3d export CHECKPOINT DIR`: encoder and decoder as programs of torch.export and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    checkpoint: str,
    folder: Path,
    /,
    formats: tuple[Literal["torch", "onnx"], ...] = ("torch", "onnx"),
    patch_size: tuple[int, ...] | None = None,
    ema: bool = True,
    trust: tuple[str, ...] = (),
) -> None:
    """Write encoder and decoder as programs that run without vae3d, and how to prepare volumes.

        vae3d export runs/a deployed
        vae3d export hf://owner/name deployed --formats '[onnx]'

    `encoder` takes a volume whose sizes are multiples of the factor and gives the posterior's mean
    and the log of its variance; `decoder` takes a latent and gives the reconstruction. Where there
    is a codebook both are codes. Sizes stay free where the network allows it. `contract.json` tells
    how the weights want their volumes prepared, the factor and the latent's scale. Each program is
    run once and held against the network.

    Args:
        checkpoint: Run folder, checkpoint file or folder of save_pretrained, or hf://owner/name.
        folder: Where to; must not exist.
        formats: torch (encoder.pt2, decoder.pt2 for torch.export.load), onnx.
        patch_size: Size that the network is traced at [voxels], a multiple of its factor; null for
            that of training.
        ema: Take the averaged weights where there are some.
        trust: Module prefixes besides vae3d whose classes the checkpoint may import.
    """
    from vae3d.inference.export import export_programs
    from vae3d.training.checkpoint import load_vae

    if folder.exists():
        raise ValueError(f"{folder} exists; remove it or choose another name")
    if not formats:
        raise ValueError("formats is empty: name torch, onnx or both")
    vae = load_vae(checkpoint, ema=ema, trust=trust)
    known = (vae.contract or {}).get("patch_size")
    size = patch_size or known or tuple(4 * f for f in vae.factor)
    programs = export_programs(vae, folder, formats, size)
    for file, told in programs.items():
        sizes = "any size" if told["sizes"] == "free" else f"only 1 x {tuple(size)}"
        print(f"{folder / file}: {sizes}, differs by {told['largest_difference']:.1e} at most")
    print(f"{folder / 'contract.json'}: how volumes are prepared")
