"""A resumed run equals one never stopped, bit by bit; each part of the state is needed."""

import copy
import random
from functools import partial

import pytest
import torch
from toys import OnGPU, toy_trainer

from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.kl import KL
from vae3d.losses.vae_loss import VAELoss
from vae3d.training.checkpoint import load_checkpoint
from vae3d.training.distributed import World

GAN = partial(
    VAELoss,
    kl=partial(KL, weight=1e-3, warmup_steps=5, target_std=1.0),
    adversarial=partial(
        Adversarial,
        spatial_dims=3,
        start_step=3,
        discriminator=partial(PatchDiscriminator, channels=4, num_layers=1, norm_groups=4),
    ),
)


def trainer_of(folder, max_steps, state=None, **options):
    options = dict(loss=GAN, log_every=2, warmup_steps=2, lr_schedule="constant") | options
    trainer = toy_trainer(folder, max_steps=max_steps, **options)
    if state is not None:
        trainer.load_state_dict(state)
    return trainer


def result(trainer):
    state = trainer.state_dict()
    return trainer.tracker.rows, {k: state[k] for k in ("model", "ema", "task", "optimizers")}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def losses(*trainers):
    rows = {}
    for trainer in trainers:
        logged = {step: row for step, row in trainer.tracker.rows.items() if "train/loss" in row}
        rows |= {step: row["train/loss"] for step, row in logged.items()}
    return rows


def rates(trainer):
    return {step: row["train/lr"] for step, row in trainer.tracker.rows.items()}


def test_a_longer_schedule_is_told_and_risen_to_where_that_is_asked(tmp_path, capsys):
    """Cosine to nothing at step 8, then to nothing at step 20: 16 times the rate at once."""
    options = dict(loss=VAELoss, log_every=1, lr_schedule="cosine")
    short = trainer_of(tmp_path, 8, **options)
    short.fit()
    state = short.checkpoints.resume(tmp_path / "last.pt")
    longer = trainer_of(tmp_path / "longer", 20, state, **options)
    line = "learning rate: 0.00067 up to step 8, from here 0.0075 (max_steps 20)"
    assert capsys.readouterr().out == f"{line}; --rewarm_steps N would reach it in N steps\n"
    longer.fit()
    slowly = trainer_of(tmp_path / "slowly", 20, state, rewarm_steps=3, **options)
    assert capsys.readouterr().out == f"{line}, reached in 3 steps\n"
    slowly.fit()
    last, aim, rise = rates(short)[8], rates(longer), rates(slowly)
    for n in range(3):  # a quarter, a half and three quarters of the way
        assert rise[9 + n] == pytest.approx(last + (aim[9 + n] - last) * (n + 1) / 4)
    assert [rise[n] for n in range(12, 21)] == [aim[n] for n in range(12, 21)]


def test_a_run_stopped_while_its_rate_rises_anew_goes_on_rising(tmp_path, capsys):
    options = dict(loss=VAELoss, log_every=1, lr_schedule="cosine", rewarm_steps=4)

    def go_on(folder, after, **more):
        state = load_checkpoint(tmp_path / after / "last.pt") if after else None
        trainer = trainer_of(tmp_path / folder, 12 if after else 6, state, **options, **more)
        trainer.fit()
        return trainer

    go_on("short", None)
    whole = go_on("whole", "short")
    half = go_on("half", "short", max_hours=0.0)
    capsys.readouterr()
    rest = go_on("rest", "half")
    assert half.step == 7 and capsys.readouterr().out == ""
    assert rates(whole) == rates(half) | rates(rest) and same(result(whole)[1], result(rest)[1])


