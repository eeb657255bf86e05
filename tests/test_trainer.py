import contextlib
import copy
import math
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_resume import GAN
from torch import nn
from toys import ToyBatch, ToyLoader, on_ranks, tiny_vae, toy_trainer

from vae3d.kernels.precision import faults_of_conv3d
from vae3d.losses.kl import KL
from vae3d.losses.vae_loss import VAELoss
from vae3d.training import distributed
from vae3d.training.distributed import World
from vae3d.training.optimizers import FusedAdamW
from vae3d.training.options import Loop
from vae3d.training.precision import LossScaler, native_amp
from vae3d.training.run import Run
from vae3d.training.task import Task, VAETask, noise_of_sample


def weights(trainer):
    return [p.detach().clone() for p in trainer.task.network.parameters()]


def test_overfitting_one_sample_drives_the_loss_down_ten_times(tmp_path):
    loader = ToyLoader(samples=1, batch_size=1)
    x = torch.linspace(-1, 1, 12).expand(8, 4, 12).sin()
    loader.images = x[None, None].contiguous()
    trainer = toy_trainer(
        tmp_path, loader=loader, loss=partial(VAELoss, kl=partial(KL, weight=1e-6)), max_steps=150
    )
    assert trainer.fit() == 0
    losses = trainer.tracker.losses("train/recon")
    assert losses[-1] < losses[0] / 10


def test_every_encoder_parameter_gets_a_gradient_from_the_reconstruction_alone():
    task = VAETask(tiny_vae(), VAELoss(kl=partial(KL, weight=0.0)))
    batch = next(ToyLoader().stream())
    task(batch, step=0)["loss"].backward()
    for name, p in task.network.encoder.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_every_precision_trains_and_stays_near_float32(tmp_path, amp):
    trainer = toy_trainer(tmp_path, amp=amp, max_steps=20)
    trainer.fit()
    losses = trainer.tracker.losses()
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    reference = toy_trainer(tmp_path / "reference", max_steps=20)
    reference.fit()
    assert losses[0] == pytest.approx(reference.tracker.losses()[0], rel=0.02)
    assert all(p.dtype == torch.float32 for p in trainer.task.network.parameters())


@pytest.mark.parametrize(
    ("has", "amp"), [("amx_tile", "bf16"), ("avx512_bf16", "bf16"), ("avx512", "off")]
)
def test_the_precision_of_a_cpu_follows_its_instructions(has, amp, monkeypatch):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == has)
    assert native_amp(torch.device("cpu")) == amp


def test_accumulated_micro_batches_equal_the_large_batch_also_uneven_ones(tmp_path):
    big = toy_trainer(tmp_path / "a", batch_size=4, max_steps=6)
    small = toy_trainer(tmp_path / "b", batch_size=1, grad_accum=4, max_steps=6)
    uneven = toy_trainer(tmp_path / "c", grad_accum=2, max_steps=6, loader=UnevenLoader(10, 4))
    for trainer in (big, small, uneven):
        trainer.fit()
    for trainer in (small, uneven):
        assert trainer.samples == big.samples == 24
        assert trainer.tracker.losses() == pytest.approx(big.tracker.losses(), rel=1e-5)
        for p, q in zip(weights(trainer), weights(big), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


class UnevenLoader(ToyLoader):
    """Batches of 4, each cut as 3 + 1."""

    def stream(self):
        for batch in super().stream():
            for part in (slice(0, 3), slice(3, 4)):
                yield ToyBatch(batch.image[part], batch.index[part])


def first_steps(world, batch_size, grad_accum, steps):
    trainer = toy_trainer(
        "/nowhere", world, batch_size=batch_size, grad_accum=grad_accum, max_steps=steps,
        save_every=0,
    )  # fmt: skip
    trainer.fit()
    return trainer.tracker.losses(), weights(trainer), trainer.samples


def test_two_ranks_equal_one_process_with_the_same_global_batch():
    alone, alone_weights, samples = first_steps(World(), 4, 1, 6)
    for per_rank, accum in ((2, 1), (1, 2)):
        for losses, ranks_weights, ranks_samples in on_ranks(2, first_steps, per_rank, accum, 6):
            assert ranks_samples == samples
            assert losses == pytest.approx(alone, rel=1e-5)
            for p, q in zip(ranks_weights, alone_weights, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def count_all_reduces(world):
    trainer = toy_trainer(
        "/nowhere", world, batch_size=1, grad_accum=4, max_steps=1, save_every=0
    )  # fmt: skip
    calls = []

    def hook(state, bucket):
        calls.append(1)
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0] / world.size)

    trainer.networks["generator"].register_comm_hook(None, hook)
    trainer.fit()
    return len(calls)


