"""One small run, watched in every way: files, dashboard, page and notebook show the same."""

import contextlib
import io
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_report import Document
from test_tracker import FakeWandb, clean_environment, no_key, server, sync  # noqa: F401
from test_trackers import events
from toys import tiny_vae

from loaders import DataConfig, Preprocess, Volume, write_volume
from loaders.layout import Layout
from loaders.readers import Look
from train_3d import train_3d
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.reports.run import write_run_report
from vae3d.tracking.media import in_one_range
from vae3d.tracking.tracker import read_metrics, read_tables
from vae3d.training import validate
from vae3d.training.distributed import World
from vae3d.training.precision import native_amp
from vae3d.training.run import Run

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "visualize_reconstruction.ipynb"
KINDS = ("png", "gif", "mp4", "input_gif", "input_mp4", "recon_gif", "recon_mp4")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "demo.png"
LATENT = ("between", "channels", "draws", "noise", "slices")


def test_the_start_is_told_in_a_few_lines(run):
    said = run[2].splitlines()
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in said if line.startswith("  ")}
    split = json.loads((run[1] / "split.json").read_text())
    parts = ", ".join(f"{len(ids)} {part}" for part, ids in split.items())
    assert lines["data"] == f"10 volumes: {parts}"
    assert lines["size"] == "20 x 16 x 12 voxels, 2 x 2 x 3 mm"
    assert lines["patches"] == f"random parts of 8 x 8 x 8, {len(split['train'])} an epoch"
    assert "factor 2 x 2 x 2" in lines["network"]
    assert lines["latent"] == "4 x 4 x 4 x 4 for 8 x 8 x 8, 2 input numbers for one"
    assert lines["update"] == "batch 2 x accumulation 1 x 1 rank = 2"
    assert lines["device"] == f"cpu (1 threads), amp {native_amp(torch.device('cpu'))}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on blobs: the folder of volumes, the run folder and what it said."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "tiny"
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 16, 12)], indexing="ij")
    for i in range(10):
        center = np.random.default_rng(i).uniform(-0.4, 0.4, 3)
        distance = sum((a - c) ** 2 for a, c in zip(axes, center, strict=True))
        blob = np.exp(-4 * distance)[None].astype(np.float32)
        write_volume(data / f"case-{i}.nii.gz", Volume(blob, np.diag([2.0, 2.0, 3.0, 1.0])))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train_tiny(data, out)
    return data, out, said.getvalue()


def train_tiny(data, out, max_steps=2, **more):
    train_3d(
        DataConfig(str(data), fractions=(0.4, 0.4, 0.2)),
        str(out),
        partial(
            CustomVAE,
            channels=(4, 8),
            num_res_blocks=1,
            norm=partial(GroupNorm, num_groups=4),
        ),
        patch_size=(8, 8, 8),
        patches_per_volume=1,
        batch_size=2,
        max_steps=max_steps,
        log_every=1,
        val_every=1,
        media_every=2,
        media_volumes=1,
        wandb="offline",
        device="cpu",
        **{"trackers": ("wandb", "tensorboard"), **more},
    )


