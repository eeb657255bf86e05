"""Training with Lightning's Trainer instead of ours (only importer of lightning).

    lit = LitVAE(CustomVAE(...), VAELoss(...), partial(torch.optim.AdamW, lr=1e-4))
    lightning.Trainer(max_steps=1000).fit(lit, PatchLoader(store, ...), val_loader)
    lit.model                                   # the CustomVAE itself, trained

Losses, noise and the adversarial game are those of `VAETask`, so both trainers follow one recipe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loaders import SliceStore, VolumeStore
from vae3d.losses.term import mean
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import Quantized
from vae3d.training.checkpoint import checkpoint_of
from vae3d.training.distributed import World
from vae3d.training.linear_code import fit_linear_code
from vae3d.training.task import VAETask, weight_of

ADAMW = partial(torch.optim.AdamW, lr=1e-4)


class LitVAE(lightning.LightningModule):
    """A VAE, its loss and its optimizers for `lightning.Trainer`.

    Without a discriminator Lightning drives the optimizer, and its accumulation and clipping apply.
    With one, both optimizers are driven here (Lightning's manual optimization), one batch an
    update; on several devices use `strategy="ddp_find_unused_parameters_true"`.

    Weights lie under `model.` with the names of `CustomVAE`, those of the loss under `loss.`. A
    checkpoint is one of Lightning and of vae3d: `evaluate`, `encode` and `convert` take it.

    A `linear_code` is fitted to the training loader's patches before the first update, unless the
    network comes from a checkpoint.

    Args:
        model: The VAE; `lit.model` is this very object.
        loss: Named terms, see `vae3d.losses.vae_loss`; None for L1 and KL.
        optimizer: Makes an optimizer from parameters.
        discriminator_optimizer: The same for the discriminator; None for `optimizer`.
        seed: Seed of the posterior's noise.
    """

    updates: Tensor

    def __init__(
        self,
        model: CustomVAE,
        loss: VAELoss | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = ADAMW,
        discriminator_optimizer: Callable | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.loss = VAELoss() if loss is None else loss
        self.make_optimizer = optimizer
        self.make_discriminator_optimizer = discriminator_optimizer or optimizer
        # In a tuple: the task shares the two modules above and must not register them again.
        self._task = (VAETask(self.model, self.loss, seed),)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.automatic_optimization = self.loss.discriminator is None

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct `(B, C, X, Y, Z)` through the posterior mean."""
        return self.model(x, sample_posterior=False)[0]

    def training_step(self, batch: Any, _batch_index: int) -> Tensor | None:
        """Return the loss of a batch; with a discriminator, update both networks."""
        (task,) = self._task
        step = int(self.updates)
        if self.automatic_optimization:
            terms = task(batch, step)
            self._log("train", terms, batch)
            return terms["loss"]
        generator, critic = _flat(self.optimizers())
        terms = task(batch, step)
        self._update(generator, terms["loss"])
        if task.discriminator_active(step):
            terms |= task.discriminator_loss(step, task.discriminator)
            self._update(critic, terms["discriminator_loss"])
        self._after_update()
        self._log("train", terms, batch)
        return None

    def validation_step(self, batch: Any, _batch_index: int) -> None:
        """Log the distance of the reconstruction through the posterior mean, as `val/mae`."""
        x = batch.image
        recon, posterior = self.model(x, sample_posterior=False)
        weight = weight_of(batch)
        error = recon - x
        terms = {"mae": mean(error.abs(), weight), "mse": mean(error.square(), weight)}
        if isinstance(posterior, Quantized):
            terms["perplexity"], terms["usage"] = posterior.use()
        else:
            terms["kl"] = posterior.kl()
        self._log("val", terms, batch)

    def configure_optimizers(self) -> Optimizer | list[Optimizer]:
        """One optimizer for the model and the loss's own parameters, one for a discriminator."""
        parameters = [*self.model.parameters(), *self.loss.generator_parameters()]
        generator = self.make_optimizer(parameters)
        critic = self.loss.discriminator
        if critic is None:
            return generator
        return [generator, self.make_discriminator_optimizer(critic.parameters())]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count the updates that Lightning drives; the schedules of the loss follow them."""
        super().optimizer_step(*args, **kwargs)
        self._after_update()

    def on_train_start(self) -> None:
        """Fit a new network's linear code; learn from a loader of ours how volumes are prepared."""
        loader = _flat(self.trainer.train_dataloader)[0]
        # A network with a contract comes from a checkpoint, and its linear code with it.
        is_new = self.model.contract is None and not int(self.updates)
        if is_new and self.model.linear_code is not None:
            world = World(self.global_rank, self.trainer.world_size)
            fit_linear_code(self.model, (x for batch in loader for x in batch.image), world)
        store = getattr(loader, "store", None)
        if self.model.contract is not None or not isinstance(store, (VolumeStore, SliceStore)):
            return
        self.model.contract = {"preprocess": store.preprocess.to_dict(), "subjects": len(store)}
        if isinstance(store, SliceStore):
            data = {"slice_axis": store.axis, "num_slices": store.num_slices}
            self.model.contract |= {"data": data, "subjects": len(store.volumes)}
        if loader.plan.patch_size is not None:
            self.model.contract["patch_size"] = list(loader.plan.patch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put beside Lightning's entries what makes it a checkpoint of ours; no tensor twice."""
        try:
            spec = self.model.spec
        except ValueError as error:  # a function in a socket: still a checkpoint of Lightning
            warnings.warn(f"vae3d cannot load this checkpoint: {error}", stacklevel=2)
            return
        contract = (self.model.contract or {}) | {"step": int(self.updates)}
        checkpoint |= checkpoint_of(spec, self.model.state_dict(), contract)

    def on_train_epoch_start(self) -> None:
        """Tell the loader its epoch, which decides order and patches."""
        for loader in _flat(self.trainer.train_dataloader):
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(self.current_epoch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, _index: int) -> Any:
        """Move a batch of our loaders, or anything that Lightning knows."""
        if hasattr(batch, "to"):
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, _index)

    def _update(self, optimizer: Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def _after_update(self) -> None:
        self.updates += 1
        (task,) = self._task
        task.after_step()

    def _log(self, part: str, terms: dict[str, Tensor], batch: Any) -> None:
        named = {f"{part}/{name}": value.detach().float() for name, value in terms.items()}
        self.log_dict(named, batch_size=len(batch.image), sync_dist=part == "val")


def _flat(loaders: Any) -> list[Any]:
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
