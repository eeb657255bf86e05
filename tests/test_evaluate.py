"""`evaluate.py` on a tiny run: what it writes, that it continues, that ranks agree, wrong input."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import socket
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from loaders import DataConfig, Preprocess, Subject, VolumeStore, find_subjects
from train_3d import train_3d
from vae3d.commands.evaluate import EvaluationData, choose_subjects, evaluate
from vae3d.config import main
from vae3d.inference import evaluation
from vae3d.inference.evaluation import Evaluator
from vae3d.inference.metrics import psnr
from vae3d.inference.reconstruct import Coding, autoencode, reconstruct
from vae3d.losses.features import ScriptedNetwork
from vae3d.losses.perceptual import Perceptual
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm, RMSNorm
from vae3d.tracking.voxels import read_voxels_json
from vae3d.training.checkpoint import load_checkpoint, load_model

SHAPE = (20, 14, 12)
COLUMNS = """psnr ssim mae mse ms_ssim foreground_psnr foreground_ssim foreground_mae mae_original
rmse_original clipped foreground_clipped mae_source rmse_source
kl kl_sum latent_mean latent_std posterior_std active_channels bits_per_voxel
lattice_score pooled_psnr pca_psnr pca_equivalent seam_score patch_gap"""
QUIET = {"device": "cpu", "wandb": "disabled"}


def make_volumes(folder: Path, count: int) -> None:
    """Int16 NIfTI files with a scale, an oblique affine and voxels of 1 x 2 x 3 mm."""
    rng = np.random.default_rng(0)
    affine = np.array(
        [[1, 0, 0, 10], [0, 2 * 0.8, -3 * 0.6, 20], [0, 2 * 0.6, 3 * 0.8, 30], [0, 0, 0, 1.0]]
    )
    grid = np.stack(np.meshgrid(*[np.linspace(0, 5, n) for n in SHAPE], indexing="ij"))
    folder.mkdir()
    for i in range(count):
        data = 500 * np.sin(grid + i).prod(0) + 20 * rng.standard_normal(SHAPE)
        nibabel.save(
            nibabel.Nifti1Image(data.astype(np.int16), affine), folder / f"case_{i}.nii.gz"
        )


def train(folder: Path, volumes: Path, **options) -> Path:
    """A run of two steps; what it learns does not matter."""
    torch.set_num_threads(1)
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, latent_channels=2)
    data = DataConfig(
        str(volumes), cache_dir=str(folder.parent / "cache"), fractions=(0.4, 0.2, 0.4)
    )
    defaults = dict(
        model=model,
        patch_size=(8, 8, 8),
        batch_size=1,
        max_steps=2,
        threads=0,
        val_every=0,
        media_every=0,
    )
    code = train_3d(data, str(folder), **{**defaults, **options}, **QUIET)
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """volumes/, run/ and an evaluation of its two test volumes in done/."""
    root = tmp_path_factory.mktemp("evaluate")
    make_volumes(root / "volumes", 6)
    train(root / "run", root / "volumes")
    evaluate(str(root / "run"), data(root), str(root / "done"), patch_size=(8, 8, 8), **QUIET)
    return root


def data(place) -> EvaluationData:
    return EvaluationData(str(place / "volumes"), str(place / "cache"))


def rows(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_what_the_contract_says(place):
    out = place / "done"
    cases = [row["case"] for row in rows(out)]
    split = json.loads((place / "run" / "split.json").read_text())
    assert sorted(cases) == sorted(split["test"])
    summary = json.loads((out / "summary.json").read_text())
    assert {k: summary[k] for k in ("mode", "patch_size", "overlap", "blend", "step")} == {
        "mode": "patch", "patch_size": [8, 8, 8], "overlap": 0.5, "blend": "hann", "step": 2,
    }  # fmt: skip
    assert summary["data_range"] == [0.0, 1.0]
    assert summary["checkpoint"].endswith(".pt") and summary["volumes"] == len(cases) > 1
    for case in cases:
        assert (out / "recon" / f"{case}.nii.gz").is_file()
        for kind in ("png", "gif", "mp4", "seams.png", "view.js"):
            assert (out / "media" / f"{case}.{kind}").stat().st_size > 100
    page = (out / "report.html").read_text()
    assert all(case in page for case in cases)
    assert page.count('class="viewer"') == len(cases) and summary["latent_channels"] == 2
    assert not list(out.rglob("*.partial.*"))


def test_bodies_are_drawn_as_in_training_unless_told_otherwise(place, tmp_path):
    run = str(train(tmp_path / "run", place / "volumes", radiological=True, max_steps=1))
    quick = {"mode": "full", "limit": 1, "baseline": False, "save_recon": False, **QUIET}
    for told, mirrored in ((None, True), (False, False)):
        out = tmp_path / f"out_{told}"
        evaluate(run, data(place), str(out), radiological=told, **quick)
        (volume,) = (out / "media").glob("*.view.js")
        assert json.loads(read_voxels_json(volume))["mirrored"] is mirrored


def test_names_that_a_run_kept_at_home_stay_there_in_its_evaluation(place, tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "home"))
    run = str(train(tmp_path / "run", place / "volumes", hash_cases=True, max_steps=1))
    titles = []
    monkeypatch.setattr(evaluation, "save_views", lambda *_, title, **__: titles.append(title))
    quick = {"mode": "full", "limit": 1, "baseline": False, "save_recon": False}
    how = {"trackers": (), "device": "cpu"}
    evaluate(run, data(place), str(tmp_path / "out"), **quick, **how)
    ((alias, case),) = json.loads((tmp_path / "out" / "cases.json").read_text()).items()
    assert case in {row["case"] for row in rows(tmp_path / "out")}
    assert titles[0].startswith(f"{alias} ")


def test_summary_is_mean_sd_and_count_over_volumes(place):
    out = place / "done"
    values = [float(row["psnr"]) for row in rows(out)]
    psnr_summary = json.loads((out / "summary.json").read_text())["metrics"]["psnr"]
    assert psnr_summary["mean"] == pytest.approx(np.mean(values))
    assert psnr_summary["sd"] == pytest.approx(np.std(values, ddof=1))
    assert psnr_summary["n"] == len(values)


def test_metrics_are_those_of_the_posterior_mean(place):
    vae = load_model(place / "run")
    subjects = [
        s for s in find_subjects(str(place / "volumes")) if s.id == rows(place / "done")[0]["case"]
    ]
    store = VolumeStore.build(subjects, place / "cache", Preprocess())
    x = torch.from_numpy(store.read(0))
    recon = reconstruct(vae, x, "patch", patch_size=(8, 8, 8))
    row = rows(place / "done")[0]
    assert float(row["psnr"]) == pytest.approx(psnr(x, recon, 1.0), rel=1e-6)
    exact = reconstruct(vae, x, "exact")
    assert float(row["patch_gap"]) == pytest.approx(psnr(exact, recon, 1.0), abs=0.1)
    # Linear intensities: the error in the file's own units is that of the files.
    saved = nibabel.load(place / "done" / "recon" / f"{row['case']}.nii.gz")
    source = nibabel.load(subjects[0].paths[0])
    assert saved.shape == source.shape
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    undone = store.undo(0, x.numpy()).data[0]
    error = np.abs(saved.get_fdata() - undone).mean()
    assert float(row["mae_original"]) == pytest.approx(error, rel=0.02)


def test_every_column_is_there_and_finite(place):
    for row in rows(place / "done"):
        for name in COLUMNS.split():
            assert math.isfinite(float(row[name])), name
        assert float(row["bits_per_voxel"]) == pytest.approx(2 * 16 / 8)


def test_finished_volumes_are_kept_and_missing_ones_are_made(place, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(place / "done", out)
    first, *_, second = (row["case"] for row in rows(out))
    kept = out / "media" / f"{first}.mp4"
    before = kept.stat().st_mtime_ns
    (out / "media" / f"{second}.mp4").unlink()
    (out / "metrics.csv").unlink()
    evaluate(str(place / "run"), data(place), str(out), patch_size=(8, 8, 8), **QUIET)
    assert kept.stat().st_mtime_ns == before
    assert (out / "media" / f"{second}.mp4").is_file()
    assert rows(out) == rows(place / "done")
    said = capsys.readouterr().out
    assert re.search(r"^volumes: .* voxels of .* mm; 1 channel; ", said)  # before it caches
    assert "psnr" in said and "report:" in said and "gif:" in said and "mp4:" in said


def test_a_signal_within_a_volume_keeps_those_before_and_the_next_run_does_the_rest(
    place, tmp_path, capsys, signal_at, monkeypatch
):
    argv = ["--checkpoint", str(place / "run"), "--data.root", str(place / "volumes"),
            "--data.cache_dir", str(place / "cache"), "--patch_size", "[8,8,8]", "--out_dir",
            str(tmp_path), "--device", "cpu", "--wandb", "disabled"]  # fmt: skip
    signal_at(CustomVAE, "decode", 30)  # of 24 tiles a volume
    with pytest.raises(SystemExit) as end:
        main(evaluate, argv)
    monkeypatch.undo()
    assert end.value.code == 143
    *_, last = capsys.readouterr().err.splitlines()  # the progress above it, on a slow machine
    assert last == "stopped by SIGTERM: what was finished is kept"
    (first,) = (tmp_path / "rows").glob("*.json")
    assert [path.name for path in (tmp_path / "recon").iterdir()] == [f"{first.stem}.nii.gz"]
    assert not list(tmp_path.rglob("*.partial.*")) and not (tmp_path / "metrics.csv").exists()
    written = first.stat().st_mtime_ns
    evaluate(str(place / "run"), data(place), str(tmp_path), patch_size=(8, 8, 8), **QUIET)
    assert first.stat().st_mtime_ns == written
    assert rows(tmp_path) == rows(place / "done")


def test_other_settings_are_computed_again(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "done", out)
    evaluate(
        str(place / "run"),
        data(place),
        str(out),
        patch_size=(8, 8, 8),
        blend="crop",
        media=False,
        **QUIET,
    )
    assert [r["psnr"] for r in rows(out)] != [r["psnr"] for r in rows(place / "done")]


def test_full_and_exact_mode_agree(place, tmp_path):
    plain = {"media": False, "save_recon": False, "baseline": False, **QUIET}
    for mode in ("full", "exact"):
        evaluate(
            str(place / "run"), data(place), str(tmp_path / mode), mode=mode, verify=True, **plain
        )
    for a, b in zip(rows(tmp_path / "full"), rows(tmp_path / "exact"), strict=True):
        assert a.keys() == b.keys() and "seam_score" not in a
        for name in set(a) - {"case"}:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5)
    assert not (tmp_path / "full" / "recon").exists() and not (tmp_path / "full" / "media").exists()


def test_split_and_limit_choose_volumes(place, tmp_path):
    quick = {"mode": "full", "media": False, "save_recon": False, "baseline": False, **QUIET}
    split = json.loads((place / "run" / "split.json").read_text())
    for part, limit, count in (
        ("train", None, len(split["train"])),
        ("all", None, 6),
        ("all", 1, 1),
    ):
        out = tmp_path / f"{part}{limit}"
        evaluate(str(place / "run"), data(place), str(out), split=part, limit=limit, **quick)
        assert len(rows(out)) == count


class Edges(torch.nn.Module):
    """A feature network of one layer."""

    def __init__(self, seed: int):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 3)
        torch.nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return self.conv(x)


def test_perceptual_distance_is_a_column_that_follows_its_network(place, tmp_path):
    argv = ["--checkpoint", str(place / "run"), "--data.root", str(place / "volumes")]
    argv += ["--data.cache_dir", str(place / "cache"), "--out_dir", str(tmp_path / "out")]
    argv += ["--mode", "full", "--limit", "1", "--baseline", "false", "--media", "false"]
    argv += ["--device", "cpu", "--wandb", "disabled", "--perceptual", "Perceptual"]
    argv += ["--perceptual.network", "ScriptedNetwork", "--perceptual.network.spatial_dims", "3"]
    found = []
    for seed in (0, 1):
        path = tmp_path / f"edges{seed}.pt"
        torch.jit.script(Edges(seed)).save(path)
        with pytest.raises(SystemExit) as stop:
            main(evaluate, [*argv, "--perceptual.network.path", str(path)])
        assert stop.value.code == 0
        row = rows(tmp_path / "out")[0]
        found.append(float(row["perceptual"]))
        distance = Perceptual(network=partial(ScriptedNetwork, str(path), 3))
        subjects = find_subjects(str(place / "volumes"))
        store = VolumeStore.build(subjects, str(place / "cache"), Preprocess())
        x = torch.from_numpy(store.read(store.ids.index(row["case"])))
        recon = reconstruct(load_model(str(place / "run")), x, "full")
        assert found[-1] == pytest.approx(float(distance(x[None], recon[None])), rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-3)  # not the row of the other network


def test_a_perceptual_distance_that_cannot_be_made_is_refused_before_anything_is_written(
    place, tmp_path
):
    distance = partial(Perceptual, network=partial(ScriptedNetwork, str(tmp_path / "no.pt"), 2))
    with pytest.raises(ValueError, match=r"no\.pt"):
        evaluate(str(place / "run"), data(place), str(tmp_path / "out"), perceptual=distance)
    assert not (tmp_path / "out").exists()


def evaluator(tmp_path, files: dict[str, np.ndarray], **preprocess) -> Evaluator:
    """Of a tiny network on one volume; each channel is a file."""
    for name, data in files.items():
        np.save(tmp_path / f"{name}.npy", data)
    subject = Subject("p", tuple(tmp_path / f"{name}.npy" for name in files))
    store = VolumeStore.build([subject], tmp_path / "cache", Preprocess(**preprocess))
    size = {"channels": (4, 8), "num_res_blocks": 1, "norm": RMSNorm}
    vae = CustomVAE(in_channels=len(files), encoder_mid=False, decoder_mid=False, **size).eval()
    return Evaluator(vae, store, tmp_path / "out", vars(Coding("full")), media=False)


def test_channels_of_different_units_have_columns_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    ct, pet = rng.uniform(-1000, 400, (16, 12, 8)), rng.uniform(0, 20, (16, 12, 8))
    judge = evaluator(
        tmp_path,
        {"ct": ct, "pet": pet},
        channels=("ct", "pet"),
        window_hu={"ct": (-1000, 400), "pet": (0, 10)},
        intensity={"pet": "symmetric"},
    )
    row = judge.volume(0)
    assert not {"mae_original", "rmse_source", "clipped", "foreground_clipped"} & set(row)
    x = torch.from_numpy(judge.store.read(0))
    recon = reconstruct(judge.vae, x, "full")
    errors = (x - recon).abs().double().mean((1, 2, 3))
    assert row["mae_original_ct"] == pytest.approx(float(errors[0]) * 1400, rel=1e-5)
    assert row["mae_original_pet"] == pytest.approx(float(errors[1]) * 5, rel=1e-5)
    assert row["mae_ct"] == pytest.approx(float(errors[0]), rel=1e-5)
    assert row["psnr_pet"] == pytest.approx(psnr(x[1:], recon[1:], 2.0))
    assert row["mae"] == pytest.approx(float(errors[0] + errors[1] / 2) / 2, rel=1e-5)
    assert row["clipped_ct"] == 0 and row["clipped_pet"] == pytest.approx(
        (pet > 10).mean(), abs=2e-3
    )
    source = judge.store.undo(0, recon.numpy()).data[1]
    assert row["mae_source_pet"] == pytest.approx(np.abs(source - pet).mean(), rel=1e-4)
    summary = judge.finish()
    assert summary["channel_ranges"] == {"ct": [0, 1], "pet": [-1, 1]}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mae_original_pet" in page and "psnr_ct" in page and "foreground_clipped_pet" in page


def test_what_the_clip_takes_is_a_column_and_no_error_but_against_the_source(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.normal(100, 5, (16, 16, 16)).astype(np.float32)
    data[4:6, 4:8, 4] = 1000  # 8 voxels, and 40 of half that
    data[8:12, 8:13, 8:10] = 500
    judge = evaluator(tmp_path, {"a": data}, window_hu=(0, 500))
    row = judge.volume(0)
    assert row["clipped"] == pytest.approx(8 / data.size)
    assert row["foreground_clipped"] == pytest.approx(8 / 48)
    recon = reconstruct(judge.vae, torch.from_numpy(judge.store.read(0)), "full")
    error = judge.store.undo(0, recon.numpy()).data[0] - data
    assert row["mae_source"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert row["rmse_source"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    assert row["mae_source"] > row["mae_original"]  # which knows nothing of the 500 above
    judge.finish()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "16.7 % of the foreground of <b>p</b> is clipped" in page


def test_new_data_is_evaluated_whole():
    class Named:
        def __init__(self, id):
            self.id = id

    folder = [Named("a"), Named("b")]
    assert choose_subjects(folder, {"train": ["x"], "test": ["y"]}, None) == folder
    assert choose_subjects(folder, {"train": ["a"], "test": ["b"]}, None) == folder[1:]
    with pytest.raises(ValueError, match="--split"):
        choose_subjects(folder, {"train": ["a", "b"], "test": []}, None)


def rank_main(rank, port, place, out):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    torch.set_num_threads(1)
    evaluate(str(place / "run"), data(place), str(out), patch_size=(8, 8, 8), media=False, **QUIET)
    os._exit(0)


def test_two_ranks_give_the_numbers_of_one_process(place, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(r, port, place, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
        assert process.exitcode == 0
    assert rows(tmp_path) == rows(place / "done")


def say(argv, capsys) -> str:
    """Run the command line; its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(evaluate, argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--patch_size", "[7, 8, 8]"], r"\(8, 8, 8\)"),
        (["--patch_size", "[8, 8]"], "axes"),
        (["--overlap", "1.0"], "overlap"),
        (["--overlap", "8"], "overlap"),
        (["--split", "val2"], "split"),
        (["--blend", "cosine"], "blend"),
        (["--nonsense", "1"], "nonsense"),
        (["--overlap", ".nan"], "overlap"),
        (["--limit", "-1"], "limit"),
        (["--latent_bits", "0"], "latent_bits"),
        (["--batch_size", "0"], "batch_size"),
        (["--memory_gb", ".inf"], "memory_gb"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--data.root", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_exits_with_one_line(place, tmp_path, capsys, change, message):
    argv = ["--checkpoint", str(place / "run"), "--data.root", str(place / "volumes")]
    argv += ["--data.cache_dir", str(place / "cache"), "--out_dir", str(tmp_path / "out")]
    argv += ["--device", "cpu", *change]
    assert re.search(message, say(argv, capsys))
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_named(place, tmp_path, capsys):
    shutil.copytree(place / "done", tmp_path / "out")
    record = sorted((tmp_path / "out" / "rows").iterdir())[0]
    record.write_text('{"key"')
    argv = ["--checkpoint", str(place / "run"), "--data.root", str(place / "volumes")]
    argv += ["--data.cache_dir", str(place / "cache"), "--out_dir", str(tmp_path / "out")]
    argv += ["--device", "cpu", "--patch_size", "[8, 8, 8]"]
    assert re.search(f"{record.name}: not JSON that can be read .* delete it", say(argv, capsys))


def test_the_baseline_is_fitted_again_when_the_training_volumes_change(place, tmp_path):
    folder = tmp_path / "volumes"
    shutil.copytree(place / "volumes", folder)
    run, options = str(place / "run"), dict(patch_size=(8, 8, 8), media=False, **QUIET)
    source = EvaluationData(str(folder), str(tmp_path / "cache"))
    evaluate(run, source, str(tmp_path / "out"), **options)
    before = rows(tmp_path / "out")
    (folder / f"{load_checkpoint(run)['split']['train'][0]}.nii.gz").unlink()
    evaluate(run, source, str(tmp_path / "out"), **options)
    after = rows(tmp_path / "out")
    assert [r["pca_psnr"] for r in after] != [r["pca_psnr"] for r in before]
    assert [r["psnr"] for r in after] == [r["psnr"] for r in before]


def test_a_file_that_is_no_checkpoint_is_named(place, tmp_path, capsys):
    other = tmp_path / "other.pt"
    other.write_bytes(b"not a checkpoint")
    argv = ["--checkpoint", str(other), "--data.root", str(place / "volumes")]
    assert "other.pt" in say(argv, capsys)
    torch.save({"weight": torch.zeros(1)}, other)
    assert "other.pt" in say(argv, capsys)


def test_volumes_of_other_channels_are_refused(place, tmp_path):
    other = tmp_path / "volumes"
    other.mkdir()
    np.save(other / "a.npy", np.random.default_rng(0).random((2, 12, 12, 12), dtype=np.float32))
    with pytest.raises(ValueError, match="channels"):
        evaluate(
            str(place / "run"),
            EvaluationData(str(other), str(place / "cache")),
            str(tmp_path / "out"),
            mode="full",
            **QUIET,
        )


def test_a_2d_model_is_evaluated_slice_by_slice(place, tmp_path):
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, 2, channels=(4, 8), num_res_blocks=1, norm=norm)
    run = train(tmp_path / "run", place / "volumes", model=model, patch_size=(8, 8))
    how = {"mode": "patch", "patch_gap": False, "limit": 1}
    evaluate(str(run), data(place), str(tmp_path / "out"), **how, **QUIET)
    row = rows(tmp_path / "out")[0]
    assert math.isfinite(float(row["psnr"])) and math.isfinite(float(row["seam_score"]))
    recon = nibabel.load(tmp_path / "out" / "recon" / f"{row['case']}.nii.gz")
    assert recon.shape == SHAPE


def test_slices_keep_their_place_and_the_middle_of_stacked_neighbors():
    class Middle(torch.nn.Module):
        spatial_dims, factor, in_channels = 2, (1, 1), 3

        def encode(self, x):
            return type("P", (), {"mean": x, "logvar": x})

        def decode(self, z):
            return z

    model = Middle()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    x = torch.rand(1, 6, 5, 4)
    for axis in range(3):
        recon, mean, _ = autoencode(model, x, "full", slice_axis=axis, num_slices=3)
        assert torch.equal(recon, x)
        assert mean.shape == (3, *x.shape[1:])


def test_per_voxel_norms_close_the_gap_between_patches_and_the_full_pass():
    """Without statistics over the volume, a patch with enough halo gives the full result."""
    torch.manual_seed(0)
    x = torch.rand(1, 64, 16, 16)
    gaps = {}
    for norm in (RMSNorm, partial(GroupNorm, num_groups=4)):
        vae = CustomVAE(
            channels=(4, 8), num_res_blocks=1, norm=norm, encoder_mid=False, decoder_mid=False
        ).eval()
        full = reconstruct(vae, x, "full")
        patch = reconstruct(
            vae, x, "patch", patch_size=(48, 16, 16), overlap=(40, 0, 0), blend="crop"
        )
        gaps[norm is RMSNorm] = float((patch - full).abs().max() / (full.max() - full.min()))
    assert gaps[True] < 1e-5
    assert gaps[False] > 1e-3


@pytest.mark.slow
def test_a_real_head_in_exact_mode_equals_the_full_pass(real_volumes, tmp_path):
    scan = sorted((real_volumes / "ixi_t1_2mm").glob("*.nii.gz"))[:1]
    store = VolumeStore.build(scan, tmp_path, Preprocess())
    x = torch.from_numpy(store.read(0))[:, 24:96, 28:92, 20:68]
    torch.manual_seed(0)
    vae = CustomVAE(channels=(8, 16, 16), num_res_blocks=1, norm=partial(GroupNorm, num_groups=4))
    full, mean, _ = autoencode(vae.eval(), x, "full")
    recon, latent, _ = autoencode(vae, x, "exact", memory_gb=0.03)
    assert float((recon - full).abs().max()) <= 1e-4 * float(full.max() - full.min())
    assert float((latent - mean).abs().max()) <= 1e-4 * float(mean.max() - mean.min())
    gap = psnr(full, reconstruct(vae, x, "patch", patch_size=(48, 48, 48)), 1.0)
    assert gap < psnr(full, recon, 1.0) - 20


def test_a_run_that_begins_with_weights_of_another_intensity_contract_says_so(
    place, tmp_path, capsys
):
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, latent_channels=2)
    for name, preprocess in [("same", Preprocess()), ("other", Preprocess(intensity="symmetric"))]:
        capsys.readouterr()
        config = DataConfig(str(place / "volumes"), str(place / "cache"), preprocess=preprocess)
        train_3d(config, str(tmp_path / name), model, patch_size=(8, 8, 8), batch_size=1, threads=0,
                 max_steps=1, val_every=0, media_every=0, init_from=str(place / "run"),
                 **QUIET)  # fmt: skip
        told = "another data.preprocess: here intensity is symmetric, not unit"
        assert (told in capsys.readouterr().out) == (name == "other")


