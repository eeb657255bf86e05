"""What cannot be is refused in one line with the remedy, before anything is cached or written."""

import inspect
import re
import typing
from dataclasses import is_dataclass, replace
from functools import partial
from importlib import import_module

import nibabel
import numpy as np
import pytest

import loaders
from loaders import DataConfig, Preprocess
from vae3d import config, train_3d
from vae3d.cli import COMMANDS
from vae3d.commands.evaluate import EvaluationData, evaluate
from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.reconstruction import SSIM, Charbonnier, LearnedVariance
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.classes import buildable, made
from vae3d.ranges import RANGES, Range, check_ranges
from vae3d.training.options import Loop

TINY = [
    *("--model.channels", "[4,8]", "--model.num_res_blocks", "1", "--model.norm.num_groups", "4"),
    *("--patch_size", "[8,8,8]", "--wandb", "disabled", "--max_steps", "1", "--device", "cpu"),
]


@pytest.fixture
def volumes(tmp_path, monkeypatch):
    """Three volumes of one channel, and a cache that is empty."""
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "volumes"
    folder.mkdir()
    for number in range(3):
        data = np.random.default_rng(number).random((8, 9, 10)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / f"v{number}.nii")
    return folder


def refused(done, *words):
    """Whether a command ended as the user's mistake, in one line that says all this."""
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("error: "), done
    assert "Traceback" not in done.stderr and all(word in last for word in words), last
    return True


# Numbers ------------------------------------------------------------------------------------------


def options_of(owner):
    """Names and types of the options of a command or a class, and the classes that it builds."""
    signed = owner if not inspect.isclass(owner) or is_dataclass(owner) else owner.__init__
    hints = typing.get_type_hints(signed)
    names = [name for name in inspect.signature(owner).parameters if name in hints]
    return {name: hints[name] for name in names}


def owners():
    """Every command, and every class of ours that one of their options builds."""
    import_module("vae3d.models.presets")
    todo = [
        getattr(import_module(f"vae3d.commands.{path.split('.')[0]}"), path.split(".")[1])
        for path, _ in COMMANDS.values()
    ]
    seen = set()
    while todo:
        owner = todo.pop()
        if owner in seen or owner.__module__.split(".")[0] not in ("vae3d", "loaders"):
            continue
        seen.add(owner)
        todo += [cls for hint in options_of(owner).values() for cls in buildable(hint)]
        todo += owner.__subclasses__() if inspect.isclass(owner) else []
    return seen


def test_every_number_that_a_command_or_a_class_takes_has_its_range():
    given = {"factor"}  # by the network, never by a user
    for owner in owners():
        for name, hint in options_of(owner).items():
            if not buildable(hint) and re.search(r"\b(int|float)\b", str(hint)):
                assert f"{owner.__name__}.{name}" in RANGES or name in {*RANGES, *given}, (
                    f"{owner.__name__}: {name} has no range in vae3d/ranges.py"
                )


def test_every_range_is_of_an_option():
    names = {
        n
        for owner in owners()
        for name in options_of(owner)
        for n in (name, f"{owner.__name__}.{name}")
    }
    assert not RANGES.keys() - names


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--data.threads", "-1", "give 1 to 1024"),
        ("--threads", "-1", "give 0 to 1024"),
        ("--data.preprocess.crop_margin_mm", "-5", "give 0 or more"),
        ("--seed", "9" * 30, "give at most"),
        ("--ema_decay", "1", "give 0 to below 1"),
        ("--val_volumes", "-1", "give 0 or more"),
        ("--keep_checkpoints", "1", "give 2 or more"),
        ("--patches_per_volume", "1000000000", "give at most"),
        ("--timeout_minutes", "0", "give more than 0"),
        ("--patch_size", "[]", "is empty"),
        ("--lr", ".nan", "give 0 or more"),
        ("--weight_decay", ".inf", "give at most"),
        ("--loss.kl.weight", "-1", "give 0 or more"),
        ("--model.norm.eps", "0", "give more than 0"),
        ("--model.channels", "[0, 8]", "give 1 to 65536"),
        ("--data.num_slices", "2", "odd"),
        ("--data.fold", "2", "data.folds"),
        ("--data.sampler.probability", "2", "give at most 1"),
    ],
)
def test_nonsense_is_refused_by_its_name_before_anything_is_read(
    option, value, words, vae3d, tmp_path
):
    sampler = ["--data.sampler", "ForegroundCorners"]
    out = tmp_path / "run"
    argv = ["train", "--data.root", "/nowhere", "--out_dir", out, *sampler, *TINY]
    assert refused(vae3d(*argv, option, value), option.removeprefix("--"), words)
    assert not out.exists()


def test_a_number_from_python_is_refused_as_one_from_the_command_line(tmp_path):
    with pytest.raises(ValueError, match=r"^--data.threads is -1; give 1 to 1024$"):
        train_3d(DataConfig("d", threads=-1), str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"^--patches_per_volume is 0; give 1 or more$"):
        train_3d("d", str(tmp_path / "run"), patches_per_volume=0)
    with pytest.raises(ValueError, match=r"^--warmup_steps is -1"):
        Loop(warmup_steps=-1)
    with pytest.raises(ValueError, match=r"^--limit is 0; give 1 or more$"):
        evaluate("runs/a", EvaluationData("d"), limit=0)
    assert not (tmp_path / "run").exists()


