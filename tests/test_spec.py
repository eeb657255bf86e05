"""Recipes: a network's classes and arguments as plain data, and back."""

import copy
import inspect
import json
import pickle
import subprocess
import sys
from functools import partial

import docstring_parser
import pytest
import torch

from vae3d.models.attention import GlobalAttention, PatchAttention
from vae3d.models.blocks import ConvNeXtBlock, ResBlock
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.downsample import HaarDown
from vae3d.models.norm import GroupNorm, RMSNorm
from vae3d.models.posterior import SoftplusHead
from vae3d.models.presets import AutoencoderKL, MonaiVAE, T1LightVAE
from vae3d.models.spec import Described, build, describe, factory
from vae3d.models.upsample import TransposeUp

NETWORKS = {
    "sockets": partial(
        CustomVAE,
        channels=(8, 16),
        factors=((1, 1, 1), (2, 2, 1)),
        num_res_blocks=(1, 2),
        block=partial(ConvNeXtBlock, kernel=3),
        down=HaarDown,
        up=partial(TransposeUp, kernel=3),
        norm=RMSNorm,
        act="gelu",
        attention=partial(PatchAttention, window=(2, 2, 1)),
        attention_levels=(False, True),
        mid_attention=GlobalAttention,
        posterior=SoftplusHead,
    ),
    "stable diffusion": partial(AutoencoderKL, base_ch=4, ch_mult=(1, 2), num_groups=2),
    "monai": partial(MonaiVAE, channels=(4, 8), norm_num_groups=4),
    "positional": partial(CustomVAE, 2, 3, channels=(4,), norm=partial(GroupNorm, num_groups=4)),
    "t1 light": partial(T1LightVAE, num_channels=(4, 8), norm_num_groups=4),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_is_rebuilt_from_json(make):
    vae = make()
    again = build(json.loads(json.dumps(vae.spec)))
    assert type(again) is type(vae)
    assert again.spec == vae.spec == describe(make)
    again.load_state_dict(vae.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_copy_keeps_its_recipe(copier):
    vae = NETWORKS["t1 light"]()
    assert copier(vae).spec == vae.spec


def test_defaults_are_written_out_so_that_a_later_version_builds_the_same():
    spec = CustomVAE(channels=(4,), norm=partial(GroupNorm, num_groups=4)).spec
    assert spec["init_args"]["latent_channels"] == 4
    assert spec["init_args"]["block"] == {
        "class_path": "vae3d.models.blocks.ResBlock",
        "init_args": {"dropout": 0.0, "zero_init": False},
    }
    assert spec["init_args"]["norm"]["init_args"] == {"num_groups": 4, "eps": 1e-6}


class MyBlock(ResBlock):
    """A block of a user's own."""


def test_foreign_classes_need_trust_by_name():
    vae = CustomVAE(channels=(4,), norm=partial(GroupNorm, num_groups=4), block=MyBlock)
    with pytest.raises(ValueError, match=f"--trust {__name__.split('.')[0]}") as error:
        build(vae.spec)
    assert "\n" not in str(error.value)
    again = build(vae.spec, trust=[__name__])
    assert isinstance(again.encoder[1], MyBlock)
    spec = {"class_path": "os.system", "init_args": {"command": "true"}}
    with pytest.raises(ValueError, match="not part of vae3d"):
        build(spec)
    with pytest.raises(ValueError, match="not part of vae3d"):
        build({"class_path": "vae3d_evil.Model", "init_args": {}})


def test_classes_that_are_gone_are_the_users_mistake():
    with pytest.raises(ValueError, match="cannot be imported"):
        build({"class_path": "vae3d.models.blocks.NoSuchBlock", "init_args": {}})
    with pytest.raises(ValueError, match="cannot be imported"):
        build({"class_path": "vae3d.models.nowhere.Block", "init_args": {}})


SPEC = CustomVAE(channels=(4,), norm=partial(GroupNorm, num_groups=4)).spec


def with_block(path, **args):
    return SPEC | {
        "init_args": SPEC["init_args"] | {"block": {"class_path": path, "init_args": args}}
    }


@pytest.mark.parametrize(
    "path",
    [
        "vae3d.config.main",
        "vae3d.config.partial",
        "vae3d.config.os.system",
        "vae3d.training.distributed.subprocess.run",
        "vae3d.commands.demo_data.demo_data",
        "vae3d.tracking.tracker.Tracker",
        "vae3d.models.norm.GroupNorm",
        "vae3d.models.custom_vae.Described",
        "vae3d.load_model",
    ],
)
def test_a_checkpoint_names_classes_of_its_sockets_and_no_function(path, tmp_path):
    with pytest.raises(ValueError, match="a class of Block"):
        build(with_block(path, out_dir=str(tmp_path / "made")))
    if not path.endswith("Described"):
        with pytest.raises(ValueError, match="a class of Described"):
            build({"class_path": path, "init_args": {"out_dir": str(tmp_path / "made")}})
    assert not (tmp_path / "made").exists()


def test_trust_alone_imports_nothing_that_is_no_class_of_the_socket(tmp_path, monkeypatch):
    (tmp_path / "trap_of_a_checkpoint.py").write_text(
        "raise SystemExit('imported')\nclass Evil: ..."
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = with_block("trap_of_a_checkpoint.Evil")
    for trust in ((), ["trap_of_a_checkpoint"]):
        with pytest.raises(ValueError, match="trap_of_a_checkpoint"):
            build(spec, trust=trust)


class Keeper(CustomVAE):
    """A network that keeps plain data, and a class where it has no socket."""

    def __init__(self, channels: tuple[int, ...] = (32,), kept: dict | None = None):
        super().__init__(channels=channels)
        self.kept = kept


def test_a_free_value_of_a_recipe_stays_plain_data():
    kept = {"class_path": "vae3d.models.blocks.ResBlock", "init_args": {}}
    for value in (kept, {"class_path": "os.system", "init_args": {"command": "exit 1"}}):
        vae = Keeper(kept=value)
        assert build(vae.spec, trust=[__name__]).kept == value


@pytest.mark.parametrize(
    "damage", [None, [], {"class_path": None, "init_args": {}}, {"init_args": {}}]
)
def test_a_damaged_recipe_is_the_users_mistake(damage):
    with pytest.raises(ValueError, match="the model"):
        build(damage)


def test_a_recipe_nested_without_end_is_the_users_mistake():
    spec = []
    for _ in range(100_000):
        spec = [spec]
    with pytest.raises(ValueError, match="nested too deeply"):
        build(SPEC | {"init_args": {"channels": spec}})
    while spec:  # taken apart by hand: freed as a whole it would recurse
        spec = spec[0]


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(ValueError, match="cannot be saved"):
        describe(partial(CustomVAE, block=lambda *a: ResBlock(*a)))
    with pytest.raises(ValueError, match="cannot be saved"):
        describe(torch.zeros(2))


def test_sockets_come_back_as_factories():
    socket = factory(describe(partial(GroupNorm, num_groups=2)))
    assert socket(8).num_groups == 2


def test_recipes_need_no_torch():
    code = "import sys, vae3d.models.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_class_tells_all_its_arguments_be_it_in_the_words_of_its_base():
    import vae3d.models.presets
    import vae3d.stage2.diffusion  # noqa: F401

    classes = [Described]
    for cls in classes:
        classes += cls.__subclasses__()
    for cls in (c for c in classes[1:] if c.__module__.startswith("vae3d.")):
        told = [p.arg_name for p in docstring_parser.parse(cls.__doc__).params]
        assert sorted(told) == sorted(inspect.signature(cls).parameters), cls
