"""Evaluations for people: labels, segmenters, tables, a sentence."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from loaders import Preprocess, Subject, VolumeStore, find_subjects
from loaders.consistency import missing_label_maps
from loaders.masks import mask_of, with_label_maps
from vae3d.commands.evaluate import block_pca
from vae3d.inference import segmenters
from vae3d.inference.evaluation import Evaluator, summarize
from vae3d.inference.metrics import psnr
from vae3d.inference.reconstruct import Coding, reconstruct
from vae3d.inference.segmenters import DeepBet, Segmenter, dice, overlaps, segmenter_named
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import RMSNorm
from vae3d.reports.meanings import meaning
from vae3d.reports.tables import latex, markdown, sentence

SHAPE = (16, 12, 10)


class Bright(Segmenter):
    """Labels what is bright, and what is very bright."""

    def __call__(self, x, spacing_mm):
        assert x.dim() == 4 and len(spacing_mm) == 3
        return (x[0] > 0.5).numpy().astype(int) + (x[0] > 0.8).numpy()


def judge(tmp_path, channels=("a",), **options) -> Evaluator:
    """Of a tiny network on two volumes, the first of which has a label map; padded to 8."""
    rng = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:9, 3:9, 2:8], labels[9:14, 3:9, 2:8] = 1, 7
    np.save(tmp_path / "p_seg.npy", labels)
    subjects = []
    for name in "pq":
        for channel in channels:
            np.save(tmp_path / f"{name}{channel}.npy", rng.random(SHAPE, np.float32))
        known = {"label_map": str(tmp_path / "p_seg.npy")} if name == "p" else {}
        paths = tuple(tmp_path / f"{name}{channel}.npy" for channel in channels)
        subjects.append(Subject(name, paths, labels=known))
    preprocess = Preprocess(channels=channels, pad_to_multiple=8)
    store = VolumeStore.build(subjects, tmp_path / "cache", preprocess)
    size = {"channels": (4, 8), "num_res_blocks": 1, "norm": RMSNorm}
    vae = CustomVAE(in_channels=len(channels), encoder_mid=False, decoder_mid=False, **size).eval()
    how = vars(Coding("auto"))
    return Evaluator(vae, store, tmp_path / "out", how, media=False, save_recon=False, **options)


def test_each_label_has_its_metrics_of_all_channels_and_of_each(tmp_path):
    of = judge(tmp_path, ("a", "b"))
    row, other = of.volume(0), of.volume(1)
    x = torch.from_numpy(of.store.read(0))
    recon = reconstruct(of.vae, x, "full")
    inside = torch.zeros(16, 16, 16, dtype=torch.bool)
    inside[9:14, 3:9, 2:8] = True
    assert row["psnr_label_7"] == pytest.approx(psnr(x, recon, 1.0, inside))
    assert row["psnr_b_label_7"] == pytest.approx(psnr(x[1:], recon[1:], 1.0, inside))
    assert {"mae_label_1", "ssim_label_1", "mae_a_label_1"} <= row.keys()
    assert not [name for name in other if "label" in name]
    assert meaning("psnr_b_label_7").says.startswith("In label 7: of b: ")
    assert meaning("psnr_label_7").group == "Label by label"
    summary = of.finish()
    assert summary["metrics"]["psnr_label_7"]["n"] == 1 and summary["metrics"]["psnr"]["n"] == 2
    assert (summary["mode"], summary["mode_asked"], row["mode"]) == ("full", "auto", "full")


def test_another_label_map_is_measured_anew(tmp_path):
    of = judge(tmp_path)
    before = of.volume(0)
    labels = np.load(tmp_path / "p_seg.npy")
    labels[labels == 7] = 3
    np.save(tmp_path / "p_seg.npy", labels)
    assert of.finished(1) is None and of.finished(0) is None
    assert "psnr_label_3" in of.volume(0) and "psnr_label_7" in before


def test_label_maps_are_found_by_a_pattern_and_are_no_volumes(tmp_path):
    for name in ("a", "b", "a_parts"):
        np.save(tmp_path / f"{name}.npy", np.zeros(SHAPE, np.float32))
    found = with_label_maps(find_subjects(str(tmp_path)), "{name}_parts.npy", tmp_path)
    assert [s.id for s in found] == ["a", "b"]
    assert [s.label_map for s in found] == [tmp_path / "a_parts.npy", None]
    with pytest.raises(ValueError, match=r"--labels \{name\}_x\.npy: no volume in .* has such"):
        with_label_maps(found, "{name}_x.npy", tmp_path)


def test_the_name_in_a_pattern_is_without_its_suffix_for_stores_too(tmp_path):
    images = [tmp_path / name for name in ("a.zarr", "b.ome.zarr", "c.ome.tif", "d.h5:/raw", "e.f")]
    for folder in ("a.zarr", "b.ome.zarr", "e.f"):  # the last with DICOM slices
        (tmp_path / folder).mkdir()
    names = [mask_of(Subject("x", (path,)), "{name}_seg.zarr", tmp_path).name for path in images]
    assert names == ["a_seg.zarr", "b_seg.zarr", "c_seg.zarr", "raw_seg.zarr", "e.f_seg.zarr"]


def test_label_maps_in_hdf5_are_measured_and_a_missing_one_is_told_at_once(tmp_path):
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("tensorstore")
    rng, of = np.random.default_rng(0), judge(tmp_path)
    labels = np.zeros(SHAPE[::-1], np.uint8)
    labels[2:8, 3:9, 2:9] = 4
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["raw"], file["labels"] = rng.random(SHAPE[::-1], np.float32), labels
    for column in ("v.h5:/labels", "w.h5:/labels"):
        (tmp_path / "list.csv").write_text(f"path,label_map\nv.h5:/raw,{column}\n")
        subjects = find_subjects(str(tmp_path / "list.csv"))
        if column[0] == "w":
            with pytest.raises(ValueError, match=r"w\.h5:/labels: no such file \(column label_map"):
                with_label_maps(subjects, None, tmp_path / "list.csv")
            assert missing_label_maps(subjects)
            continue
        assert not missing_label_maps(subjects)
        of.store = VolumeStore.build(with_label_maps(subjects, None, tmp_path), tmp_path / "cache")
        x, row = torch.from_numpy(of.store.read(0)), of.volume(0)
        inside = torch.from_numpy(labels.T == 4)
        expected = psnr(x, reconstruct(of.vae, x, "full"), 1.0, inside)
        assert row["psnr_label_4"] == pytest.approx(expected)


def test_the_baseline_of_other_training_volumes_in_hdf5_is_another(tmp_path):
    h5py = pytest.importorskip("h5py")
    of, key = judge(tmp_path), [{}]
    for name in "ab":
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["raw"] = np.random.default_rng(ord(name)).random(SHAPE, np.float32)
        subjects = [Subject("s", (tmp_path / f"{name}.h5:/raw",))]
        block_pca(lambda: of.store, subjects, key, of.vae, 2, tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_what_a_segmenter_finds_in_input_and_reconstruction_is_a_column(tmp_path):
    of = judge(tmp_path, segmenter=Bright(), segmenter_name="Bright")
    row = of.volume(0)
    x = torch.from_numpy(of.store.read(0))
    recon = reconstruct(of.vae, x, "full")
    found = [Bright()(v, (1, 1, 1)) for v in (x, recon)]
    one, two = (dice(found[0] == n, found[1] == n) for n in (1, 2))
    assert row["dice_Bright"] == pytest.approx((one + two) / 2)
    assert (row["dice_Bright_1"], row["dice_Bright_2"]) == pytest.approx((one, two))
    assert meaning("dice_Bright").better == "higher"
    assert "Dice of Bright" in of.sentence(of.finish())


def test_dice_is_that_of_its_definition_and_undefined_where_nothing_was_found():
    a = np.array([1, 1, 1, 0, 0], bool)
    b = np.array([0, 1, 1, 1, 0], bool)
    assert dice(a, b) == pytest.approx(2 / 3) and dice(a, ~a) == 0 and dice(a, a) == 1
    assert np.isnan(dice(~np.ones(5, bool), a))
    assert overlaps("x", a.astype(int), b.astype(int)) == {"dice_x": pytest.approx(2 / 3)}
    assert np.isnan(overlaps("x", np.zeros(5), np.ones(5))["dice_x"])


def test_segmenters_are_named_or_a_class_of_ones_own(monkeypatch):
    assert isinstance(segmenter_named(f"{__name__}.Bright"), Bright)
    for name in ("deepbett", "os.system", "nowhere.Some"):
        with pytest.raises(
            ValueError, match=f"--segmenter {name}: .*there are deepbet, or a class"
        ):
            segmenter_named(name)
    monkeypatch.setattr(segmenters, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"deepbet: its weights come with .*pip install"):
        segmenter_named("deepbet")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepbet") is None, reason="pip install deepbet")
def test_deepbet_finds_the_brain_that_its_own_package_finds(real_volumes):
    import nibabel

    path = sorted((real_volumes / "ixi_t1_2mm").glob("*.nii.gz"))[0]
    image = nibabel.as_closest_canonical(nibabel.load(path))
    x = torch.from_numpy(image.get_fdata(dtype=np.float32))[None]
    ours = DeepBet()(x / x.max(), (2, 2, 2))
    bet = pytest.importorskip("deepbet.bet")
    theirs = bet.BrainExtraction(no_gpu=True).run(image)[1].get_fdata()
    assert dice(ours > 0, theirs > 0) > 0.995
    liters = ours.sum() * np.prod(image.header.get_zooms()) / 1e6
    assert 1.0 < liters < 1.9
    assert not DeepBet()(torch.zeros(1, 32, 32, 32), (2, 2, 2)).any()


def test_tables_for_a_text_have_every_metric_under_its_heading():
    rows = [{"case": "p", "psnr": 30.0, "mae_source": 1234.5}, {"case": "q", "psnr": 32.0}]
    summary = summarize([{**row, "psnr_label_1": 20.0} for row in rows])["metrics"]
    text = markdown(summary, "2 volumes.")
    assert "| psnr | 31 | 1.414 | 2 | dB | higher |" in text
    assert "| mae_source | 1234 | - | 1 | of the file | lower |" in text
    assert "**Label by label**" in text
    page = latex(summary, "50 % of a_b")
    assert r"psnr\_label\_1 & 20 & 0 & 2 & dB & higher \\" in page
    assert r"\caption{50 \% of a\_b}" in page and page.count(r"\midrule") == 3
    assert page.count("{") == page.count("}")


def test_a_sentence_says_how_good_the_model_is():
    numbers = {"psnr": 30.0, "pca_psnr": 28.0, "pooled_psnr": 31.0, "ssim": 0.9}
    summary = {name: {"mean": value, "sd": 0.5, "n": 3} for name, value in numbers.items()}
    assert sentence(summary, 3, 1) == (
        "3 volumes: PSNR 30.00 dB (sd 0.50), 2.0 dB above block PCA of the same size, "
        "1.0 dB below pooling, SSIM 0.900"
    )
    assert sentence({}, 1, 1) == "1 volume: the reconstructions equal their volumes"


def test_an_evaluation_leaves_its_tables(tmp_path):
    of = judge(tmp_path)
    of.finish()
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("2 volumes: PSNR ") and "| psnr |" in text
    assert r"\begin{tabular}" in (tmp_path / "out" / "results.tex").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["mode"] == "full"