def test_a_checkpoint_given_another_intensity_contract_says_so(place, tmp_path):
    from vae3d.commands.encode import VolumeSource, encode

    run, folder, cache = (str(place / name) for name in ("run", "volumes", "cache"))
    hounsfield = Preprocess(window_hu=(-1000, 400))
    told = r"data\.preprocess .* window_hu is \(-1000\.0, 400\.0\), not None"
    with pytest.raises(ValueError, match=told):
        evaluate(run, EvaluationData(folder, cache, preprocess=hounsfield), str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match=told):
        encode(run, str(tmp_path), VolumeSource(folder, cache, hounsfield), device="cpu")
    assert not list(tmp_path.iterdir())
    encode(run, str(tmp_path), VolumeSource(folder, cache, Preprocess()), device="cpu")
    assert (tmp_path / "latents.json").is_file()


def test_a_broken_volume_is_listed_by_training_and_by_evaluation(place, tmp_path):
    shutil.copytree(place / "volumes", tmp_path / "volumes")
    (tmp_path / "volumes" / "case_9.nii.gz").write_bytes(b"<html>404</html>")
    skip = {"cache_dir": str(place / "cache"), "on_error": "skip"}
    config = DataConfig(str(tmp_path / "volumes"), fractions=(0.4, 0.2, 0.4), **skip)
    norm = partial(GroupNorm, num_groups=4)
    model = partial(CustomVAE, channels=(4, 8), num_res_blocks=1, norm=norm, latent_channels=2)
    out, run = tmp_path / "out", tmp_path / "run"
    train_3d(config, str(run), model, patch_size=(8, 8, 8), batch_size=1, max_steps=1, threads=0,
             val_every=0, media_every=0, **QUIET)  # fmt: skip
    whole = EvaluationData(str(tmp_path / "volumes"), **skip)
    options = {"split": "all", "patch_gap": False, "baseline": False, "media": False}
    evaluate(str(run), whole, str(out), save_recon=False, **options, **QUIET)
    for folder in (run, out):
        header, row = (folder / "skipped.csv").read_text().splitlines()
        assert header == "id,path,reason" and row.startswith("case_9,") and "web page" in row
    split = json.loads((run / "split.json").read_text())
    assert not any("case_9" in ids for ids in split.values()) and len(rows(out)) == 6
