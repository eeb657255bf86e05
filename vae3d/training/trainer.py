"""The training loop, for any task, on one process or many.

Numbers that hold whatever the options: gradients of a step are the mean over the samples of its
global batch, however these are cut into micro-batches and ranks; a resumed run repeats an
uninterrupted one bit by bit on the CPU. The host reads a device value only when it logs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import islice
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.parallel import DistributedDataParallel

from vae3d.kernels.device import fastest_kernels
from vae3d.kernels.precision import autocast
from vae3d.ranges import check_ranges
from vae3d.stop import Stop, Stopped, listening
from vae3d.tracking.console import Console
from vae3d.tracking.tracker import Tracker
from vae3d.training.bad_steps import first_bad
from vae3d.training.checkpoint import Checkpoints, versions
from vae3d.training.distributed import World
from vae3d.training.ema import EMA
from vae3d.training.optimizers import adamw, distributed, gradients, parts_of
from vae3d.training.options import Loop
from vae3d.training.precision import LossScaler
from vae3d.training.schedule import lr_scale, rewarmed
from vae3d.training.sharding import part, parts_of_optimizer, shard, whole
from vae3d.training.task import Task, share_weights
from vae3d.weights.hub import check_fit

TIME_IS_UP = 1  # a reason to stop that is no signal; the run then exits 0
AGAIN = " again"  # after a look that has ended in an error once


class Trainer:
    """Trains a task to `max_steps`, through kills and restarts.

    Args:
        task: What is trained; already on `world.device`.
        loader: Its `stream()` yields batches without end, in step on all ranks, and it knows its
            place (`state_dict`), see `loaders.PatchLoader`.
        checkpoints: Where checkpoints go.
        world: The ranks of this run.
        tracker: Takes the numbers; None on ranks that do not write.
        loop: How it is trained, with an `amp` that is settled.
        discriminator_lr: Learning rate of the discriminator; None for the generator's.
        sharding: ddp (each rank has all weights) | fsdp (each rank has a part of them).
        same_shapes: Whether all batches are of one shape; then a GPU's kernels are tried out.
        validate: `validate(network, step) -> numbers`, the same on all ranks; called with EMA
            weights. None for no validation.
        monitor: The number of `validate` that decides which checkpoint is best; lower is better.
        show: `show(network, step)`, writes pictures; None for none.
        sources: `sources(batch) -> names` of the volumes in a batch, to name a bad one.
        record: Plain data kept in each checkpoint: spec, config, preprocess, split.
    """

    def __init__(
        self,
        task: Task,
        loader: Any,
        checkpoints: Checkpoints,
        world: World | None = None,
        tracker: Tracker | None = None,
        *,
        loop: Loop,
        discriminator_lr: float | None = None,
        sharding: str = "ddp",
        same_shapes: bool = False,
        validate: Callable[[Any, int], dict[str, float]] | None = None,
        monitor: str = "val/mae",
        show: Callable[[Any, int], None] | None = None,
        sources: Callable[[Any], list[str]] | None = None,
        record: dict[str, Any] | None = None,
    ):
        check_ranges("Trainer", {"discriminator_lr": discriminator_lr})
        if loop.amp is None:
            raise ValueError("Trainer takes an `amp` that is settled: off, bf16 or fp16")
        self.task, self.loader, self.world, self.tracker = task, loader, world or World(), tracker
        self.checkpoints, self.loop, self.amp = checkpoints, loop, loop.amp
        self.monitor, self.sources, self.record = monitor, sources, record or {}
        self.val_every = loop.val_every if validate else 0
        self.media_every = loop.media_every if show else 0
        self.validate_network = validate or (lambda network, step: {})
        self.show = show or (lambda network, step: None)
        self.device = self.world.device
        self.same_shapes = same_shapes
        self.free_reads = self.device.type == "cpu"  # no queue of kernels to wait for

        self.sharded = sharding == "fsdp" and self.world.size > 1
        if self.sharded:
            shard(task, self.world, self.amp)
        parts = parts_of(task)
        rates = {"generator": loop.lr, "discriminator": discriminator_lr or loop.lr}
        self.rates = {name: rates[name] for name in parts}
        self.optimizers = {
            name: adamw(params, rates[name], loop.betas, loop.weight_decay)
            for name, (_, params) in parts.items()
        }
        self.networks = {name: module for name, (module, _) in parts.items()}
        if self.world.size > 1:
            alone = {name for name in self.networks if self.sharded and name == "generator"}
            self.networks |= distributed(
                task, {k: v for k, v in self.networks.items() if k not in alone}
            )
        self.ema = EMA(task.network, loop.ema_decay) if loop.ema_decay else None
        self.scaler = LossScaler(self.device, enabled=self.amp == "fp16")

        self.step, self.samples = 0, 0
        self.best, self.stale = float("inf"), 0
        self.owed: list[str] = []  # what the present step has yet to get: validation, pictures
        self.rewarm: tuple[int, float] | None = None  # since which step, from which factor
        self.skipped = torch.zeros((), device=self.device)
        self.bad_in_row = torch.zeros((), device=self.device)
        self.meter: dict[str, Tensor] = {}
        self.started, self.waited = time.monotonic(), 0.0
        self.console = Console(loop.max_steps, enabled=False)

    # The loop

    def fit(self) -> int:
        """Train from the present step to `max_steps`; return the exit code, 0 when done."""
        self.console = Console(self.loop.max_steps, self.step, enabled=self.world.is_main)
        self._clock()
        self._reading()
        with ExitStack() as stack:
            stop = stack.enter_context(listening())
            stack.callback(self.console.close)
            stack.enter_context(self.world.naming_the_missing(lambda: self.step))
            batches = stack.enter_context(closing(self.loader.stream()))
            try:
                with stop.held():
                    reason = self.train(batches, stop)
            except Stopped as stopped:  # while looking at a step that has been saved
                reason = stopped.code
            if reason > TIME_IS_UP:
                line = f"{Stopped(reason)}: step {self.step} is saved; the same command continues"
                self.console.print(line)
                return reason
        return 0

    def train(self, batches: Iterator[Any], stop: Stop) -> int:
        """Take steps, save them and look at them; return why it ended, 0 when done.

        Args:
            batches: What to train on.
            stop: Held: a signal waits for the step in hand; while looking, for nothing.
        """
        self.look(stop)  # a kill may have come between the saving and the looking
        while self.step < self.loop.max_steps and not self.without_progress():
            window = self.fetch(batches)
            with fastest_kernels(self.same_shapes):
                terms = self.backward(window)
            self.update(terms, window)
            self.step += 1
            if self.due(self.loop.log_every):
                self.log()
            looks = {"validation": self.val_every, "pictures": self.media_every}
            self.owed = [look for look, every in looks.items() if self.due(every)]
            reason = self.world.max_int(stop.code or self.wish_to_stop())
            if reason > TIME_IS_UP:
                stop.share(reason)
            if reason or self.owed or self.due(self.loop.save_every):
                self.save()
            if reason <= TIME_IS_UP:  # a signal leaves little time: it is owed, then
                self.look(stop)
            if reason:
                return reason
        return 0

    def fetch(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of the next step; the time spent waiting for them is counted."""
        begun = time.monotonic()
        window = list(islice(batches, self.loop.grad_accum))
        self.waited += time.monotonic() - begun
        return window

    def due(self, every: int) -> bool:
        """Whether what happens `every` so many steps happens now; it does at the last one."""
        return every > 0 and (self.step % every == 0 or self.step == self.loop.max_steps)

    def wish_to_stop(self) -> int:
        """Why this rank would stop by itself, 0 when it would not."""
        hours = (time.monotonic() - self.started) / 3600
        return TIME_IS_UP if self.loop.max_hours is not None and hours > self.loop.max_hours else 0

    def without_progress(self) -> bool:
        """Whether validation has not improved for as long as `early_stop` allows."""
        return self.loop.early_stop is not None and self.stale >= self.loop.early_stop

    # One step

    def backward(self, window: list[Any]) -> dict[str, Tensor]:
        """Accumulate the gradients of the mean loss over the window's samples on all ranks.

        The loader gives all ranks as many samples, so nothing is asked of the others.

        Returns:
            This rank's part of each named scalar; the sum over ranks is the mean over samples.
        """
        window = share_weights(window, self.world, self.task.ranks_per_sample)
        counts = [len(batch.index) for batch in window]
        total = sum(counts) * self.world.size
        self.samples += total // self.task.ranks_per_sample
        terms: dict[str, Tensor] = {}
        for n, (batch, count) in enumerate(zip(window, counts, strict=True)):
            last = n == len(window) - 1
            self._accumulate("generator", last, batch, count / total, terms)
            if self.task.discriminator_active(self.step):
                self._accumulate("discriminator", last, batch, count / total, terms)
        return terms

    def _accumulate(
        self, name: str, last: bool, batch: Any, share: float, terms: dict[str, Tensor]
    ) -> None:
        network = self.networks[name]
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        ddp = network if isinstance(network, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and not last else nullcontext():
            with autocast(self.device, self.amp):
                if name == "generator":
                    values = network(batch.to(self.device), self.step)
                    loss = values["loss"]
                else:
                    values = self.task.discriminator_loss(self.step, network)
                    loss = values["discriminator_loss"]
            found = {key: value.detach().float() for key, value in values.items()}
            # By 0 if a term is not finite: so are then the gradients, which all ranks get to see.
            loss = loss / torch.stack([*found.values()]).isfinite().all()
            # DDP divides by the number of ranks; we want the sum of all samples over their count.
            self.scaler.scale(loss * (share * self.world.size)).backward()
        for key, value in found.items():
            terms[key] = terms.get(key, 0.0) + value * share

    def update(self, terms: dict[str, Tensor], window: list[Any]) -> None:
        """Clip, step the optimizers and the average; or, if a number is not finite, do nothing.

        All ranks have the same gradients, so they agree on it.
        """
        active = [n for n in self.optimizers if n == "generator" or "discriminator_loss" in terms]
        norms = {}
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        for name in active:
            optimizer = self.optimizers[name]
            norm = torch.nn.utils.get_total_norm(gradients(optimizer))
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            norms[name] = norm / self.scaler.factor
            bad = bad | ~norms[name].isfinite()
            # The fused kernel divides by this as it reads the gradients: no pass for clipping.
            optimizer.grad_scale = self.scaler.factor
            if self.loop.clip_norm:
                excess = (norms[name] + 1e-6) / self.loop.clip_norm
                excess = excess.clamp(min=1.0).float()  # the kernel takes no other, float64 too
                optimizer.grad_scale = optimizer.grad_scale * excess
        bad = bad.float()
        for name in active:
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * self.lr_scale(self.step)
            with self._mixing():
                optimizer.step_unless(bad)
            optimizer.zero_grad(set_to_none=True)
        if self.ema:
            with self._mixing():
                self.ema.update(self.step, skip=bad)
        self.task.after_step()
        self.scaler.update(bad)
        self.skipped += bad
        self.bad_in_row = (self.bad_in_row + 1) * bad
        measured = terms | {f"norm/{name}": norm / self.world.size for name, norm in norms.items()}
        self._measure(measured, bad)
        if self.free_reads or (self.step + 1) % self.loop.log_every == 0:
            self._stop_if_hopeless(window)

    def _mixing(self) -> AbstractContextManager[None]:
        """Context in which scalars go with sharded tensors."""
        return implicit_replication() if self.sharded else nullcontext()

    def lr_scale(self, step: int) -> float:
        """Factor of the schedule on the learning rates at a step."""
        scale = lr_scale(
            step,
            schedule=self.loop.lr_schedule,
            warmup_steps=self.loop.warmup_steps,
            max_steps=self.loop.max_steps,
        )
        if self.rewarm is None:
            return scale
        return rewarmed(scale, step, *self.rewarm, self.loop.rewarm_steps)

    def meet_schedule(self) -> None:
        """Tell where the schedule does not go on from the last learning rate; rise to it if asked.

        What the last rate would have been is known from the schedule, what it was from the
        optimizer.
        """
        base, last = self.rates["generator"], self.optimizers["generator"].param_groups[0]["lr"]
        as_now = base * self.lr_scale(self.step - 1)
        if self.step >= self.loop.max_steps or math.isclose(last, as_now, rel_tol=1e-6):
            return
        self.rewarm = None
        line = f"learning rate: {last:.2g} up to step {self.step}, from here "
        line += f"{base * self.lr_scale(self.step):.2g} (max_steps {self.loop.max_steps})"
        if base and self.loop.rewarm_steps:
            self.rewarm = self.step, last / base
            line += f", reached in {self.loop.rewarm_steps} steps"
        else:
            line += "; --rewarm_steps N would reach it in N steps"
        self.say(line)

    def meet_order(self, begun: dict[str, int]) -> None:
        """Take up the order of the data where a checkpoint left it; by force a new one where not.

        Args:
            begun: The loader's state.
        """
        if not self.loop.force or not (changes := self.loader.changes_since(begun)):
            self.loader.load_state_dict(begun)
            return
        self.say(f"the order of the data begins anew: {', '.join(changes)}")

    def say(self, line: str) -> None:
        """Tell the user, once for all ranks."""
        if self.world.is_main:
            print(line, flush=True)

    # Numbers and pictures

    def _measure(self, terms: dict[str, Tensor], bad: Tensor) -> None:
        """Add a step to the running means; a dropped step does not count."""
        values = torch.stack([v.float() for v in terms.values()])
        pairs = torch.stack([values, torch.ones_like(values)], dim=1)
        pairs = torch.where(bad > 0, torch.zeros_like(pairs), pairs)
        for name, pair in zip(terms, pairs, strict=True):
            self.meter[name] = self.meter[name] + pair if name in self.meter else pair

    def log(self) -> None:
        """Write the means since the last line; only here does the host wait for the device."""
        names = sorted(self.meter)
        pairs = torch.stack([self.meter[name] for name in names])
        sums = self.world.sum_(pairs[:, 0].clone())
        means = (sums / pairs[:, 1]).tolist()
        self.meter = {}
        numbers = {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        numbers["train/lr"] = self.optimizers["generator"].param_groups[0]["lr"]
        numbers["train/skipped_steps"] = float(self.skipped)
        if self.scaler.enabled:
            numbers["train/loss_scale"] = float(self.scaler.factor)
        numbers |= self._clock() | self._reading()
        if self.tracker:
            self.tracker.log(numbers, self.step)
        self.console.update(self.step, numbers)

    def _clock(self) -> dict[str, float]:
        """Speed since the last call, the share of time that waited for data, and memory."""
        now = time.monotonic()
        before, samples, step = getattr(self, "_last_clock", (now, self.samples, self.step))
        self._last_clock = (now, self.samples, self.step)
        seconds = max(now - before, 1e-9)
        numbers = {
            f"perf/{self.task.unit}_per_s": (self.samples - samples) / seconds,
            "perf/step_s": seconds / max(self.step - step, 1),
            "perf/data_wait": min(self.waited / seconds, 1.0),
            "perf/cpu_memory_gb": psutil.Process().memory_info().rss / 1e9,
        }
        self.waited = 0.0
        if self.device.type == "cuda":
            numbers["perf/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            numbers["perf/gpu_reserved_gb"] = torch.cuda.max_memory_reserved(self.device) / 1e9
            torch.cuda.reset_peak_memory_stats(self.device)
        return numbers

    def _reading(self) -> dict[str, float]:
        """What all ranks read since the last call of volumes that stay where they are."""
        if not getattr(self.loader, "in_place", False):  # on all ranks alike
            return {}
        now, read = time.monotonic(), self.loader.traffic()
        since, before = getattr(self, "_last_reading", (now, read))
        self._last_reading, new = (now, read), read - before
        counts = (new.num_bytes, new.hits, new.misses, self.loader.unread)
        num_bytes, hits, misses, unread = (self.world.add(count) for count in counts)
        return {
            "perf/read_mb_s": num_bytes / 1e6 / max(now - since, 1e-9),
            "perf/cache_hits": hits / max(hits + misses, 1),
            "perf/unread_patches": float(unread),
        }

    def look(self, stop: Stop) -> None:
        """Do what the present step owes: validate, then picture.

        The step has been saved before: neither a kill nor an error in here loses training, and the
        run that resumes does what is still owed. What ends in an error is tried once more by that
        run and then left out, or a restarted run would end at the same step for ever.
        """
        if not self.owed:
            return
        with stop.released():
            self.see("validation", self.val_every, self.validate)
            self.see("pictures", self.media_every, self.picture)
            self.world.barrier()  # who has nothing to draw waits here, where a signal reaches it

    def see(self, look: str, every: int, do: Callable[[], bool]) -> None:
        """Take a look, if the present step owes it.

        Args:
            look: Its name.
            every: Its interval [steps]; 0 where it is wanted no longer.
            do: Takes it; tells whether the step is the best so far.
        """
        owed = next((name for name in (look, look + AGAIN) if name in self.owed), None)
        if owed is None:
            return
        self.owed.remove(owed)
        try:
            best = every > 0 and do()
        except Exception:
            self.owed += [look + AGAIN] * (owed == look)
            self.note()
            raise
        self.note(best)

    def validate(self) -> bool:
        """Measure the averaged network; tell whether it is the best so far."""
        with self.averaged() as network:
            numbers = self.validate_network(network, self.step)
        if self.tracker:
            self.tracker.log(numbers, self.step)
            if rows := getattr(self.validate_network, "rows", None):
                self.tracker.log_table("val/volumes", rows, self.step)
        self.console.print(
            f"step {self.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        )
        score = float(numbers[self.monitor])
        better = score < self.best
        self.best = min(self.best, score)
        self.stale = 0 if better else self.stale + 1
        self._clock()
        return better

    def picture(self) -> bool:
        """Show what the averaged network makes of the fixed volumes, which says nothing of it."""
        with self.averaged() as network:
            self.show(network, self.step)
        self._clock()
        return False

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Lend the network in eval mode with its averaged weights.

        Random numbers drawn meanwhile are not missing afterwards: training is the same whether a
        step was looked at before it was saved, after, or by the run that resumed.
        """
        before = _rng_state(self.device)
        # Sharded weights are gathered into buffers that training then writes to.
        no_gradients = torch.no_grad() if self.sharded else torch.inference_mode()
        with self.ema.applied() if self.ema else nullcontext(), no_gradients:
            self.task.network.eval()
            with autocast(self.device, self.amp):
                yield self.task.network
            self.task.network.train()
        _set_rng_state(before, self.device)

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint. All ranks must call it."""
        state = self.state_dict()
        if self.world.is_main:
            self.checkpoints.save(state)

    def note(self, best: bool = False) -> None:
        """Add what a look has found to the checkpoint of the present step."""
        if self.world.is_main:
            found = {"best": self.best, "stale": self.stale, "owed": self.owed}
            self.checkpoints.note(found, best)

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs, in types that `weights_only` reads.

        Sharded tensors are there on the main rank alone.
        """
        keep = self.world.is_main
        optimizers = {name: o.state_dict() for name, o in self.optimizers.items()}
        # Tensors of a GPU would arrive as such, and open a context on it in every process.
        meter = {name: pair.cpu() for name, pair in self.meter.items()}
        return {
            **self.record,
            "step": self.step,
            "samples": self.samples,
            "best": self.best,
            "stale": self.stale,
            "owed": list(self.owed),
            "rewarm": self.rewarm,
            "model": whole(self.task.network.state_dict(), keep),
            "ema": whole(self.ema.state_dict(), keep) if self.ema else None,
            "task": self.task.extra_state(),
            "optimizers": whole(optimizers, keep),
            "amp": self.amp,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "loader": self.loader.state_dict(),
            "ranks": self.world.gather({"rng": _rng_state(self.device), "meter": meter}),
            "wandb_id": self.tracker.run_id if self.tracker else None,
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, on as many ranks as before or on another number."""
        self.step, self.samples = state["step"], state["samples"]
        self.best, self.stale, self.owed = state["best"], state["stale"], list(state["owed"])
        weights = self.task.network.state_dict()
        check_fit(state["model"], weights, "the weights of the checkpoint")
        self.task.network.load_state_dict(
            {name: part(value, weights[name]) for name, value in state["model"].items()}
        )
        if self.ema:
            self.ema.load_state_dict(state["ema"] or state["model"])
        self.task.load_extra_state(state["task"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(parts_of_optimizer(state["optimizers"][name], optimizer))
        self.rewarm = state["rewarm"]
        self.meet_schedule()
        self.scaler.load_state_dict(state["scaler"])
        self.skipped.copy_(state["skipped"])
        self.meet_order(state["loader"])
        ranks = state["ranks"]
        if len(ranks) == self.world.size:
            _set_rng_state(ranks[self.world.rank]["rng"], self.device)
            self.meter = {k: v.to(self.device) for k, v in ranks[self.world.rank]["meter"].items()}

    # Ranks and failures

    def _stop_if_hopeless(self, window: list[Any]) -> None:
        if int(self.bad_in_row) < self.loop.max_bad_steps:
            return
        # Running one rank's window would need all ranks.
        again = not self.sharded and self.task.ranks_per_sample == 1
        found = self.world.gather(
            first_bad(self.task, window, self.step, self.device, self.amp, self.sources, again)
        )
        where = "; ".join(f"rank {r}: {text}" for r, text in enumerate(found) if text)
        raise ValueError(
            f"{self.loop.max_bad_steps} steps in a row, up to step {self.step + 1}, had a loss or "
            f"gradient that is not finite ({where or 'it did not come back when run again'}); "
            "lower --lr, use --amp bf16 or off, or mend the file. The checkpoints are untouched"
        )


def _rng_state(device: torch.device) -> dict[str, Any]:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
