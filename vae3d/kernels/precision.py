"""Precision of convolutions and matrix products: what is asked for, and what float32 means.

float32 means float32: a GPU's convolutions round their operands to the 10 bits of TF32 only where
that is asked for, by torch's own switch for matrix products: `torch.set_float32_matmul_precision`
("high") in a script, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 before a command.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Amp = Literal["off", "bf16", "fp16"]
AMP: dict[Amp, torch.dtype] = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Context in which the networks run in the precision `amp`.

    Args:
        device: Where they are.
        amp: off | bf16 | fp16.
    """
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


def settle_float32() -> None:
    """Let convolutions follow what is asked for matrix products; torch alone gives them TF32."""
    asked = torch.get_float32_matmul_precision() != "highest"
    torch.backends.cudnn.allow_tf32 = asked


def faults_of_conv3d(device: torch.device, amp: Amp) -> list[str]:
    """What is known to go wrong with 3D convolutions in this build of torch, a line each.

    Args:
        device: Where they run.
        amp: off | bf16 | fp16.
    """
    if device.type != "cuda":
        return []
    cudnn = torch.backends.cudnn.version() or 0
    name = f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    better = "install nvidia-cudnn 9.16 or later"
    lines = []
    if amp == "bf16" and 90800 <= cudnn < 91300:
        lines.append(f"{name}: bf16 can give wrong sums (pytorch#163539); {better}")
    if amp == "off" and torch.backends.cudnn.allow_tf32 and 91002 <= cudnn < 91600:
        lines.append(f"{name}: TF32 can give wrong sums (pytorch#167024); {better}")
    version = torch.__version__
    if amp != "off" and version.startswith("2.9.") and (version < "2.9.1" or cudnn < 91500):
        lines.append("torch 2.9: half precision is slow (pytorch#166122); install 2.10 or later")
    return [f"3D convolutions, {line}" for line in lines]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 means float32, whatever was asked for."""
    asked, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(asked)
        torch.backends.cudnn.allow_tf32 = convolutions
