"""Models that outgrow a GPU: weights, gradients, moments and average cut over the ranks.

torch's own `fully_shard` (FSDP2). A checkpoint holds whole tensors whatever the sharding, so a run
may continue, and a model be loaded, on any number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from vae3d.kernels.precision import AMP, Amp
from vae3d.training.distributed import World
from vae3d.training.task import Task


def shard(task: Task, world: World, amp: Amp = "off") -> None:
    """Cut the parameters of a task over the ranks, one group for each layer of its network.

    Each rank has all of the discriminator, which is small, as with ddp.

    Args:
        task: What is trained. Its network is gathered layer by layer when it runs.
        world: The ranks.
        amp: off | bf16 | fp16, what the weights travel in; gradients are summed in float32.
    """
    critic = task.discriminator
    apart = set() if critic is None else set(critic.parameters())
    mesh = init_device_mesh(world.device.type, (world.size,))
    network = task.network
    travel = MixedPrecisionPolicy(AMP[amp], torch.float32, cast_forward_inputs=False)
    last = getattr(network, "last_layer", None)  # at which adversarial losses balance gradients
    for layer in [layer for chain in network.children() for layer in chain.children()]:
        if not (parameters := list(layer.parameters())):
            continue
        if critic is None or all(p is not last for p in parameters):
            fully_shard(layer, mesh=mesh, mp_policy=travel)
    # With a discriminator the last layer stays whole from its forward pass to its backward pass.
    fully_shard(network, mesh=mesh, reshard_after_forward=critic is None, mp_policy=travel)
    for name in ("encode", "decode"):  # the task calls these, not the network itself
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)
    fully_shard(task, mesh=mesh, ignored_params=apart)
    # torch takes for the root what runs first; the run that resumes may validate the network first.
    register_fsdp_forward_method(task, "extra_state")
    task.extra_state()
    del task.extra_state  # and the class's own again


def whole(value: Any, keep: bool = True) -> Any:
    """Gather every sharded tensor of a nested state on the CPU. All ranks must call it.

    One at a time, so that the device holds no second whole of the model.

    Args:
        value: The state.
        keep: Otherwise this rank only lends its parts, and None stands for what was gathered.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item, keep) for item in value)
    return value


def part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `like` is and laid out in memory as it is.

    The fused optimizer goes through weights and moments in the order of their bytes.
    """
    if isinstance(like, DTensor):
        value = value.to(like.device).contiguous()
        return distribute_tensor(value, like.device_mesh, like.placements)
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def parts_of_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with its tensors cut as its parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        i: {k: part(v, params[i]) if v.shape == params[i].shape else v for k, v in entry.items()}
        for i, entry in state["state"].items()
    }
    return {**state, "state": entries}