def test_a_range_is_told_as_it_is_meant():
    assert str(Range(1, 64)) == "give 1 to 64"
    assert str(Range(0)) == "give 0 or more" and str(Range(0, open_low=True)) == "give more than 0"
    assert (
        str(Range(0, 1, open_high=True)) == "give 0 to below 1"
        and str(Range()) == "give a finite number"
    )
    assert (
        Range().holds(-1e300)
        and not Range().holds(float("nan"))
        and not Range().holds(float("inf"))
    )
    assert Range(0).holds(10**300) and not Range(0).holds(10**400)


def test_options_of_other_peoples_classes_are_their_own_affair():
    class Theirs:
        pass

    check_ranges("train_3d", {"loss": partial(Theirs, weight=-1)})
    with pytest.raises(ValueError, match=r"--loss.weight is -1"):
        check_ranges("train_3d", {"loss": partial(SSIM, weight=-1)})


# Slips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--max_step 5", "no option --max_step; did you mean --max_steps or --max_bad_steps?"),
        ("--max_step=5", "no option --max_step; did you mean --max_steps or --max_bad_steps?"),
        ("--data.thread 3", "no option --data.thread; did you mean --data.threads?"),
        ("--bogus 3", "no option --bogus; see --help"),
        ("--config=--", "--config: -- is no value"),
        (
            "--model.chanels 3",
            "--model.chanels: CustomVAE has no such option; did you mean channels or z_channels?",
        ),
        (
            "--model.norm.num_group 3",
            "--model.norm.num_group: GroupNorm has no such option; did you mean num_groups?",
        ),
        ("--model CustomVEA", "--model: no class CustomVEA; did you mean CustomVAE?"),
        ("--model MaisiVEA", "--model: no class MaisiVEA; did you mean MaisiVAE?"),
        ("--model.block Resblock", "--model.block: no class Resblock; did you mean ResBlock or "),
        ("--model.norm nn.GroupNorm", "--model.norm: no class nn.GroupNorm; there is no module nn"),
        (
            "--data.sampler Uniform",
            "--data.sampler: no class Uniform; there are ForegroundCorners, ",
        ),
        (
            "--loss.adversarial Adversaria",
            "--loss.adversarial: no class Adversaria; did you mean Adversarial?",
        ),
        ("--lr_schedule cosin", "--lr_schedule is cosin; give cosine | linear | constant"),
        ("--lr 1e-4x", "--lr is 1e-4x; give a finite number"),
        ("--batch_size auto2", "--batch_size is auto2; give a whole number or auto"),
        ("--patching random", "--patching is random; give full | random_parts or null"),
        (
            "--data.preprocess.spacing_mm [0,1,1]",
            "spacing_mm is (0.0, 1.0, 1.0): give three sizes above 0",
        ),
    ],
)
def test_a_slip_is_told_in_one_line_with_what_was_meant(argv, told, tmp_path):
    argv = ["--data.root", "d", "--out_dir", "o", *argv.split(" ", 1)]
    with pytest.raises(ValueError) as caught:
        config.parse(train_3d, argv)
    assert str(caught.value).startswith(told)


def test_a_slip_in_a_recipe_is_told_as_one_on_the_command_line(tmp_path):
    recipe = tmp_path / "a.yaml"
    for text, told in (
        ("max_step: 3", "no option --max_step; did you mean --max_steps"),
        ("data: {thread: 3}", "no option --data.thread; did you mean --data.threads?"),
        ("model: {class_path: CustomVEA}", "--model: no class CustomVEA; did you mean CustomVAE?"),
        ("lr: .nan", "--lr is nan; give 0 or more"),
    ):
        recipe.write_text(text)
        with pytest.raises(ValueError) as caught:
            config.parse(train_3d, ["--config", str(recipe), "--data.root", "d", "--out_dir", "o"])
        assert str(caught.value).startswith(told)


def test_a_preset_is_found_by_its_name_alone():
    argv = [
        "--data.root",
        "d",
        "--out_dir",
        "o",
        "--model",
        "MaisiVAE",
        "--model.num_channels",
        "[32]",
    ]
    assert config.parse(train_3d, argv)["model"].keywords["num_channels"] == (32,)


@pytest.mark.parametrize(
    "option",
    [
        "--loss.recon Term",
        "--loss.recon Pointwise",
        "--model.norm Norm",
        "--model.up Up",
        "--model.down Down",
        "--data.sampler Sampler",
    ],
)
def test_what_classes_only_derive_from_is_none_to_take(option):
    with pytest.raises(ValueError, match="it is what those derive from"):
        config.parse(train_3d, ["--data.root", "d", "--out_dir", "o", *option.split()])


class Capped(Charbonnier):
    """A term of a user's own, which cannot do all that it could."""

    def __init__(self, cap: float = 1.0):
        super().__init__()
        self.cap = cap

    def capped(self, error):
        """The error up to the cap."""
        if self.cap <= 0:
            raise NotImplementedError("no cap below zero")
        return error.clamp(max=self.cap)


