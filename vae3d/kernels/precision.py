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