def test_gradients_travel_once_a_step_and_not_once_a_micro_batch():
    assert on_ranks(2, count_all_reduces) == [1, 1]


def test_learning_rate_follows_the_schedule_and_counts_updates_not_micro_batches(tmp_path):
    trainer = toy_trainer(tmp_path, batch_size=1, grad_accum=2, warmup_steps=3, max_steps=6, lr=1.0)
    trainer.optimizers["generator"].step = lambda: None
    trainer.fit()
    assert trainer.tracker.losses("train/lr")[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_updates_equal_plain_adamw_with_clipping(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=3, lr_schedule="constant", clip_norm=0.5)
    task = VAETask(tiny_vae(), VAELoss())
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2, (0.9, 0.99), 1e-3, weight_decay=0.0)
    loader = ToyLoader().stream()
    for step in range(3):
        optimizer.zero_grad()
        task(next(loader), step)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)
        optimizer.step()
    trainer.fit()
    for p, q in zip(weights(trainer), task.network.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-4, atol=1e-6)


def test_weight_decay_spares_norms_and_biases(tmp_path):
    trainer = toy_trainer(tmp_path, weight_decay=0.1)
    decays = {
        id(p): group["weight_decay"]
        for group in trainer.optimizers["generator"].param_groups
        for p in group["params"]
    }
    for p in trainer.task.network.parameters():
        assert decays[id(p)] == (0.1 if p.ndim > 1 else 0.0)


def test_noise_depends_on_sample_step_and_seed_alone():
    def draw(*key):
        return noise_of_sample(torch.Size((2, 3)), *key, torch.device("cpu"))

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(draw(0, 1, 2), draw(*other))


# Numbers that are not finite


class Poison(ToyLoader):
    """Puts a NaN into the batches of some steps, counted from 0."""

    def __init__(self, steps, **options):
        super().__init__(**options)
        self.steps, self.step = steps, -1

    def stream(self):
        for batch in super().stream():
            self.step += 1
            if self.step in self.steps:
                batch.image[0, 0, 0, 0, 0] = math.nan
            yield batch


