"""Passes that a team of ranks shares: what commands write is what one process writes."""

import itertools
import json
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from test_exact import tiny, trained
from toys import on_ranks

from loaders import read_volume
from vae3d.commands.decode import decode
from vae3d.commands.encode import VolumeSource, encode
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.posterior import VQ
from vae3d.stage2.latents import read_latent
from vae3d.training import distributed
from vae3d.training.distributed import Mesh
from vae3d.training.passes import Passes, together, work_of

ROWS = 13  # seven cells of the factor 2, the last one cut off


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A volume of 13 rows along y, a network, and what one process makes of the two."""
    home = tmp_path_factory.mktemp("passes")
    (home / "volumes").mkdir()
    volume = np.random.default_rng(0).random((10, ROWS, 9), np.float32)
    np.save(home / "volumes" / "v.npy", volume)
    norm = partial(GroupNorm, num_groups=4)
    torch.manual_seed(0)
    vae = trained(CustomVAE(channels=(4, 8), num_res_blocks=1, norm=norm))
    vae.contract = {"preprocess": {}}
    vae.save_pretrained(home / "vae")
    commands(home, "alone")
    return home


def commands(home, name, **more):
    """Evaluate, encode and decode into folders of this name."""
    vae, out = str(home / "vae"), home / name
    volumes = str(home / "volumes"), str(home / "cache")
    how = dict(device="cpu", **more)
    quiet = dict(wandb="disabled", media=False, baseline=False)
    evaluate(vae, EvaluationData(*volumes), str(out / "evaluation"), mode="full", **quiet, **how)
    encode(vae, str(out / "latents"), VolumeSource(*volumes), **how)
    decode(str(out / "latents"), vae, str(out / "decoded"), **how)


def commands_on_a_rank(world, home):
    distributed.open_world = contextmanager(lambda device: iter([world]))
    shared = []
    ask = Passes.ask
    Passes.ask = lambda self, half, x, layout: shared.append(half) or ask(self, half, x, layout)
    commands(home, "together", sharding="spatial", slab_axis="y")
    return len(shared)


def test_commands_of_three_ranks_write_what_one_writes(home):
    """Slabs of 4, 4 and 5 rows, and `scale_psnr` decodes a second time."""
    passes = on_ranks(3, commands_on_a_rank, home)
    assert passes == [3 + 1 + 1, 0, 0]
    one, all_ = (
        json.loads((home / name / "evaluation" / "summary.json").read_text())
        for name in ("alone", "together")
    )
    assert one["metrics"].keys() == all_["metrics"].keys() and one["volumes"] == 1
    for name, value in one["metrics"].items():
        wanted = pytest.approx(value["mean"], rel=1e-4, abs=1e-6)
        assert all_["metrics"][name]["mean"] == wanted, name
    for path in sorted((home / "alone" / "latents").glob("*.safetensors")):
        a, b = (read_latent(home / name / "latents" / path.name) for name in ("alone", "together"))
        assert a.mean.shape[2] == 7
        torch.testing.assert_close(b.mean, a.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.logvar, a.logvar, rtol=1e-5, atol=1e-5)
    for path in sorted((home / "alone" / "decoded").iterdir()):
        a, b = (read_volume(home / name / "decoded" / path.name) for name in ("alone", "together"))
        assert a.data.shape == (1, 10, ROWS, 9)
        np.testing.assert_allclose(b.data, a.data, rtol=1e-5, atol=1e-5)


def passes_of(world, vae, coded, x):
    """What teams of two make of a volume, and what a rank has run of it: rows, in which type."""
    team, found, run = world.team(2), [], []
    vae.encoder[0].register_forward_hook(
        lambda layer, args, y: run.append((args[0].shape[2], str(y.dtype)))
    )
    for amp in (False, True):
        with together(vae, team) as works, torch.no_grad(), half_precision(amp):
            if works:
                mean = vae.encode(x).mean
                found += [mean, vae.decode(mean), vae.encode(x[:, :, :2]).mean]  # one cell: alone
    assert "encode" not in vars(vae)
    with together(coded, team) as works, torch.no_grad():
        found += [coded.encode(x).codes] if works else []
    world.barrier()
    return found, run


def half_precision(amp):
    return torch.autocast("cpu", torch.bfloat16, enabled=amp)


def test_each_team_has_the_passes_of_one_process():
    vae = trained(tiny()).eval()
    coded = trained(tiny(posterior=partial(VQ, codebook=16))).eval()
    x = torch.rand(1, 1, ROWS, 6, 7)
    found = on_ranks(4, passes_of, vae, coded, x)
    for results, _ in found[::2]:
        assert results[-1].equal(coded.encode(x).codes)
    for (results, _), amp in itertools.product(found[::2], (False, True)):
        with torch.no_grad(), half_precision(amp):
            mean = vae.encode(x).mean
            wanted = mean, vae.decode(mean), vae.encode(x[:, :, :2]).mean
        for got, whole in zip(results[3 * amp : 3 * amp + 3], wanted, strict=True):
            assert (got - whole).norm() <= (0.05 if amp else 1e-5) * whole.norm()
    assert [results for results, _ in found[1::2]] == [[], []]
    for _, run in found:  # a slab, and what it sees of the other, in either precision
        first, second = (run[0], run[-2]) if len(run) > 2 else run
        assert (first[1], second[1]) == ("torch.float32", "torch.bfloat16")
        assert first[0] == second[0] < ROWS


def test_a_volume_too_short_for_the_ranks_goes_through_on_one_which_is_said_once(capsys):
    vae = tiny().eval()
    passes, x = Passes(vae, distributed.World(0, 3), "work", axis=1), torch.rand(1, 1, 16, 4, 16)
    with torch.no_grad():
        assert passes.decode(passes.encode(x).mean).equal(vae.decode(vae.encode(x).mean))
    (line,) = capsys.readouterr().out.splitlines()
    assert "along y than there are ranks (3)" in line and "--slab_axis" in line


def work_that_fails(world, vae):
    try:
        with together(vae, world) as works:
            assert works
            vae.encode(torch.rand(1, 1, ROWS, 6, 7))
            raise ValueError("a volume is broken")
    except ValueError as error:
        return "encode" in vars(vae), str(error)


def test_an_error_of_the_first_rank_ends_the_others():
    first, second = on_ranks(2, work_that_fails, tiny().eval())
    assert first == (False, "a volume is broken")
    assert second == (False, "rank 0 could not do what the others wait for; it says why")


def test_teams_share_the_volumes_out():
    worlds = [distributed.World(rank, 4) for rank in range(4)]
    teams = [distributed.World(rank % 2, 2) for rank in range(4)]
    works = [[*work_of(*pair, 5)] for pair in zip(worlds, teams, strict=True)]
    assert works == [[0, 2, 4], [], [1, 3], []]


@pytest.mark.parametrize("mode", ["patch", "exact"])
def test_another_mode_than_full_is_refused_in_slabs(home, tmp_path, mode):
    out = tmp_path / "out"
    how = dict(mode=mode, patch_size=(4, 4, 4), sharding="spatial", device="cpu")
    with pytest.raises(ValueError, match=f"shares full passes among the ranks, and mode is {mode}"):
        encode(str(home / "vae"), str(out), VolumeSource(str(home / "volumes")), **how)
    assert not out.exists()


@pytest.mark.parametrize(
    ("mesh", "sharding", "words"),
    [
        (Mesh(2, 4), "ddp", "{data: 2, spatial: 4} is of 8 ranks, and there are 6"),
        (Mesh(2, 3), "fsdp", "leave out one"),
    ],
)
def test_a_mesh_of_other_ranks_is_refused(mesh, sharding, words):
    with pytest.raises(ValueError, match=words):
        Mesh.of(sharding, mesh, 6)


def test_sharding_says_the_mesh_where_none_is_asked_for():
    assert Mesh.of("spatial", None, 6) == Mesh(1, 6)
    assert Mesh.of("ddp", None, 6) == Mesh.of("fsdp", None, 6) == Mesh(6, 1)
