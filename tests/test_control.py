"""A ControlNet on top of a diffusion model: its numbers, what it sees, training, sampling."""

import json

import numpy as np
import pytest
import torch
from monai.inferers import ControlNetDiffusionInferer
from monai.networks.nets import ControlNet, DiffusionModelUNet
from test_diffusion import UNET, model, wake
from test_stage2_commands import ldm, make_home
from toys import on_ranks

from loaders import Preprocess, VolumeStore, read_volume, write_volume
from loaders.readers import Volume
from vae3d.cli import main
from vae3d.commands.sample import sample
from vae3d.commands.train_ldm import open_controls
from vae3d.stage2.control import Controls, cell_means, controls_to_draw, labels_in
from vae3d.stage2.diffusion import LatentDiffusion
from vae3d.stage2.latents import LatentStore, read_info
from vae3d.stage2.task import LatentTask
from vae3d.training.checkpoint import load_checkpoint, load_model
from vae3d.training.distributed import World


def controlled(dims=2, awake=True, **changes):
    """A model whose ControlNet sees two channels, begun with a base; both as wanted awake."""
    torch.manual_seed(0)
    base = model(dims, **changes)
    torch.manual_seed(1)
    both = LatentDiffusion(3, dims, dict(UNET), control_channels=2, **changes)
    both.begin_with(base)
    return base, wake(both) if awake else both.eval()


# Numbers


@pytest.mark.parametrize("dims", [2, 3])
def test_a_control_that_was_never_trained_changes_nothing(dims):
    base, both = controlled(dims, awake=False)
    z, noise, time = *torch.randn(2, 2, 3, *(7, 5, 6)[:dims]), torch.rand(2)
    control = torch.rand(2, 2, *z.shape[2:])
    assert torch.equal(both.loss(z, noise, time, control=control), base.loss(z, noise, time))
    assert torch.equal(both.sample(noise, 3, control=control), base.sample(noise, 3))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_controlled_prediction_is_that_of_monais_networks_and_inferer(dims):
    _, both = controlled(dims)
    size = {"spatial_dims": dims, "in_channels": 3}
    unet = DiffusionModelUNet(**UNET, **size, out_channels=3).eval()
    net = ControlNet(
        **UNET, **size, conditioning_embedding_in_channels=2,
        conditioning_embedding_num_channels=UNET["channels"][:1],
    ).eval()  # fmt: skip
    unet.load_state_dict(both.unet.state_dict())
    net.load_state_dict(both.controlnet.state_dict())
    z, noise, t = *torch.randn(2, 2, 3, *(8, 4, 8)[:dims]), torch.tensor([3.0, 700.0])
    control = torch.rand(2, 2, *z.shape[2:])
    (scheduler,) = both.scheduler
    theirs = ControlNetDiffusionInferer(scheduler)(z, unet, net, noise, t, control)
    ours = both.predict(scheduler.add_noise(z, noise, t), t, control=control)
    assert torch.equal(ours, theirs)
    assert (ours - both.predict(scheduler.add_noise(z, noise, t), t)).abs().max() > 1e-3
    loss = both.loss(z, noise, t / 1000, control=control)
    assert torch.allclose(loss, ((theirs - (z - noise)) ** 2).mean(), atol=1e-6)


def test_the_controlnet_begins_as_a_copy_of_the_encoder_with_its_classes_and_attention():
    base, both = controlled(classes=("a", "b"), condition_channels=2, awake=False)
    encoder, net = base.unet.state_dict(), both.controlnet.state_dict()
    shared = net.keys() & encoder.keys()
    assert all(torch.equal(net[name], encoder[name]) for name in shared)
    assert {name.split(".")[0] for name in net.keys() - shared} == {
        *("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
    }
    both.loss(
        torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6), torch.rand(2), None,
        torch.tensor([0, 1]), torch.randn(2, 2, 3, 3), torch.rand(2, 2, 6, 6),
    ).backward()  # fmt: skip
    assert all((p.grad is not None) == n.startswith("controlnet.") for n, p in
               both.named_parameters())  # fmt: skip
    assert both.controlnet.controlnet_mid_block.conv.weight.grad.any()


