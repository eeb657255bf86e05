"""Passes of a network that a team of ranks shares, each with a slab of the volume at hand.

    with together(vae, team) as works:
        for index in volumes if works else ():
            evaluator.volume(index)

The first rank does the work: reads, measures, writes. Whatever it encodes or decodes meanwhile goes
in slabs through the networks of all, and comes back to it whole. So it holds volumes and latents,
and no more of what lies between them than the others do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vae3d.inference.reconstruct import Coding
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import DiagonalGaussian
from vae3d.spatial.network import SlabVAE, check
from vae3d.spatial.slabs import Layout, exchange
from vae3d.training.distributed import World

Half = Literal["encode", "decode"]


@contextmanager
def together(vae: CustomVAE, team: World, axis: int = 0) -> Iterator[bool]:
    """Share passes of a network among the ranks of a team while its first rank does the body.

    The others take part in its passes first, and come to the body, with nothing to do, when it has
    left its own.

    Args:
        vae: The network, in eval mode, the same on all ranks.
        team: Ranks that share passes; one alone does all by itself.
        axis: The axis along which volumes are cut.

    Returns:
        Whether this rank is the one that works.

    Raises:
        ValueError: A layer of the network cannot be run in slabs; it is named.
    """
    if team.size == 1:
        yield True
        return
    check(vae)
    key = team.next_turn()
    passes = Passes(vae, team, key, axis)
    if not team.is_main:
        team.wait_for_main(key, passes.join)
        team.barrier()  # the first rank may host the store, and end after this
        yield False
        return
    with team.answering(key):
        vars(vae).update(encode=passes.encode, decode=passes.decode)
        try:
            yield True
        finally:
            for name in ("encode", "decode"):  # and those of the class again
                vars(vae).pop(name)
    team.barrier()


def work_of(world: World, team: World, count: int) -> range:
    """Which of so many volumes this rank works on: those of its team, if it is the first of it."""
    stop = count if team.is_main else 0
    return range(world.rank // team.size, stop, world.size // team.size)


def in_slabs(coding: Coding, vae: CustomVAE) -> Coding:
    """How volumes go through a network that a team shares: in full passes.

    Raises:
        ValueError: Another mode was asked for, or the network has a layer that is not known in
            slabs.
    """
    check(vae)
    if coding.mode in ("patch", "exact"):
        raise ValueError(
            f"--sharding spatial shares full passes among the ranks, and mode is {coding.mode}: "
            "leave out one of them; without it ranks share the volumes out"
        )
    return replace(coding, mode="full")


class Passes:
    """The passes of one piece of work, in the order in which its first rank asks for them.

    Args:
        vae: The network.
        team: Ranks that share.
        key: Of the work, in their store.
        axis: The axis along which volumes are cut.
    """

    def __init__(self, vae: CustomVAE, team: World, key: str, axis: int = 0):
        self.vae, self.team, self.key, self.axis = vae, team, key, axis
        self.done, self.told = 0, False

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """`CustomVAE.encode` on all ranks, for the first one to call."""
        layout = self.layout("encode", x.shape)
        if layout is None:
            return type(self.vae).encode(self.vae, x)
        return self.vae.head(self.ask("encode", x, layout))

    def decode(self, z: Tensor) -> Tensor:
        """`CustomVAE.decode` on all ranks, for the first one to call."""
        layout = self.layout("decode", z.shape)
        if layout is None:
            return type(self.vae).decode(self.vae, z)
        return self.ask("decode", z, layout)

    def tell_alone(self) -> None:
        """Say once that there are volumes which one rank takes alone."""
        if not self.told:
            self.told, axis = True, "xyz"[self.axis]
            print(
                f"sharding spatial: a volume has fewer cells of the latent along {axis} than there "
                f"are ranks ({self.team.size}), and goes through the network on one of them alone; "
                "take another --slab_axis or fewer ranks",
                flush=True,
            )

    def layout(self, half: Half, shape: torch.Size | list[int]) -> Layout | None:
        """Who takes which rows; None, which is said, where there are fewer cells than ranks."""
        factor = self.vae.factor
        scale = factor if half == "decode" else (1,) * len(factor)
        volume = [n * s for n, s in zip(shape[2:], scale, strict=True)]
        if -(-volume[self.axis] // factor[self.axis]) < self.team.size:
            self.tell_alone()
            return None
        return Layout(volume, factor, self.axis, self.team.group)

    def ask(self, half: Half, x: Tensor, layout: Layout) -> Tensor:
        """Tell the others what to do, give each its rows, and gather what they make of them."""
        kind = x.device.type
        amp = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        asked = [half, list(x.shape), *(str(t).removeprefix("torch.") for t in (x.dtype, amp))]
        self.team.store.set(f"{self.key}/pass/{self.done}", json.dumps(asked))
        self.done += 1
        owned = rows_of(half, layout)
        first, *others = (layout.part(x, lo, hi) for lo, hi in owned)
        exchange(layout, dict(enumerate(others, 1)), {}, x)()
        return self.shared(half, first, layout)

    def join(self) -> bool:
        """Take part in the next pass, if the first rank has asked for it."""
        name = f"{self.key}/pass/{self.done}"
        if not self.team.store.check([name]):
            return False
        half, shape, *names = json.loads(self.team.store.get(name))
        dtype, amp = (getattr(torch, name) for name in names)
        self.done += 1
        layout = self.layout(half, shape)
        assert layout is not None, "a pass that is not shared"
        device = self.team.device
        lo, hi = rows_of(half, layout)[layout.rank]
        like = torch.empty(0, dtype=dtype, device=device)
        with torch.no_grad(), torch.autocast(device.type, amp, enabled=amp != torch.float32):
            slab = exchange(layout, {}, {0: layout.resized(shape, hi - lo)}, like)()[0]
            self.shared(half, slab, layout)
        return True

    def shared(self, half: Half, slab: Tensor, layout: Layout) -> Tensor:
        """Run a slab through half of the network; the first rank gets the whole result."""
        halves = SlabVAE(self.vae, layout)
        y = halves.moments(self.vae.pad(slab)) if half == "encode" else halves.decode(slab)
        owned = layout.owned(y)
        return layout.extended(y, [(0, owned[-1][1]), *owned[1:]], owned)


def rows_of(half: Half, layout: Layout) -> list[tuple[int, int]]:
    """Every rank's rows of what goes into a half of the network."""
    return layout.slabs if half == "encode" else layout.rows(layout.cells[layout.rank])
