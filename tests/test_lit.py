"""LitVAE under the real lightning.Trainer: same weights, same losses, exact resume."""

import json
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from toys import tiny_vae

from loaders import PatchLoader, Preprocess, VolumeStore
from vae3d.commands.convert import convert
from vae3d.commands.evaluate import evaluate
from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import VQ
from vae3d.training.checkpoint import load_checkpoint, load_vae
from vae3d.training.linear_code import fit_linear_code
from vae3d.training.lit import LitVAE
from vae3d.training.task import VAETask
from vae3d.weights.convert import load_weights

OPTIMIZER = partial(torch.optim.AdamW, lr=3e-3)


class MemoryStore:
    """Volumes in memory behind the interface that `PatchLoader` reads."""

    data_range = (0.0, 1.0)
    num_channels = 1

    def __init__(self, count=6, shape=(12, 8, 16)):
        generator = np.random.default_rng(0)
        self.volumes = generator.random((count, 1, *shape), np.float32)
        self.spatial_shapes = np.array([shape] * count)
        self.ids = [f"v{i}" for i in range(count)]

    def __len__(self):
        return len(self.volumes)

    def shape(self, index):
        return self.volumes[index].shape

    def read(self, index, slices=(slice(None),) * 3):
        return self.volumes[index][(slice(None), *slices)]

    def read_into(self, index, slices, out):
        out[...] = self.read(index, slices)


def patches(**options):
    defaults = dict(patch_size=(8, 4, 8), patches_per_volume=2, batch_size=3, threads=0)
    return PatchLoader(MemoryStore(), **(defaults | options))


def lit_vae(adversarial=False):
    game = None
    if adversarial:
        net = partial(PatchDiscriminator, channels=8, num_layers=1)
        game = partial(Adversarial, discriminator=net, num_slices=2, start_step=2)
    torch.manual_seed(1)
    return LitVAE(tiny_vae(), VAELoss(adversarial=game), OPTIMIZER)


def lightning_trainer(folder, callbacks=(), **options):
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


class Watch(lightning.Callback):
    """Notes each batch, saves at the updates asked for and stops after `stop` of them."""

    def __init__(self, folder, stop, save=()):
        self.folder, self.stop, self.save, self.seen = folder, stop, save, []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.seen.append(batch.corner.tolist())

    def on_train_batch_end(self, trainer, module, *_):
        updates = int(module.updates)
        if updates in self.save:
            trainer.save_checkpoint(self.folder / f"{updates}.ckpt")
        trainer.should_stop = updates >= self.stop


def fit(lit, folder, stop, save=(), resume=None):
    watch = Watch(folder, stop, save)
    trainer = lightning_trainer(folder, [watch], max_epochs=100)
    trainer.fit(lit, patches(), patches(batch_size=1), ckpt_path=resume)
    return trainer, watch.seen


@pytest.mark.parametrize("adversarial", [False, True])
def test_lightning_trains_the_vae_itself(tmp_path, adversarial):
    lit = lit_vae(adversarial)
    vae = lit.model
    x = torch.from_numpy(MemoryStore().read(0))[None]
    before = (vae.eval()(x)[0] - x).abs().mean()
    critic = lit.loss.discriminator and [p.clone() for p in lit.loss.discriminator.parameters()]
    trainer, _ = fit(lit, tmp_path, 12)
    assert int(lit.updates) == 12
    assert lit.model is vae and (vae.eval()(x)[0] - x).abs().mean() < before
    assert 0 < trainer.callback_metrics["val/mae"] < 1
    if adversarial:
        assert not all(map(torch.equal, critic, lit.loss.discriminator.parameters()))


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_resumed_fit_ends_with_the_same_weights(tmp_path, adversarial):
    """Epochs have 4 batches: cut within an epoch, at its end, and in the second one."""
    straight = lit_vae(adversarial)
    _, seen = fit(straight, tmp_path, 9, save=(2, 4, 7))
    for cut in (2, 4, 7):
        again = lit_vae(adversarial)
        _, rest = fit(again, tmp_path, 9, resume=tmp_path / f"{cut}.ckpt")
        assert rest == seen[cut:], f"cut at {cut}"
        for name, value in straight.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), f"{name}, cut at {cut}"


def test_a_linear_code_is_fitted_once_before_the_first_update(tmp_path):
    still = partial(torch.optim.SGD, lr=0.0)
    options = dict(linear_code=True, factors=((2, 2, 2), (2, 2, 2)))
    lit = LitVAE(tiny_vae(**options), optimizer=still)
    fit(lit, tmp_path, 1, save=(1,))
    seen = tiny_vae(seed=3, **options)
    fit_linear_code(seen, (x for batch in patches() for x in batch.image))
    fitted = lit.model.linear_code.state_dict()
    for name, value in seen.linear_code.state_dict().items():
        assert torch.equal(value, fitted[name]), name
    changed = torch.load(tmp_path / "1.ckpt", weights_only=True)
    changed["state_dict"]["model.linear_code.analysis.bias"] += 1
    torch.save(changed, tmp_path / "changed.ckpt")
    again = LitVAE(tiny_vae(seed=7, **options), optimizer=still)
    fit(again, tmp_path, 2, resume=tmp_path / "changed.ckpt")
    bias = again.model.linear_code.analysis.bias
    assert torch.equal(bias, fitted["analysis.bias"] + 1)