def test_a_class_that_refuses_a_part_of_its_work_is_one_to_take():
    argv = ["--data.root", "d", "--out_dir", "o", "--loss.recon", f"{__name__}.Capped"]
    options = config.parse(train_3d, argv)
    assert options["loss"].keywords["recon"].func is Capped


def test_an_optional_group_tells_what_is_wrong_in_it():
    argv = ["--checkpoint", "c", "--data.root", "d", "--data.preprocess.spacing_mm", "[0,1,1]"]
    with pytest.raises(ValueError, match=r"three sizes above 0$"):
        config.parse(evaluate, argv)


# Before anything is cached or written -------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.augment", "{RandomNois: {}}"], "RandomNois"),
        (["--data.balance_by", "site"], "data.balance_by"),
        (["--model.in_channels", "2"], "--model.in_channels 1"),
        (["--model.norm.num_groups", "3"], "num_groups=3 does not divide"),
        (["--loss.recon", "SSIM"], "SSIM.window"),
        (["--loss.adversarial", "Adversarial", "--patch_size", "[4,4,4]"], "num_layers"),
        (["--loss.recon", "LearnedVariance", "--loss.recon.channels", "3"], "channels is 3"),
        (["--init_from", "/nowhere"], "/nowhere"),
        (["--freeze", "decoder"], "--init_from"),
        (["--data.root", "/nowhere"], "/nowhere"),
        (["--data.fractions", "[0,1,0]"], "no volume is left to train on"),
    ],
)
def test_options_are_refused_before_caching_and_leave_no_file_behind(
    argv, words, vae3d, volumes, tmp_path
):
    done = vae3d("train", "--data.root", volumes, "--out_dir", tmp_path / "run", *TINY, *argv)
    assert refused(done, words)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_more_ranks_than_volumes_are_refused_before_caching(volumes, tmp_path):
    with pytest.raises(loaders.BrokenVolume, match="2 ranks but only 1 volumes to train on"):
        loaders.open_data(DataConfig(str(volumes)), ranks=2)
    assert not (tmp_path / "cache").exists()
    assert loaders.open_data(DataConfig(str(volumes)), spatial_dims=2, ranks=2)  # has slices enough


def test_a_script_without_its_guard_is_refused_before_caching(volumes, tmp_path, monkeypatch):
    def refuse():
        raise ValueError("no guard")

    monkeypatch.setattr("loaders.guard.require_guard", refuse)
    data = DataConfig(str(volumes), augment={"RandomNoise": {}})
    with pytest.raises(ValueError, match="no guard"):
        train_3d(data, str(tmp_path / "run"), patch_size=(8, 8, 8), device="cpu")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert data.loader_options(threads=0)["augment"]  # then no process is started


def test_a_refusal_leaves_a_folder_that_was_there(vae3d, volumes, tmp_path):
    (tmp_path / "run").mkdir()
    done = vae3d("train", "--data.root", "/nowhere", "--out_dir", tmp_path / "run", *TINY)
    assert refused(done, "/nowhere")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_errors_of_layers_that_do_not_go_together_are_the_users():
    for error in (ZeroDivisionError("by zero"), RuntimeError("no memory"), IndexError("range")):

        def fail(error=error):
            raise error

        with pytest.raises(ValueError, match=r"^--model: cannot be built with these options \("):
            made("--model", fail)


def test_a_network_that_cannot_be_built_is_one_line_in_every_command(vae3d, tmp_path):
    network = ("--model", "CustomVAE", "--model.in_channels", "null")
    done = vae3d("convert", "nowhere.pt", tmp_path / "out", *network)
    assert refused(done, "--model: cannot be built with these options")
    (tmp_path / "a.yaml").write_text(
        "model: {class_path: CustomVAE, init_args: {in_channels: null}}"
    )
    assert refused(
        vae3d("plan", tmp_path / "a.yaml"), "--model: cannot be built with these options"
    )


def test_a_loss_is_asked_whether_it_fits_before_it_is_computed():
    VAELoss(recon=partial(SSIM, window=7)).check((1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"SSIM.window 7"):
        VAELoss(recon=partial(SSIM, window=7)).check((1, 8, 8, 4))
    with pytest.raises(ValueError, match=r"LearnedVariance.channels is 2"):
        VAELoss(recon=partial(LearnedVariance, channels=2)).check((3, 8, 8))
    game = partial(Adversarial, discriminator=partial(PatchDiscriminator, num_layers=2))
    VAELoss(adversarial=game).check((1, 4, 4, 4))
    with pytest.raises(ValueError, match="num_layers"):
        VAELoss(adversarial=game).check((1, 4, 4, 2))
    with pytest.raises(ValueError, match="in_channels is 1, the volume has 2"):
        VAELoss(adversarial=game).check((2, 8, 8, 8))


def test_preprocessing_is_refused_where_it_is_made():
    with pytest.raises(ValueError, match="spacing_mm"):
        replace(Preprocess(), spacing_mm=(0, 1, 1))
    assert loaders.DataConfig(num_slices=3).num_slices == 3
