"""3x3x3 convolutions with two thirds of the multiplications, along x (Winograd, 1980).

Two neighboring rows of the output, direct, are six products of an input row with a plane of the
weights. F(2, 3) needs four, of sums and differences of rows and planes (Lavin and Gray, 2016):

    m0 = (d0 - d2) w0               y0 = m0 + m1 + m2
    m1 = (d1 + d2) (w0 + w1 + w2)/2 y1 = m3 + m1 - m2
    m2 = (d2 - d1) (w0 - w1 + w2)/2
    m3 = (d3 - d1) w2

where d0 to d3 are the input rows that rows y0 and y1 see, and a product is a 2D convolution in
(y, z). It rounds no more than the direct sum does (measured: less, since sums are shorter). The
sums cost passes over memory, so it pays from some channels on.

Slabs are `(1, C, rows, Y, Z)`, float32, channels last.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.models.pages import images

PAYS_FROM = 32  # channels


def fits(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether a convolution is of the kind that this module makes faster."""
    return (
        weight.dim() == 5
        and weight.shape[2] == 3
        and max(stride) == 1
        and weight.dtype == torch.float32
        and min(weight.shape[:2]) >= PAYS_FROM
    )


def pair_rows(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, ...], int]:
    """Pad a slab's rows; the slab, the padding left to do, and how many output rows make pairs."""
    if padding[0]:
        x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    return x, (0, *padding[1:]), (x.shape[2] - 2) // 2 * 2


def convolve_into(target: Tensor, x: Tensor, weight: Tensor, bias, padding, onto=None) -> None:
    """Convolve a slab into `target`, `(1, C', rows, Y, Z)`, added to `onto` if it is given.

    Args:
        target: An even number of rows.
        x: At least two rows more than `target`.
        weight: `(C', C, 3, ky, kz)`.
        bias: `(C',)` or None.
        padding: Zeros at both ends of each axis, none along x.
        onto: Of the shape of `target`, which it may be; None for zero.
    """
    planes = planes_of(weight)
    options = (tuple(padding[1:]), (1, 1), (1, 1), 1)
    even, odd = (images(target)[i::2] for i in range(2))
    near, total, difference, far = sums_of(x, len(even))
    both = torch.mkldnn_convolution(total(), planes[1], None, *options)
    unlike = torch.mkldnn_convolution(difference(), planes[2], None, *options)
    if onto is None:
        torch.add(both, unlike, out=even)
        torch.sub(both, unlike, out=odd)
    else:
        torch.add(images(onto)[0::2], both, out=even).add_(unlike)
        torch.add(images(onto)[1::2], both, out=odd).sub_(unlike)
    for rows, seen, plane in ((even, near, planes[0]), (odd, far, planes[3])):
        torch.ops.mkldnn._convolution_pointwise_.binary(
            rows, seen(), plane, bias, *options, "add", 1.0, None, [], ""
        )


def weights_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding) -> Tensor:
    """Gradient of the weights from that of the output, the transpose of `convolve_into`.

    Args:
        grad: An even number of rows.
        x: As for `convolve_into`.
        weight: `(C', C, 3, ky, kz)`; its values are not used.
        padding: As for `convolve_into`.
    """
    plane = planes_of(weight)[0]
    even, odd = (images(grad)[i::2] for i in range(2))

    def correlate(rows: Tensor, seen: Tensor) -> Tensor:
        zeros, ones = (0, 0), (1, 1)
        return torch.ops.aten.convolution_backward(
            rows, seen, plane, None, ones, tuple(padding[1:]), ones, False, zeros, 1,
            [False, True, False],
        )[1]  # fmt: skip

    near, total, difference, far = sums_of(x, len(even))
    first, last = correlate(even, near()), correlate(odd, far())
    plus = correlate(even + odd, total()) / 2
    minus = correlate(even - odd, difference()) / 2
    return torch.stack([first + plus + minus, plus - minus, last + plus + minus], 2)


def planes_of(weight: Tensor) -> list[Tensor]:
    """The four planes `(C', C, ky, kz)` that sums of rows are convolved with."""
    w0, w1, w2 = weight.unbind(2)
    middle = (w0 + w2) / 2
    planes = (w0, middle + w1 / 2, middle - w1 / 2, w2)
    return [p.contiguous(memory_format=torch.channels_last) for p in planes]


def sums_of(x: Tensor, pairs: int):
    """The four sums of input rows, each computed when it is called, in memory they share."""
    d0, d1, d2, d3 = (images(x)[i : i + 2 * pairs - 1 : 2] for i in range(4))
    memory = torch.empty_like(d0, memory_format=torch.channels_last)
    return (
        lambda: torch.sub(d0, d2, out=memory),
        lambda: torch.add(d1, d2, out=memory),
        lambda: torch.sub(d2, d1, out=memory),
        lambda: torch.sub(d3, d1, out=memory),
    )