def test_a_codebook_moves_and_resumes(tmp_path):
    def lit():
        return LitVAE(tiny_vae(posterior=partial(VQ, codebook=8), linear_code=True), VAELoss())

    straight, again = lit(), lit()
    fit(straight, tmp_path, 3, save=(1,))
    fit(again, tmp_path, 3, resume=tmp_path / "1.ckpt")
    state = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(state["model.head.codebook"], straight.model.head.codebook)
    assert all(map(torch.equal, straight.state_dict().values(), again.state_dict().values()))


def test_weights_move_to_and_from_the_vae_without_conversion(tmp_path):
    lit = lit_vae()
    fit(lit, tmp_path, 2, save=(2,))
    tiny_vae(seed=5).load_state_dict(lit.model.state_dict(), strict=True)
    weights = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    vae = tiny_vae(seed=5)
    vae.load_state_dict(
        {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    )
    x = torch.rand(1, 1, 8, 4, 12)
    assert torch.equal(vae.eval()(x)[0], lit.model.eval()(x)[0])
    names = set(lit.state_dict())
    assert len(names) == len(lit.model.state_dict()) + len(lit.loss.state_dict()) + 1


def test_a_checkpoint_carries_recipe_and_contract_and_loads_everywhere(tmp_path):
    (tmp_path / "data").mkdir()
    for number, volume in enumerate(MemoryStore().volumes):
        np.save(tmp_path / "data" / f"{number}.npy", volume[0])
    prepared = Preprocess(percentiles=(1.0, 99.0), intensity="symmetric")
    paths = sorted((tmp_path / "data").iterdir())
    store = VolumeStore.build(paths, tmp_path / "cache", prepared)
    loader = PatchLoader(store, (8, 4, 8), patches_per_volume=1, batch_size=3, threads=0)
    lit = lit_vae(adversarial=True)
    trainer = lightning_trainer(tmp_path, max_steps=4)
    trainer.fit(lit, loader)
    path = tmp_path / "lit.ckpt"
    trainer.save_checkpoint(path)
    plain = sum(v.nbytes for v in lit.state_dict().values())
    assert path.stat().st_size < 4.5 * plain + 200_000  # with Adam's; no tensor twice

    state = load_checkpoint(path)
    assert Preprocess.of_checkpoint(state["preprocess"]) == prepared
    assert state["config"]["patch_size"] == [8, 4, 8]
    vae = load_vae(path)
    assert vae.contract["preprocess"] == prepared.to_dict()
    x = torch.from_numpy(store.read(0))[None]
    assert torch.equal(vae(x)[0], lit.model.eval()(x)[0])
    other = tiny_vae(seed=5)
    load_weights(other, path)
    convert(path, tmp_path / "folder")
    for again in (other.eval(), load_vae(tmp_path / "folder")):
        assert torch.equal(again(x)[0], vae(x)[0])
    out = tmp_path / "out"
    evaluate(str(path), str(tmp_path / "data"), str(out), mode="full", media=False, limit=1)
    assert json.loads((out / "summary.json").read_text())["data_range"] == [-1, 1]


def test_the_loss_is_that_of_our_own_task():
    lit, batch = lit_vae(), next(iter(patches()))
    ours = VAETask(tiny_vae(), VAELoss())
    torch.manual_seed(1)
    expected = ours(batch, 0)["loss"]
    lit.log_dict = lambda *args, **kwargs: None
    assert torch.equal(lit.training_step(batch, 0), expected)


def test_accumulation_and_clipping_are_lightnings_without_a_discriminator(tmp_path):
    lit = lit_vae()
    trainer = lightning_trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0
    )
    trainer.fit(lit, patches(batch_size=1))
    assert int(lit.updates) == 6  # 12 batches


def test_every_epoch_has_its_own_patches(tmp_path):
    _, seen = fit(lit_vae(), tmp_path, 8)
    loader = patches()
    assert seen == [batch.corner.tolist() for _ in range(2) for batch in loader]
    assert seen[:4] != seen[4:]


def test_a_network_that_cannot_be_told_still_has_checkpoints_of_lightning(tmp_path):
    lit = lit_vae()
    lit.model._arguments["norm"] = lambda channels: None  # a socket that only Python knows
    trainer = lightning_trainer(tmp_path, max_steps=1)
    trainer.fit(lit, patches())
    with pytest.warns(UserWarning, match="vae3d cannot load this checkpoint"):
        trainer.save_checkpoint(tmp_path / "lit.ckpt")
    with pytest.raises(ValueError, match="without the recipe"):
        load_checkpoint(tmp_path / "lit.ckpt")