def test_numbers_name_losses_rate_norm_speed_memory_and_waiting(run):
    rows = read_metrics(run[1] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    wanted = (
        "train/loss train/recon train/kl train/lr train/norm/generator perf/patches_per_s "
        "perf/cpu_memory_gb perf/data_wait val/mae val/psnr"
    )
    for row in rows:
        assert set(wanted.split()) <= set(row)
        assert 0 <= row["perf/data_wait"] <= 1 and row["perf/cpu_memory_gb"] > 0.05
    assert rows[-1]["latent/channels"] == 4


def test_each_validation_volume_has_its_row(run):
    rows = read_tables(run[1] / "tables.jsonl")["val/volumes"]["rows"]
    split = json.loads((run[1] / "split.json").read_text())
    assert sorted(row["case"] for row in rows) == sorted(split["val"])
    last = read_metrics(run[1] / "metrics.jsonl")[-1]
    assert np.mean([row["psnr"] for row in rows]) == pytest.approx(last["val/psnr"])


def test_pictures_and_clips_lie_in_the_folder_of_their_step(run):
    case = json.loads((run[1] / "split.json").read_text())["val"][0]
    names = {path.name for path in (run[1] / "media" / "step_00000002").iterdir()}
    views = {f"{case}{dot}{kind}" for dot in ("", ".input", ".recon") for kind in (".gif", ".mp4")}
    assert names == {f"{case}.png"} | views | {f"latent_{name}.png" for name in LATENT}


def test_a_resumed_run_pictures_the_volumes_it_began_with(run, tmp_path):
    """Although there are new ones in the folder, which a fresh split might choose."""
    data, out = (shutil.copytree(folder, tmp_path / folder.name) for folder in run[:2])
    for i in range(6):
        shutil.copy(data / "case-0.nii.gz", data / f"case-{i}a.nii.gz")
    train_tiny(data, out, max_steps=3)
    folders = [out / "media" / f"step_0000000{n}" for n in (2, 3)]
    before, after = ({path.name for path in folder.iterdir()} for folder in folders)
    assert before == after


class Store:
    """Volumes in memory as validation reads them; a CT window."""

    data_range, preprocess = (0.0, 1.0), Preprocess(window_hu=(-160, 240))

    def __init__(self, count):
        self.ids = [f"v{i}" for i in range(count)]

    def __len__(self):
        return len(self.ids)

    def part(self, _index):
        return (slice(None),) * 3

    def read(self, index, _slices=None):
        return np.full((1, 8, 8, 8), index / 10, np.float32)

    def spacing_mm(self, _index):
        return (1.0, 1.0, 5.0)

    def layout(self, _index):
        return Layout(Look("body"))

    def seen(self, _index, _slices):
        return None


class Jobs:
    """A tracker that keeps what it is asked to draw."""

    alias = staticmethod(str)

    def __init__(self):
        self.jobs = []

    def log(self, _numbers, _step):
        pass

    def in_background(self, make, *args, step, **kwargs):
        self.jobs.append((make.__name__, args, kwargs))


def test_pictures_reuse_the_reconstructions_of_a_validation_of_the_same_step(monkeypatch, tmp_path):
    made = []

    def counted(_network, x, **_how):
        made.append(float(x.mean()))
        return x + len(made)

    monkeypatch.setattr(validate, "reconstruct", counted)
    validation = validate.Validation(Store(9), World(), (8, 8, 8), 4, 2)
    vae, jobs = tiny_vae(), Jobs()
    validation(vae.eval(), 5)
    assert len(made) == 4
    validation.show(vae, 5, jobs, tmp_path)
    assert len(made) == 4, "no pass was repeated"
    views = [args for name, args, _ in jobs.jobs if name == "_views"]
    assert [case for _, case, *_ in views] == ["v0", "v2"]
    assert [float((recon - x).mean()) for _, _, x, recon, *_ in views] == pytest.approx([1, 2])
    validation.show(vae, 6, jobs, tmp_path)
    assert len(made) == 6, "another step has other weights"


class TwoChannels(Store):
    """CT in [0, 1] and PET in [-1, 1]."""

    channel_ranges, channel_names = [(0.0, 1.0), (-1.0, 1.0)], ["ct", "pet"]
    preprocess = Preprocess(channels=("ct", "pet"), intensity={"pet": "symmetric"})

    def read(self, index, _slices=None):
        return np.stack([np.full((8, 8, 8), v, np.float32) for v in (0.5, -1.0)])


def test_validation_tells_channels_of_different_ranges_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(validate, "reconstruct", lambda _network, x, **_how: x + 0.2)
    validation, jobs = validate.Validation(TwoChannels(2), World(), None, pictured=1), Jobs()
    scores = validation(tiny_vae().eval(), 1)
    assert scores["val/mae_ct"] == pytest.approx(0.2) and scores["val/mae_pet"] == pytest.approx(
        0.2
    )
    assert scores["val/psnr_pet"] == pytest.approx(scores["val/psnr_ct"] + 20 * np.log10(2))
    assert scores["val/mae"] == pytest.approx((0.2 + 0.1) / 2)  # in parts of each range
    monkeypatch.setattr(validate, "LatentProbes", lambda *_, **__: SimpleNamespace(
        measure=lambda _network: SimpleNamespace(numbers={}), draw=print))  # fmt: skip
    validation.show(tiny_vae().eval(), 1, jobs, tmp_path)
    _, (_, _, x, recon, _, ranges), kwargs = jobs.jobs[0]
    x, recon, ends = in_one_range(ranges, x, recon)
    assert ends == (0, 1) and kwargs["window_hu"] is None
    assert x[:, 0, 0, 0] == pytest.approx([0.5, 0.0])
    assert recon[:, 0, 0, 0] == pytest.approx([0.7, 0.1])


def test_pictures_of_latents_have_the_range_of_the_channel_that_they_show(tmp_path):
    vae, jobs = tiny_vae(in_channels=2), Jobs()
    validation = validate.Validation(TwoChannels(2), World(), None, pictured=1)
    validation.show(vae.eval(), 1, jobs, tmp_path)
    assert validation.probes.data_range == (0.0, 1.0), "of ct, and pet goes below"


def test_pictures_of_ct_are_labeled_in_hu_at_true_proportions(tmp_path):
    validation, jobs = validate.Validation(Store(2), World(), (8, 8, 8), pictured=1), Jobs()
    validation.show(tiny_vae().eval(), 1, jobs, tmp_path)
    name, args, kwargs = jobs.jobs[0]
    assert name == "_views" and kwargs["window_hu"] == (-160, 240)
    assert args[4:] == ((1.0, 1.0, 5.0), [(0.0, 1.0)])
    assert kwargs["layout"].look.space == "body" and not kwargs["layout"].radiological


@pytest.mark.parametrize(
    ("end", "patience_s"), [(0, 60), (143, 10), (138, 10), (MemoryError("too large"), 10)]
)
def test_a_killed_run_saves_first_and_then_gives_uploads_little_time(tmp_path, end, patience_s):
    """Who sends SIGTERM often sends SIGKILL 30 s later."""
    order = []

    class Training:
        """A trainer that ends as told, and its own tracker."""

        tracker = property(lambda self: self)

        def load_state_dict(self, state):
            order.append(state)

        def fit(self):
            order.append("fitted")  # `last.pt` is written in here
            if isinstance(end, Exception):
                raise end
            return end

        def close(self, timeout_s):
            order.append(timeout_s)

    with contextlib.suppress(MemoryError), Run(tmp_path, World()) as folder:
        assert folder.fit(Training(), {"step": 7}) == end
    assert order == [{"step": 7}, "fitted", patience_s]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_the_validation_and_the_first_has_what_it_draws(size):
    ranks = [validate.Validation(Store(9), World(r, size), None, 8, 2) for r in range(size)]
    hands = [validation.mine() for validation in ranks]
    assert sorted(i for hand in hands for i in hand) == ranks[0].volumes
    assert len(ranks[0].volumes) == 8
    assert set(ranks[0].shown) <= set(hands[0])
    assert max(map(len, hands)) == max(2, -(-8 // size))


def test_the_dashboard_gets_every_number_and_panel(run, server):  # noqa: F811
    sent = {key: value for row in sync(run[1], server) for key, value in row.items()}
    local = {key for row in read_metrics(run[1] / "metrics.jsonl") for key in row}
    assert local - {"time"} <= set(sent)
    case = json.loads((run[1] / "split.json").read_text())["val"][0]
    for panel in [f"views/{case}/{k}" for k in KINDS] + [f"latent/{k}" for k in LATENT]:
        assert sent[panel]["path"] in server.files, panel
    assert sent["val/volumes"]["nrows"] == len(
        json.loads((run[1] / "split.json").read_text())["val"]
    )
    assert server.config["patch_size"]["value"] == [8, 8, 8]
    assert server.config["about"]["value"]["data"].startswith("10 volumes")
    assert server.config["code"]["value"]["vae3d"]


def test_tensorboard_gets_every_number_and_panel_too(run):
    found = events(run[1])
    local = {key for row in read_metrics(run[1] / "metrics.jsonl") for key in row}
    assert local - {"time", "step"} == set(found.Tags()["scalars"])
    case = json.loads((run[1] / "split.json").read_text())["val"][0]
    moving = {f"views/{case}/{kind}" for kind in KINDS if "mp4" not in kind}
    assert set(found.Tags()["images"]) == moving | {f"latent/{kind}" for kind in LATENT}


def test_a_run_with_hashed_cases_tells_no_name_to_its_trackers(run, tmp_path, monkeypatch):
    """Resumed from one that told them: what is written from there on has none."""
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    drawn = []
    monkeypatch.setattr(
        validate, "save_views", lambda *_, title, **__: drawn.append(title) or {"png": PICTURE}
    )
    out = shutil.copytree(run[1], tmp_path / "out")
    before = set((out / "tensorboard").iterdir())
    train_tiny(run[0], out, 4, hash_cases=True, trackers=("tensorboard",))
    (new,) = set((out / "tensorboard").iterdir()) - before
    cases = json.loads((out / "cases.json").read_text())
    (shown,) = [alias for alias, case in cases.items() if drawn == [f"{alias}   step 4"]]
    assert set(cases.values()) == set(json.loads((out / "split.json").read_text())["val"])
    written = new.read_bytes()
    assert f"views/{shown}/png".encode() in written and str(run[0]).encode() not in written
    assert not any(f"views/{case}/".encode() in written for case in cases.values())
    assert not any(f"| {case} |".encode() in written for case in cases.values())
    rows = read_tables(out / "tables.jsonl")["val/volumes"]["rows"]
    assert {row["case"] for row in rows} == set(cases.values()), "at home they have their names"


def test_the_page_shows_the_run(run, tmp_path):
    document = Document(write_run_report([run[1]], tmp_path / "page.html"))
    for word in ("val/psnr", "train/kl", "latent/kl", "What each channel holds", "patch_size"):
        assert word in document.text
    assert "not finite" not in document.text
    assert all(link.startswith("data:") for link in document.links)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_volume_error_and_metrics(run, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source = f"RUN = {str(run[1])!r}\nDATA = {str(run[0])!r}\nCASE = None"
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    # Planes and four probes: one volume has no way to another.
    assert kinds.count("image/png") == 5 and kinds.count("image/gif") == 1
    said = "".join(output.get("text", "") for output in outputs)
    split = json.loads((run[1] / "split.json").read_text())
    assert split["test"][0] in said and "latent/active_channels" in said
    assert "<th>psnr</th>" in "".join(
        o["data"].get("text/html", "") for o in outputs if "data" in o
    )
