import multiprocessing
import os
import socket
import weakref
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor
from toys import OnGPU, on_ranks, tiny_vae, toy_trainer

from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.vae_loss import VAELoss
from vae3d.training import distributed
from vae3d.training.checkpoint import load_checkpoint, write_atomic
from vae3d.training.distributed import World


def sharded(world, folder, steps, resume):
    def validate(network, step):
        x = torch.zeros(1, 1, 8, 8, 8)
        return {"val/mae": float(network.decode(network.encode(x).mean).mean())}

    trainer = toy_trainer(
        folder, world, max_steps=steps, sharding="fsdp", save_every=2, grad_accum=2, batch_size=1,
        validate=validate, val_every=2,
    )  # fmt: skip
    kinds = {type(p).__name__ for p in trainer.task.network.parameters()}
    if resume:
        trainer.load_state_dict(load_checkpoint(folder / "last.pt"))
        trainer.owed = ["validation"]  # as after a kill: the sharded weights first run in there
    trainer.fit()
    return trainer.tracker.losses(), kinds == {"DTensor"}


def alone(folder, steps):
    trainer = toy_trainer(folder, World(), max_steps=steps, batch_size=4, save_every=2)
    trainer.fit()
    return trainer.tracker.losses()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
def test_sharded_training_equals_one_process_and_its_checkpoints_are_whole(tmp_path):
    wanted = alone(tmp_path / "alone", 4)
    (losses, is_sharded), _ = on_ranks(2, sharded, tmp_path / "fsdp", 4, False)
    assert is_sharded
    assert losses == pytest.approx(wanted, rel=1e-4)
    mine = load_checkpoint(tmp_path / "fsdp" / "last.pt")
    theirs = load_checkpoint(tmp_path / "alone" / "last.pt")
    for part in ("model", "ema"):
        assert mine[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            torch.testing.assert_close(mine[part][name], value, rtol=1e-3, atol=1e-4)
    tiny_vae().load_state_dict(mine["ema"])

    # Two steps more, sharded from the checkpoint of one process.
    write_atomic(tmp_path / "fsdp" / "last.pt", theirs)
    (losses, _), _ = on_ranks(2, sharded, tmp_path / "fsdp", 6, True)
    assert losses == pytest.approx(alone(tmp_path / "longer", 6)[4:], rel=0.05)


def gathering(world):
    """What is gathered for a checkpoint: how many tensors live at once, and on what device."""
    trainer = toy_trainer("/nowhere", world, max_steps=1, sharding="fsdp", save_every=0)
    trainer.fit()
    full_tensor, gathered, most = DTensor.full_tensor, [], 0

    def spy(self):
        nonlocal most
        most = max(most, 1 + sum(weak() is not None for weak in gathered))
        tensor = full_tensor(self).as_subclass(OnGPU)
        gathered.append(weakref.ref(tensor))
        return tensor

    DTensor.full_tensor = spy
    state = trainer.state_dict()
    kept = [*state["model"].values(), *state["ema"].values()]
    kept += [v for s in state["optimizers"]["generator"]["state"].values() for v in s.values()]
    return most, len(gathered), sorted({type(value).__name__ for value in kept})


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
def test_a_sharded_checkpoint_is_gathered_one_tensor_at_a_time_for_the_main_rank_alone():
    (most, count, kinds), (other_most, other_count, other_kinds) = on_ranks(2, gathering)
    assert most == other_most == 1 and count == other_count > 100
    assert kinds == ["Tensor"]
    assert other_kinds == ["NoneType", "Tensor"]  # Adam's counts are no parts of anything


def _join_and_leave(pipe, environ):
    os.environ.update(environ)
    with distributed.open_world("cpu", timeout_minutes=1) as world:
        group = world.control
        world.barrier()
    pipe.send(any(group is one for one in distributed._groups))
    os._exit(0)


def test_process_groups_outlive_what_was_done_with_them():
    """Freed by the last model that used them, they now and then waited for Python's lock."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    pipes = [context.Pipe() for _ in range(2)]
    for rank, (_, theirs) in enumerate(pipes):
        environ = where | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        context.Process(target=_join_and_leave, args=(theirs, environ), daemon=True).start()
    assert all(ours.poll(60) and ours.recv() for ours, _ in pipes)


def adversarial(world, folder, adaptive, sharding):
    """Train with a discriminator; the losses, and the weight of its term at the end."""
    discriminator = partial(PatchDiscriminator, channels=8, num_layers=1)
    game = partial(
        Adversarial, spatial_dims=3, discriminator=discriminator, adaptive=adaptive, weight=0.5
    )
    loss = partial(VAELoss, adversarial=game)
    batch = 4 // world.size
    torch.manual_seed(1)
    trainer = toy_trainer(
        folder, world, loss, max_steps=4, sharding=sharding, batch_size=batch, save_every=4
    )
    trainer.fit()
    rows = [trainer.tracker.losses(f"train/{name}") for name in ("loss", "discriminator_loss")]
    return rows, float(trainer.task.loss.adversarial.adaptive_weight)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
@pytest.mark.parametrize("adaptive", [False, True])
def test_sharded_training_takes_an_adversarial_term(tmp_path, adaptive):
    wanted, weight = adversarial(World(), tmp_path / "alone", adaptive, "ddp")
    (losses, mine), _ = on_ranks(2, adversarial, tmp_path / "fsdp", adaptive, "fsdp")
    assert losses[0] == pytest.approx(wanted[0], rel=1e-3)
    assert losses[1] == pytest.approx(wanted[1], rel=1e-3)
    assert mine == pytest.approx(weight, rel=1e-2) and (mine > 0) == adaptive
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("fsdp", "alone")]
    for name, value in states[1]["task"]["loss"].items():
        torch.testing.assert_close(states[0]["task"]["loss"][name], value, rtol=1e-2, atol=1e-3)