def test_a_bad_step_changes_neither_weights_nor_moments_nor_average(tmp_path):
    trainer = toy_trainer(tmp_path, loader=Poison({2}), max_steps=2)
    trainer.fit()
    before = copy.deepcopy(
        (weights(trainer), trainer.ema.shadow, trainer.optimizers["generator"].state_dict())
    )
    trainer.loop = replace(trainer.loop, max_steps=3)
    trainer.fit()
    assert float(trainer.skipped) == 1
    for p, q in zip(before[0], weights(trainer), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(v, trainer.ema.shadow[k]) for k, v in before[1].items())
    after = trainer.optimizers["generator"].state_dict()["state"]
    for i, entry in before[2]["state"].items():
        assert all(torch.equal(entry[k], after[i][k]) for k in entry)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_kernel_that_heeds_neither_scale_nor_drop_trains_alike(tmp_path, monkeypatch, amp):
    """That of MPS: without clipping, and with steps of float16 times 65536, before."""

    def trained(folder):
        options = dict(loader=Poison({2}), max_steps=5, clip_norm=0.1, amp=amp)
        trainer = toy_trainer(folder, **options)
        trainer.fit()
        assert float(trainer.skipped) == 1
        return weights(trainer)

    wanted, step, scales = trained(tmp_path / "a"), FusedAdamW.step, []

    def deaf(optimizer):
        scales.append(getattr(optimizer, "grad_scale", None))
        return step(optimizer)

    monkeypatch.setattr(FusedAdamW, "kernel_scales", False)
    monkeypatch.setattr(FusedAdamW, "step", deaf)
    for p, q in zip(trained(tmp_path / "b"), wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert scales == [None] * 4


def test_training_goes_on_after_a_bad_step_and_its_numbers_do_not_count(tmp_path):
    trainer = toy_trainer(tmp_path, loader=Poison({2}), max_steps=8, log_every=4)
    trainer.fit()
    assert all(map(math.isfinite, trainer.tracker.losses()))
    assert trainer.tracker.losses("train/skipped_steps") == [1, 1]


def test_bad_steps_in_a_row_stop_the_run_and_name_tensor_and_file(tmp_path):
    trainer = toy_trainer(
        tmp_path,
        loader=Poison(range(3, 100)),
        max_steps=8,
        save_every=2,
        max_bad_steps=3,
        sources=lambda batch: [f"head_{int(i)}.nii.gz" for i in batch.index],
    )
    with pytest.raises(ValueError, match=r"3 steps in a row.*input is not finite for head_\d"):
        trainer.fit()
    state = trainer.checkpoints.resume(tmp_path / "last.pt")
    assert all(v.isfinite().all() for v in state["model"].values())


def test_the_first_layer_that_overflows_is_named(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=8, max_bad_steps=1)
    layer = trainer.task.network.decoder[0]
    layer.register_forward_hook(lambda module, args, output: output * math.inf)
    with pytest.raises(ValueError, match=r"the output of network\.decoder\.0"):
        trainer.fit()


def bad_on_one_rank(world):
    loader = Poison({1} if world.rank else set(), rank=world.rank, world_size=world.size)
    trainer = toy_trainer("/nowhere", world, loader=loader, max_steps=2, save_every=0)
    trainer.fit()
    return float(trainer.skipped), weights(trainer)


def test_a_bad_number_on_one_rank_drops_the_step_on_all():
    (skipped0, weights0), (skipped1, weights1) = on_ranks(2, bad_on_one_rank)
    assert skipped0 == skipped1 == 1
    assert all(torch.equal(p, q) for p, q in zip(weights0, weights1, strict=True))


def test_the_loss_scale_of_float16_follows_the_rule_of_grad_scaler():
    ours = LossScaler(torch.device("cpu"), enabled=True)
    theirs = torch.amp.GradScaler("cpu")
    p = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([p], 0.0)
    for step in range(4100):
        bad = step in (5, 6, 50)
        p.grad = None
        theirs.scale(p * 1.0).backward()
        p.grad = torch.full_like(p.grad, math.inf) if bad else p.grad
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(bad)))
    assert float(ours.factor) == theirs.get_scale() == 65536 / 8 * 4


# When to stop, and the pieces round the loop


def test_time_limit_saves_and_ends_with_zero(tmp_path):
    trainer = toy_trainer(tmp_path, max_hours=0.0)
    assert trainer.fit() == 0
    assert trainer.step == 1
    assert trainer.checkpoints.resume(tmp_path / "last.pt")["step"] == 1