def test_a_schedule_that_goes_on_is_not_told(tmp_path, capsys):
    options = dict(loss=VAELoss, lr_schedule="cosine", rewarm_steps=4)
    trainer_of(tmp_path, 6, max_hours=0.0, **options).fit()
    trainer_of(tmp_path, 6, load_checkpoint(tmp_path / "last.pt"), **options)
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps never stopped; 10 samples in batches of 2, so it ends mid-epoch."""
    trainer = trainer_of(tmp_path_factory.mktemp("whole"), 9)
    trainer.fit()
    return losses(trainer), copy.deepcopy(result(trainer)[1])


def stop_and_go(folder, *stops, change=lambda state: state):
    """Train to each stop with new objects, handing over by file; return the trainers."""
    trainers, state = [], None
    for stop in stops:
        torch.manual_seed(random.randrange(1000))  # the next process starts from another seed
        trainer = trainer_of(folder, 9, state, save_every=1)
        trainer.wish_to_stop = lambda trainer=trainer, stop=stop: int(trainer.step >= stop)
        trainer.fit()
        trainers.append(trainer)
        state = change(load_checkpoint(folder / "last.pt"))
    return trainers


# Mid-epoch, before and after the discriminator starts, at an epoch's end, between two log lines.
@pytest.mark.parametrize("stops", [(1, 9), (3, 9), (4, 9), (5, 9), (2, 5, 6, 9)])
def test_a_resumed_run_equals_one_never_stopped(tmp_path, whole, stops):
    trainers = stop_and_go(tmp_path, *stops)
    wanted_losses, wanted_state = whole
    got = losses(*trainers)
    assert all(got[step] == loss for step, loss in wanted_losses.items())
    assert same(result(trainers[-1])[1], wanted_state)


class Killed(BaseException):
    """Stands for kill -9: nothing is caught on the way."""


def kill(trainer, moment):
    """Let a trainer die in step 4, at a moment of its looks."""
    validate, show, note = trainer.validate_network, trainer.show, trainer.note

    def dies(network, step):
        if step == 4:
            trainer.note = lambda *_: None  # a kill runs no `finally`
            raise Killed
        return (validate if moment == "validation" else show)(network, step)

    def dies_at_the_note(best=False):
        if trainer.step == 4:
            if moment == "before the name of the best":
                trainer.checkpoints.name = lambda *_: None
                note(best)
            raise Killed
        note(best)

    if moment == "validation":
        trainer.validate_network = dies
    elif moment == "pictures":
        trainer.show = dies
    else:
        trainer.note = dies_at_the_note


@pytest.mark.parametrize(
    ("moment", "validated", "pictured"),
    [
        ("validation", [4, 6, 8, 9], [4, 8, 9]),
        ("before the note", [4, 6, 8, 9], [4, 8, 9]),
        ("before the name of the best", [6, 8, 9], [4, 8, 9]),
        ("pictures", [6, 8, 9], [4, 8, 9]),
    ],
)
def test_a_step_is_saved_before_it_is_looked_at_and_looked_at_once(
    tmp_path, whole, moment, validated, pictured
):
    """The score falls at step 4, so that `best` is at stake too; looking draws random numbers."""
    seen, shown = [], []

    def validate(network, step):
        seen.append((step, float(torch.rand(()))))
        return {"val/mae": {2: 3.0, 4: 1.0}.get(step, 2.0)}

    options = dict(val_every=2, media_every=4, save_every=100, validate=validate)
    options["show"] = lambda network, step: shown.append((step, random.random()))
    with pytest.raises(Killed):
        trainer = trainer_of(tmp_path, 9, **options)
        kill(trainer, moment)
        trainer.fit()
    first, drawn = losses(trainer), dict(seen)
    seen.clear(), shown.clear()
    path, _ = trainer.checkpoints.find_latest()
    again = trainer_of(tmp_path, 9, **options)
    state = again.checkpoints.resume(path)
    again.checkpoints.name(path, state["names"])
    assert state["step"] == 4
    again.load_state_dict(state)
    again.fit()
    assert [step for step, _ in seen] == validated and [step for step, _ in shown] == pictured
    assert dict(seen).get(4, drawn.get(4)) == drawn.get(4, dict(seen).get(4))
    assert first | losses(again) == whole[0] and same(result(again)[1], whole[1])
    assert (again.best, again.stale) == (1.0, 3)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 4


@pytest.mark.parametrize("look", ["validation", "pictures"])
def test_a_look_that_fails_is_tried_once_more_and_ends_no_restarted_run_for_ever(tmp_path, look):
    tried = []

    def fails(network, step):
        tried.append(step)
        if step == 4:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return {"val/mae": 1.0}

    every = {"validation": {"validate": fails, "val_every": 4}}
    options = every.get(look, {"show": fails, "media_every": 4}) | {"loss": VAELoss}
    for owed in ([f"{look} again"], []):
        path, _ = (trainer := trainer_of(tmp_path, 6, **options)).checkpoints.find_latest()
        if path:
            trainer.load_state_dict(trainer.checkpoints.resume(path))
        with pytest.raises(TypeError, match="cuda:0"):
            trainer.fit()
        state = trainer_of(tmp_path, 6).checkpoints.resume(tmp_path / "last.pt")
        assert (state["step"], state["owed"]) == (4, owed)
    third = trainer_of(tmp_path, 6, state, **options)
    assert third.fit() == 0 and third.step == 6 and tried == [4, 4, 6]


def without(part, state):
    """The state with one part as a fresh run has it."""
    fresh = trainer_of("/nowhere", 9).state_dict()
    return {**state, part: fresh[part]}


@pytest.mark.parametrize(
    "part", ["step", "model", "ema", "task", "optimizers", "loader"]
)  # fmt: skip
def test_each_part_of_the_state_is_needed(tmp_path, whole, part):
    trainers = stop_and_go(tmp_path, 5, 9, change=lambda state: without(part, state))
    assert not same(result(trainers[-1])[1], whole[1])


def test_the_running_means_of_the_log_are_part_of_the_state(tmp_path, whole):
    def forget(state):
        return {**state, "ranks": [{**rank, "meter": {}} for rank in state["ranks"]]}

    trainers = stop_and_go(tmp_path, 5, 9, change=forget)
    assert losses(*trainers)[6] != whole[0][6]


def test_ranks_send_each_other_tensors_of_the_cpu_only(tmp_path, monkeypatch):
    """Those of a GPU open a context of half a gigabyte on it in every process that gets them."""
    trainer, sent = trainer_of(tmp_path, 1), []
    trainer.meter = {"loss": torch.zeros(2).as_subclass(OnGPU)}
    monkeypatch.setattr(World, "gather", lambda _, value: sent.append(value) or [value])
    trainer.state_dict()
    assert type(sent[0]["meter"]["loss"]) is torch.Tensor


def test_a_run_that_kept_channels_innermost_goes_on_with_contiguous_weights(tmp_path, whole):
    """What --channels_last wrote; the bytes of the moments go with those of the weights."""

    def innermost(state):
        def turn(value):
            if isinstance(value, dict):
                return {key: turn(item) for key, item in value.items()}
            five = isinstance(value, torch.Tensor) and value.ndim == 5
            return value.contiguous(memory_format=torch.channels_last_3d) if five else value

        return {**state, **{key: turn(state[key]) for key in ("model", "ema", "optimizers")}}

    trainers = stop_and_go(tmp_path, 5, 9, change=innermost)
    assert same(result(trainers[-1])[1], whole[1])
    moments = trainers[-1].optimizers["generator"].state.values()
    assert all(value.is_contiguous() for entry in moments for value in entry.values())


def test_float16_continues_with_its_loss_scale(tmp_path):
    first = trainer_of(tmp_path, 3, amp="fp16", save_every=1)
    first.scaler.factor = torch.tensor(512.0)
    first.fit()
    second = trainer_of(tmp_path, 4, load_checkpoint(tmp_path / "last.pt"), amp="fp16")
    assert float(second.scaler.factor) == 512.0


def test_a_loss_with_other_terms_than_the_checkpoint_is_one_clear_line(tmp_path):
    state = trainer_of(tmp_path / "gan", 1).state_dict()
    with pytest.raises(ValueError, match=r"differs in: \w+; .* --init_from"):
        toy_trainer(tmp_path / "plain").load_state_dict(state)
