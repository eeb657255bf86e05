"""3x3x3 convolutions with two thirds, or half, of the multiplications, along x (Winograd, 1980).

Two neighboring rows of the output, direct, are six products of an input row with a plane of the
weights. F(2, 3) needs four, of sums and differences of rows and planes (Lavin and Gray, 2016):

    m0 = (d0 - d2) w0               y0 = m0 + m1 + m2
    m1 = (d1 + d2) (w0 + w1 + w2)/2 y1 = m3 + m1 - m2
    m2 = (d2 - d1) (w0 - w1 + w2)/2
    m3 = (d3 - d1) w2

where d0 to d3 are the input rows that rows y0 and y1 see, and a product is a 2D convolution in
(y, z). It rounds about as much as the direct sum does at 32 channels, up to three times at 256
(root mean square, measured). The sums cost passes over memory, so it pays from some channels on.
F(4, 3) makes four rows of six products, at 2.6 to 7 times the rounding error of the direct sum,
and a row that is not finite spoils its group of four: for inference only.

Slabs are `(1, C, rows, Y, Z)`, float32, channels last.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.kernels.memory import images

PAYS_FROM = 32  # channels

Axes = Sequence[int]  # one number per axis
Maybe = Tensor | None


def fits(weight: Tensor, stride: Axes) -> bool:
    """Whether a convolution is of the kind that this module makes faster."""
    return (
        weight.dim() == 5
        and weight.shape[2] == 3
        and max(stride) == 1
        and weight.dtype == torch.float32
        and min(weight.shape[:2]) >= PAYS_FROM
    )


def pad_rows(x: Tensor, padding: Axes) -> tuple[Tensor, tuple[int, ...]]:
    """Pad a slab's rows; the slab and the padding left to do."""
    if padding[0]:
        x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    return x, (0, *padding[1:])


def convolve_two(
    target: Tensor, x: Tensor, weight: Tensor, bias: Maybe, padding: Axes, onto: Maybe = None
) -> None:
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
    add_convolution(even, near(), planes[0], bias, options)
    add_convolution(odd, far(), planes[3], bias, options)


def convolve_four(
    target: Tensor, x: Tensor, weight: Tensor, bias: Maybe, padding: Axes, onto: Maybe = None
) -> None:
    """The same by F(4, 3), with the points 0, 1, -1, 2, -2 and infinity.

    With s the sum and e the difference of the products m at a point and its negative:

        y0 = m0 + s1 + s2       y1 = e1 + 2 e2      y2 = s1 + 4 s2      y3 = e1 + 8 e2 + m_infinity

    Args:
        target: Rows by the four.
        x: At least two rows more than `target`.
        weight: `(C', C, 3, ky, kz)`.
        bias: `(C',)` or None.
        padding: Zeros at both ends of each axis, none along x.
        onto: As for `convolve_two`.
    """
    if onto is not None:
        result = torch.empty_like(target)
        convolve_four(result, x, weight, bias, padding)
        torch.add(result, onto, out=target)
        return
    options = (tuple(padding[1:]), (1, 1), (1, 1), 1)
    planes, count = planes_of_four(weight), target.shape[2] // 4
    y0, y1, y2, y3 = (images(target)[i::4] for i in range(4))
    d0, d1, d2, d3, d4, d5 = (images(x)[i : i + 4 * count - 3 : 4] for i in range(6))
    even, odd = (torch.empty_like(d0, memory_format=torch.channels_last) for _ in range(2))

    def at_both(point: int, bias: Maybe = None) -> tuple[Tensor, Tensor]:
        """Products at a point and its negative, from `even` and `odd`."""
        there = torch.mkldnn_convolution(even.add_(odd), planes[point], bias, *options)
        seen = even.sub_(odd, alpha=2)
        return there, torch.mkldnn_convolution(seen, planes[-point], None, *options)

    torch.sub(d4, d2, alpha=4, out=even)
    torch.sub(d3, d1, alpha=4, out=odd)
    there, opposite = at_both(1, bias)  # the one product that all four rows have once
    torch.add(there, opposite, out=y0)
    torch.sub(there, opposite, out=y1)
    del there, opposite
    torch.sub(d4, d2, out=even)
    torch.sub(d3, d1, out=odd).mul_(2)
    there, opposite = at_both(2)
    total, difference = there + opposite, there.sub_(opposite)
    torch.add(y0, total, alpha=4, out=y2)
    torch.add(y1, difference, alpha=8, out=y3)
    y0 += total
    y1.add_(difference, alpha=2)
    torch.add(d4, d0, alpha=4, out=even).sub_(d2, alpha=5)
    add_convolution(y0, even, planes[0], None, options)
    torch.add(d5, d1, alpha=4, out=odd).sub_(d3, alpha=5)
    add_convolution(y3, odd, planes["infinity"], None, options)


def add_convolution(rows: Tensor, seen: Tensor, plane: Tensor, bias: Maybe, options: tuple) -> None:
    """Add a 2D convolution to `rows`."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        rows, seen, plane, bias, *options, "add", 1.0, None, [], ""
    )


def weights_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: Axes) -> Tensor:
    """Gradient of the weights from that of the output, the transpose of `convolve_two`.

    Args:
        grad: An even number of rows.
        x: As for `convolve_two`.
        weight: `(C', C, 3, ky, kz)`; its values are not used.
        padding: As for `convolve_two`.
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


def planes_of_four(weight: Tensor) -> dict[int | str, Tensor]:
    """The six planes of F(4, 3), by point."""
    w0, w1, w2 = weight.unbind(2)
    one, two = (w0 + w2) / -6, w0 / 24 + w2 / 6
    planes: dict[int | str, Tensor] = {0: w0 / 4, "infinity": w2}
    planes |= {1: one - w1 / 6, -1: one + w1 / 6, 2: two + w1 / 12, -2: two - w1 / 12}
    return {k: p.contiguous(memory_format=torch.channels_last) for k, p in planes.items()}


def sums_of(x: Tensor, pairs: int) -> tuple[Callable[[], Tensor], ...]:
    """The four sums of input rows, each computed when it is called, in memory they share."""
    d0, d1, d2, d3 = (images(x)[i : i + 2 * pairs - 1 : 2] for i in range(4))
    memory = torch.empty_like(d0, memory_format=torch.channels_last)
    return (
        lambda: torch.sub(d0, d2, out=memory),
        lambda: torch.add(d1, d2, out=memory),
        lambda: torch.sub(d2, d1, out=memory),
        lambda: torch.sub(d3, d1, out=memory),
    )