def killed(*_):
    """End as a look at the network does that a signal meets."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


@pytest.mark.parametrize("look", ["validate", "show"])
def test_a_signal_while_looking_loses_no_step_and_the_next_run_looks_first(tmp_path, capsys, look):
    every = {"validate": "val_every", "show": "media_every"}[look]
    first = toy_trainer(tmp_path, **{look: killed, every: 3}, max_steps=5)
    assert first.fit() == 143 and first.step == 3
    line = "stopped by SIGTERM: step 3 is saved; the same command continues\n"
    assert capsys.readouterr().err.endswith(line)
    looked = []

    def remember(_network, step):
        looked.append(step)
        return {"val/mae": 1.0}

    again = toy_trainer(tmp_path, **{look: remember, every: 3}, max_steps=5)
    again.load_state_dict(again.checkpoints.resume(tmp_path / "last.pt"))
    assert again.fit() == 0 and looked == [3, 5]


def test_a_signal_within_a_step_waits_for_its_checkpoint_and_is_told_once(
    tmp_path, capsys, signal_at
):
    trainer = toy_trainer(tmp_path, max_steps=9)
    signal_at(trainer, "update", 4)
    assert trainer.fit() == 143
    assert trainer.checkpoints.resume(tmp_path / "last.pt")["step"] == 4
    assert capsys.readouterr().err.count("stopped by SIGTERM: step 4 is saved") == 1


def scripted(*scores):
    scores = iter(scores)
    return lambda network, step: {"val/mae": next(scores)}


def test_early_stop_counts_validations_without_a_better_one(tmp_path):
    trainer = toy_trainer(
        tmp_path, validate=scripted(3, 2, 2.5, 2.1, 1), val_every=1, early_stop=2, max_steps=9
    )
    assert trainer.fit() == 0
    assert trainer.step == 4
    assert trainer.checkpoints.resume(tmp_path / "best.pt")["step"] == 2


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path):
    options = dict(val_every=1, early_stop=1, max_steps=9)
    toy_trainer(tmp_path, validate=scripted(1, 2), **options).fit()
    before = (tmp_path / "last.pt").read_bytes()
    again = toy_trainer(tmp_path, validate=scripted(), **options)
    again.load_state_dict(again.checkpoints.resume(tmp_path / "last.pt"))
    assert again.fit() == 0 and again.step == 2
    assert (tmp_path / "last.pt").read_bytes() == before
    more = toy_trainer(tmp_path, validate=scripted(0.5, 3, 3), **options | {"early_stop": 2})
    more.load_state_dict(more.checkpoints.resume(tmp_path / "last.pt"))
    assert more.fit() == 0 and more.step == 5


@pytest.mark.parametrize(
    "option",
    [{"betas": (2, 0.9)}, {"weight_decay": -1}, {"max_hours": -1}, {"max_bad_steps": 0}],
    ids=lambda option: next(iter(option)),
)
def test_numbers_out_of_range_are_told(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        toy_trainer(tmp_path, **option)


def test_best_is_remembered_by_a_resumed_run(tmp_path):
    first = toy_trainer(tmp_path, validate=scripted(1.0, 2.0), val_every=2, max_steps=4)
    first.fit()
    second = toy_trainer(tmp_path, validate=scripted(1.5), val_every=2, max_steps=6)
    second.load_state_dict(second.checkpoints.resume(tmp_path / "last.pt"))
    second.fit()
    assert second.checkpoints.resume(tmp_path / "best.pt")["step"] == 2


def test_validation_sees_averaged_weights_in_eval_mode_without_gradients(tmp_path):
    seen = {}

    def validate(network, step):
        seen["weights"] = [p.detach().clone() for p in network.parameters()]
        seen["modes"] = (network.training, torch.is_grad_enabled())
        return {"val/mae": 1.0}

    trainer = toy_trainer(tmp_path, validate=validate, val_every=4, max_steps=4)
    trainer.fit()
    assert seen["modes"] == (False, False)
    for p, q in zip(seen["weights"], trainer.ema.shadow.values(), strict=True):
        assert torch.equal(p, q)
    assert trainer.task.network.training
    assert any(
        not torch.equal(p, q) for p, q in zip(seen["weights"], weights(trainer), strict=True)
    )


def test_a_finished_run_ends_at_once(tmp_path):
    first = toy_trainer(tmp_path, max_steps=2)
    first.fit()
    again = toy_trainer(tmp_path, max_steps=2)
    again.load_state_dict(again.checkpoints.resume(tmp_path / "last.pt"))
    assert again.fit() == 0 and again.tracker.rows == {}


def test_numbers_have_slashes_and_carry_speed(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=2)
    trainer.fit()
    row = trainer.tracker.rows[2]
    assert all("/" in name for name in row)
    wanted = {"train/loss", "train/recon", "train/kl", "train/lr", "perf/patches_per_s"}
    assert wanted <= set(row)
    assert row["perf/patches_per_s"] > 0


def test_host_reads_no_tensor_between_two_lines_of_numbers(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, loss=GAN, max_steps=8, log_every=4, save_every=0)
    trainer.free_reads = False  # as on a GPU
    reads = []

    def spy(real):
        def read(tensor, *args):
            caller = sys._getframe(1).f_code
            # the samples' numbers live on the CPU
            if Path(caller.co_filename).name != "toys.py" and tensor.dtype.is_floating_point:
                reads.append((trainer.step, caller.co_name))
            return real(tensor, *args)

        return read

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, spy(getattr(torch.Tensor, name)))
    trainer.fit()
    monkeypatch.undo()
    assert reads  # the log itself
    between = [r for r in reads if r[0] not in (3, 4, 7, 8)]  # 3 and 7: the look at bad_in_row
    assert not between


# Ranks that wait


def impatient(world):
    """As with --timeout_minutes 0.02."""
    patience = timedelta(seconds=1.2)
    dist.distributed_c10d._set_pg_timeout(patience, world.control)
    world.store.set_timeout(patience)


def build_for_long(world, answer_s):
    impatient(world)
    order, distributed.ANSWER_S = [], answer_s
    try:
        with world.main_first():
            if world.is_main:
                time.sleep(3)
            order.append(time.monotonic())
        with world.main_first():
            order.append(time.monotonic())
    except RuntimeError as error:
        time.sleep(2)  # the first rank keeps the store
        return str(error)
    return order


def test_ranks_wait_for_the_first_as_long_as_it_answers_however_short_their_patience():
    first, second = on_ranks(2, build_for_long, 0.1)
    assert all(mine < theirs for mine, theirs in zip(first, second, strict=True))
    assert on_ranks(2, build_for_long, 60)[1] == "rank 0 has not answered for 0.02 minutes"


def fail_first(world):
    try:
        with world.main_first():
            if world.is_main:
                raise OSError("no room for the cache")
    except (ValueError, OSError) as error:
        time.sleep(2 * world.is_main)  # the first rank keeps the store
        return str(error)


def test_a_failure_of_the_first_rank_ends_the_others_at_once():
    mine, theirs = on_ranks(2, fail_first)
    assert mine == "no room for the cache" and theirs.startswith("rank 0 could not")


@pytest.mark.parametrize(
    ("amp", "cudnn", "torch_version", "told"),
    [
        ("bf16", 90100, "2.6.0+cu124", ()),
        ("bf16", 91002, "2.8.0+cu128", ("9.10.2: bf16 can give wrong sums",)),
        ("bf16", 91002, "2.9.0+cu128", ("wrong sums (pytorch#163539)", "2.9: half precision")),
        ("fp16", 91500, "2.9.0+cu128", ("2.9: half precision is slow",)),
        ("fp16", 91300, "2.9.1+cu130", ("2.9: half precision is slow",)),
        ("fp16", 91500, "2.9.1+cu130", ()),
        ("off", 91002, "2.8.0+cu128", ("9.10.2: TF32 can give wrong sums",)),
        ("off", 91600, "2.10.0+cu128", ()),
    ],
)
def test_known_faults_of_3d_convolutions_are_told_at_the_start(
    tmp_path, monkeypatch, capsys, amp, cudnn, torch_version, told
):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # not so by itself
    assert faults_of_conv3d(torch.device("cpu"), amp) == []
    run = Run(tmp_path, World(device=torch.device("cuda")))
    assert run.precision(amp, None) == amp
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True))


@pytest.mark.parametrize("max_steps, told", [(99, True), (100, False)])
def test_a_run_that_ends_within_its_warm_up_is_told(tmp_path, capsys, max_steps, told):
    loop = Loop(max_steps=max_steps, warmup_steps=100, lr=1e-3, wandb="disabled")
    Run(tmp_path, World()).track(loop, {}, None).close()
    line = "max_steps 99 ends within warmup_steps 100: the learning rate gets no higher than"
    assert capsys.readouterr().out == f"{line} 0.00098 of 0.001\n" * told


@pytest.mark.parametrize("error", [None, RuntimeError("rank 1 no longer answers")])
def test_after_an_error_no_rank_waits_for_the_others(error, monkeypatch):
    """To destroy a group of nccl is to wait for all its ranks; with one lost that has no end."""
    done = []
    destroy, abort = dist.destroy_process_group, dist.distributed_c10d._abort_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (done.append("destroy"), destroy()))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda: (done.append("abort"), abort())
    )
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.suppress(RuntimeError), distributed.open_world("cpu"):
        if error:
            raise error
    assert done == (["abort"] if error else ["destroy"]) and not dist.is_initialized()


class Regression(Task):
    """A task that is no VAE: the loop is shared with stage 2."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(4, 1)

    def forward(self, batch, step):
        error = (self.network(batch.image[:, 0, :4, 0, 0]) - 1).square().mean()
        return {"loss": error}


def test_the_loop_trains_any_task(tmp_path):
    trainer = toy_trainer(tmp_path, task=Regression(), max_steps=30, lr=0.1)
    trainer.fit()
    assert trainer.tracker.losses()[-1] < 0.2 * trainer.tracker.losses()[0]
    again = toy_trainer(tmp_path, task=Regression(), max_steps=30)
    again.load_state_dict(trainer.checkpoints.resume(tmp_path / "last.pt"))
    assert torch.equal(again.task.network.weight, trainer.task.network.weight)
