"""The encoder and the decoder as programs that run without this package: torch.export and ONNX.

The only importer of onnx and onnxruntime, and of torch's exporters.

Axes: (B, C, X, Y, Z).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from loaders.whole import whole_file
from vae3d.inference.stitching import check_patch
from vae3d.kernels.steps import plain
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import Quantized

Format = Literal["torch", "onnx"]
Program = Callable[[Tensor], tuple[Tensor, ...]]
SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}
CONTRACT = "contract.json"
TOLERANCE = 1e-4  # of the largest value: what two implementations of one convolution differ by
TIES = 1e-3  # part of the codes: such a difference decides between two that are as near
REFUSALS = (torch._dynamo.exc.UserError, ValueError, RuntimeError, AssertionError)
LARGEST = 2**12  # latent elements per axis, and samples, that a program promises to take


class Told(TypedDict):
    """What is known of a program: `free` or `fixed` sizes, and how far it is from the network."""

    sizes: str
    largest_difference: float


class Encoder(nn.Module):
    """Volume, of sizes that are multiples of the factor, to mean and log-variance, or to codes."""

    def __init__(self, vae: CustomVAE):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Posterior of `(B, C, *spatial)`: its mean and the log of its variance, or its codes."""
        posterior = self.vae.encode(x)
        if isinstance(posterior, Quantized):
            return (posterior.codes,)
        return posterior.mean, posterior.logvar


class Decoder(nn.Module):
    """Latent, or codes, to reconstruction."""

    def __init__(self, vae: CustomVAE):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> tuple[Tensor]:
        """Reconstruction of `(B, C, *spatial)`."""
        return (self.vae.decode(self.vae.head.values(z) if self.vae.head.num_codes else z),)


def export_programs(
    vae: CustomVAE, folder: Path, formats: Sequence[Format], patch_size: Sequence[int]
) -> dict[str, Told]:
    """Write `encoder` and `decoder` in each format, and `contract.json` beside them.

    Batch and spatial sizes stay free where the network allows it (attention over windows and the
    like may not); else both are those of `patch_size` and one sample, and the contract says so.
    Each program is run, and its numbers are held against the network's.

    Args:
        vae: The network, in evaluation mode.
        folder: Where to; must not exist.
        formats: torch (`.pt2`, for `torch.export.load`) and onnx.
        patch_size: Size of the example per axis [voxels], a multiple of the factor.

    Returns:
        What is known of each file.

    Raises:
        ValueError: A network that cannot be exported, or a program with other numbers.
    """
    vae = vae.cpu().float().eval().requires_grad_(False)
    check_patch(patch_size, vae.factor)
    latent = [n // f for n, f in zip(patch_size, vae.factor, strict=True)]
    generator = torch.Generator().manual_seed(0)
    parts = {
        "encoder": (Encoder(vae), vae.in_channels, vae.factor),
        "decoder": (Decoder(vae), vae.latent_channels, (1,) * len(latent)),
    }
    known = vae.contract or {}
    programs: dict[str, Told] = {}
    contract = {
        "spatial_dims": vae.spatial_dims,
        "in_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "factor": list(vae.factor),
        "latent_scale": vae.latent_scale,
        "latent_shift": vae.latent_shift,
        "num_codes": vae.head.num_codes,
        "preprocess": known.get("preprocess"),
        "patch_size": list(patch_size),
        "programs": programs,
    }
    with whole_file(folder) as temporary, plain(), torch.no_grad():
        temporary.mkdir()
        for name, (network, channels, step) in parts.items():
            size = [n * f for n, f in zip(latent, step, strict=True)]
            example = torch.rand(1, channels, *size, generator=generator)
            more = [n + f for n, f in zip(size, step, strict=True)]
            larger = torch.rand(2, channels, *more, generator=generator)
            if name == "decoder" and vae.head.num_codes:
                example, larger = vae.head.codes(example), vae.head.codes(larger)
            exported, sizes = traced(network, example, larger, step)
            tests = [example, larger] if sizes == "free" else [example]
            for form in formats:
                file = f"{name}{SUFFIX[form]}"
                program = WRITERS[form](exported, temporary / file)
                difference = max(compare(file, network, program, x) for x in tests)
                programs[file] = {"sizes": sizes, "largest_difference": difference}
        (temporary / CONTRACT).write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    return programs


def traced(
    network: nn.Module, example: Tensor, larger: Tensor, step: Sequence[int]
) -> tuple[torch.export.ExportedProgram, str]:
    """Trace a network for any size, or for that of the example where it allows no other.

    Args:
        network: Encoder or decoder.
        example: One sample.
        larger: Two samples, a step larger along each axis.
        step: What sizes are multiples of, per axis.

    Returns:
        The program, and `free` or `fixed`.
    """
    axes = {2 + i: f * torch.export.Dim("xyz"[i], max=LARGEST) for i, f in enumerate(step)}
    axes[0] = torch.export.Dim("batch", max=LARGEST)
    try:
        # Traced with two samples: one would be taken for a constant.
        both = torch.cat([example, example])
        free = torch.export.export(network, (both,), dynamic_shapes=(axes,))
        free.module()(larger)  # sizes that a window does not divide fail here, not before
        return free, "free"
    except REFUSALS:
        try:
            return torch.export.export(network, (example,)), "fixed"
        except REFUSALS as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"the network cannot be exported: {first}") from error


def write_torch(exported: torch.export.ExportedProgram, path: Path) -> Program:
    """Write for `torch.export.load`; return what the file holds."""
    torch.export.save(exported, path)
    return torch.export.load(path).module()


def write_onnx(exported: torch.export.ExportedProgram, path: Path) -> Program:
    """Write as ONNX; return what ONNX Runtime makes of the file."""
    try:
        import onnx  # noqa: F401 - torch's exporter needs it, and its message does not name us
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs `pip install 'vae3d[export]'` ({error.name})") from error

    made = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert made is not None, "with dynamo=True it returns a program"
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: tuple(torch.from_numpy(y) for y in session.run(None, {name: x.numpy()}))


WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path], Program]] = {
    "torch": write_torch,
    "onnx": write_onnx,
}


def compare(file: str, network: nn.Module, program: Program, x: Tensor) -> float:
    """Run both and return the largest difference over the largest value; refuse a large one.

    Of codes it is the part of them that differ.
    """
    worst = 0.0
    for theirs, ours in zip(program(x), network(x), strict=True):
        if theirs.shape != ours.shape:
            raise ValueError(f"{file}: gives {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        if not ours.is_floating_point():
            worst = float((theirs != ours).double().mean())
            if worst > TIES:
                raise ValueError(f"{file}: {worst:.1%} of its codes are not the network's")
            return worst
        scale = float(ours.abs().max()) or 1.0
        worst = max(worst, float((theirs - ours).abs().max()) / scale)
    if not worst <= TOLERANCE:
        raise ValueError(f"{file}: differs from the network by {worst:.1e} of the largest value")
    return worst