def test_the_scale_of_a_control_takes_it_back_and_guidance_leaves_it():
    base, both = controlled(classes=("a", "b"))
    noise, control, label = torch.randn(1, 3, 6, 6), torch.rand(1, 2, 6, 6), torch.tensor([0])
    how = dict(label=label, guidance=2.0)
    off = both.sample(noise, 3, control=control, control_scale=0.0, **how)
    assert torch.allclose(off, base.sample(noise, 3, **how), atol=1e-5)
    t, scale = torch.tensor([500]), {"guidance": 2.0, "control": control}
    guided = both._guided(noise, t, label=label, condition=None, **scale)
    parts = [both.predict(noise, t, None, torch.tensor([c]), control) for c in (2, 0)]
    assert torch.allclose(guided, parts[0] + 2 * (parts[1] - parts[0]), atol=1e-5)


# What it sees


def write_map(folder, name, data, affine):
    folder.mkdir(parents=True, exist_ok=True)
    write_volume(folder / f"{name}.nii.gz", Volume(data[None], np.asarray(affine, float)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A VAE (`run`), its volumes, their latents, and maps of the volumes on their grids (`maps`).

    Of two labels: half is 3, a corner is 7.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = make_home(tmp_path_factory.mktemp("control"), max_steps=2)
        patch.setenv("VAE3D_CACHE", str(folder / "cache"))
        for path in sorted((folder / "volumes").glob("*.nii.gz")):
            volume = read_volume(path)
            labels = np.zeros(volume.data.shape[1:], np.uint8)
            labels[: len(labels) // 2], labels[-4:, -4:, -4:] = 3, 7
            write_map(folder / "maps", path.name[:2], labels, volume.affine)
        yield folder


@pytest.fixture
def maps(home):
    return home / "maps"


def test_labels_become_the_parts_of_latent_voxels_that_they_fill(home, maps):
    train = LatentStore(home / "latents", split="train")
    seen, _ = open_controls(str(maps), "base", train, None)
    assert seen.labels == (3, 7) and seen.channels == 2
    name = train.ids[1]
    # The volume is turned to RAS+ before it is encoded; so has to be its map.
    own = VolumeStore.build([maps / f"{name}.nii.gz"], preprocess=Preprocess(intensity="raw"))
    labels = torch.from_numpy(own.read(0))
    assert labels.shape[1:] == tuple(train.infos[1]["volume_shape"][1:])
    for channel, label in enumerate((3, 7)):
        whole = (labels == label).float()
        cells = [whole[:, a : a + 2, b : b + 2, c : c + 2].mean() for a in range(0, 18, 2)
                 for b in range(0, 15, 2) for c in range(0, 13, 2)]  # fmt: skip
        wanted = torch.stack(cells).reshape(9, 8, 7)
        assert torch.allclose(seen.read(1)[channel], wanted) and wanted.any()


def test_a_control_on_another_grid_is_brought_over_by_its_affine(home, tmp_path, maps):
    """A map at twice the resolution, with a border more, is the same control."""
    train = LatentStore(home / "latents", split="train")
    volume = read_volume(maps / "v0.nii.gz")
    fine = np.pad(np.kron(volume.data[0], np.ones((2, 2, 2), np.uint8)), 6)
    shift = np.diag([0.5, 0.5, 0.5, 1.0])
    shift[:3, 3] = -0.25 - 3
    write_map(tmp_path / "fine", "v0", fine, volume.affine @ shift)
    info = [train.infos[0]]
    one, two = (
        Controls(VolumeStore.build([place / "v0.nii.gz"], preprocess=raw), info, (3, 7)).read(0)
        for raw in [Preprocess(intensity="raw")]
        for place in (maps, tmp_path / "fine")
    )
    assert torch.equal(one, two)


def test_a_volume_is_seen_as_its_intensities(home):
    train = LatentStore(home / "latents", split="train")
    seen, _ = open_controls(str(home / "volumes"), "base", train, None)
    assert seen.labels == () and seen.channels == 1
    store = VolumeStore.build([home / "volumes" / f"{train.ids[2]}.nii.gz"])
    wanted = cell_means(torch.from_numpy(store.read(0)), (2, 2, 2))
    assert torch.allclose(seen.read(2), wanted, atol=1e-6)


def test_cells_at_the_end_are_means_of_the_voxels_that_are_there():
    x = torch.arange(5.0).reshape(1, 5, 1).expand(1, 5, 3)
    assert cell_means(x, (2, 3)).tolist() == [[[0.5], [2.5], [4.0]]]


def test_what_has_many_values_or_broken_ones_is_no_label_map():
    class Store(list):
        def read(self, index):
            return self[index]

    few = np.array([[0, 1, 5]], np.float32)
    assert labels_in(Store([few, few + 1])) == (1, 2, 5, 6)
    assert labels_in(Store([few, few / 2])) == ()
    assert labels_in(Store([np.arange(80, dtype=np.float32)[None]])) == ()
    assert labels_in(Store([np.ones((2, 3), np.float32)])) == ()


# Training and sampling


@pytest.fixture(scope="module")
def base(home, tmp_path_factory):
    run = tmp_path_factory.mktemp("base") / "ldm"
    ldm(home / "latents", run, label="sex", ema_decay=0.9, max_steps=2, val_every=0)
    return run


def by_map(home, base, out_dir, **options):
    how = dict(label="sex", control=str(home / "maps"), base=str(base), ema_decay=0.9)
    how |= dict(max_steps=4, val_every=2, lr=1e-2)
    assert ldm(home / "latents", out_dir, **(how | options)) == 0
    return out_dir


@pytest.fixture(scope="module")
def run(home, base, tmp_path_factory):
    return by_map(home, base, tmp_path_factory.mktemp("by_map") / "ldm")


def test_training_moves_the_controlnet_alone_and_a_resumed_run_is_the_same(
    home, base, run, tmp_path, capsys
):
    again = tmp_path / "again"
    by_map(home, base, again, media_every=4, media_volumes=1, max_hours=1e-9)  # one step
    assert "control: labels 3, 7, 2 channels" in capsys.readouterr().out
    by_map(home, base, again, media_every=4, media_volumes=1)
    one, two = (load_checkpoint(x / "checkpoints" / "last.pt") for x in (run, again))
    assert one["step"] == two["step"] == 4
    trained = load_model(base).state_dict()
    for part in ("model", "ema"):
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), f"{part} {name}"
            if not name.startswith("controlnet."):
                assert torch.equal(value, trained[name]), f"{part} {name}"
    moved = one["model"]["controlnet.controlnet_mid_block.conv.weight"]
    assert moved.any() and one["spec"]["init_args"]["control_labels"] == [3, 7]
    assert list((again / "media").iterdir())


def _gradients(world, latents, maps):
    from loaders import PatchLoader
    from vae3d.training.checkpoint import Checkpoints
    from vae3d.training.options import Loop
    from vae3d.training.trainer import Trainer

    _, both = controlled(3)
    store = LatentStore(latents, split="train")
    seen, _ = open_controls(maps, "base", store, None)
    task = LatentTask(both.train(), store, controls=seen)
    how = dict(batch_size=2 // world.size, rank=world.rank, world_size=world.size, threads=0)
    loader = PatchLoader(store, patching=None, **how)
    loop = Loop(max_steps=1, amp="off", grad_accum=2)
    trainer = Trainer(task, loader, Checkpoints(maps), world, loop=loop)
    stream = loader.stream()
    trainer.backward([next(stream), next(stream)])
    return {n: p.grad for n, p in both.named_parameters() if p.grad is not None}


def test_ranks_and_accumulation_have_the_gradients_of_one(home, maps):
    alone = _gradients(World(), str(home / "latents"), str(maps))
    one, two = on_ranks(2, _gradients, str(home / "latents"), str(maps))
    assert alone.keys() == one.keys() and all(n.startswith("controlnet.") for n in alone)
    for name, value in alone.items():
        assert torch.equal(one[name], two[name]), f"{name} differs between ranks"
        assert torch.allclose(one[name], value, rtol=1e-3, atol=1e-6), name


def test_samples_lie_on_their_controls_and_follow_them(home, run, maps, tmp_path):
    how = dict(steps=2, device="cpu", media=False)
    volume = read_volume(maps / "v4.nii.gz")
    write_map(tmp_path / "wide", "w", np.pad(volume.data[0], ((0, 5), (0, 0), (0, 0))),
              volume.affine)  # fmt: skip
    sample(ldm=str(run), out_dir=str(tmp_path / "s"), control=str(maps), n=2, **how)
    wide = str(tmp_path / "wide" / "w.nii.gz")
    sample(ldm=str(run), out_dir=str(tmp_path / "w"), control=wide, n=1, **how)
    off = dict(control=str(maps), control_scale=0.0, n=1)
    sample(ldm=str(run), out_dir=str(tmp_path / "off"), **off, **how)
    sample(ldm=str(run), out_dir=str(tmp_path / "none"), n=1, **how)
    at = {
        name: [read_volume(p) for p in sorted((tmp_path / name / "ldm").glob("*.nii.gz"))]
        for name in ("s", "w", "off", "none")
    }
    facts = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert [facts[f"ldm/sample_00{i}"]["control"] for i in (0, 1)] == ["v0", "v1"]
    for i in (0, 1):
        info = read_info(home / "latents" / f"v{i}.safetensors")
        np.testing.assert_allclose(at["s"][i].affine, info["source"]["undo"]["affine"], atol=1e-4)
    np.testing.assert_allclose(at["off"][0].data, at["none"][0].data, atol=1e-2)
    assert np.abs(at["s"][0].data - at["off"][0].data).max() > 0.1
    assert sorted(at["w"][0].data.shape[1:]) == sorted((23, 15, 13))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train-ldm {latents} --control {maps}", "--control is added to a trained model"),
        ("train-ldm {latents} --base {base}", "--base is what --control is added to"),
        ("train-ldm {latents} --control {maps} --base {run} --label sex", "not a run of vae3d"),
        ("train-ldm {latents} --control {maps} --base {base}", "--label: --base was trained with"),
        ("train-ldm {latents} --control {maps} --base {base} --label sex --process ddpm",
         "--process: the network is that of --base"),
        ("train-ldm {latents} --control {maps} --base {base} --label sex --crop [4,4,4]",
         "--crop does not go with --control"),
        ("train-ldm {latents} --control {few} --base {base} --label sex", "none is called 'v1'"),
        ("sample --ldm {base} --control {maps}", "trained without --control"),
        ("sample --ldm {base} --control {maps} --grid [4,4,4]", "--grid does not go with"),
        ("sample --checkpoint {run} --latents {latents} --control {maps}", "need --ldm"),
        ("sample --ldm {base} --control_scale -1", "--control_scale is -1"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_with_the_remedy(home, base, maps, tmp_path, line, said, capsys):
    volume = read_volume(maps / "v0.nii.gz")
    write_map(tmp_path / "few", "v0", volume.data[0], volume.affine)
    places = {name: home / name for name in ("latents", "run")}
    places |= {"base": base, "maps": maps, "few": tmp_path / "few"}
    with pytest.raises(SystemExit) as stop:
        main([*line.format(**places).split(), "--out_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said in printed[-1], printed
    assert not (tmp_path / "out").exists()


def test_controls_that_do_not_fit_are_one_line(home, maps, tmp_path):
    info = read_info(home / "latents" / "v0.safetensors")
    volume = read_volume(maps / "v0.nii.gz")

    def drawn(name, data, affine, labels=(3, 7), channels=2):
        write_map(tmp_path / name, "x", data, affine)
        found = controls_to_draw(str(tmp_path / name), info, Preprocess(), labels, channels)
        return found.read(0)

    grid = volume.data[0].astype(np.int16)
    assert drawn("good", grid, volume.affine).shape == (2, 9, 8, 7)
    with pytest.raises(ValueError, match=r"has voxels of .* mm, the model learned .*; resample"):
        drawn("coarse", grid, volume.affine @ np.diag([2, 2, 2, 1]))
    with pytest.raises(ValueError, match="holds label 1; the model knows 3, 7"):
        drawn("other", np.minimum(grid, 1), volume.affine)
    with pytest.raises(ValueError, match="has 1 channels, the model takes 2"):
        drawn("one", grid, volume.affine, (), 2)
    far = volume.affine.copy()
    far[:3, 3] += 500
    write_map(tmp_path / "far", "v0", grid, far)
    store = VolumeStore.build([tmp_path / "far" / "v0.nii.gz"], preprocess=Preprocess())
    with pytest.raises(ValueError, match="lies beside v0 in space"):
        Controls(store, [info], (3, 7)).read(0)
