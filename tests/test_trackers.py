"""What TensorBoard and MLflow hold of a run, read back from their own files; names stay at home."""

import json
import os
import stat

import numpy as np
import pytest
from test_tracker import no_key, patient, views  # noqa: F401

from vae3d.tracking import options
from vae3d.tracking.options import Tracking
from vae3d.tracking.privacy import REDACTED, Aliases
from vae3d.tracking.tracker import Tracker, read_metrics, read_tables, what_is_told

CONFIG = {"lr": 0.1, "data": {"root": "/data/Erika Muster", "channels": ["ct"]}, "api_key": "k3y"}
TABLE = [{"case": "Erika|Muster", "psnr": 20.0}]


@pytest.fixture(autouse=True)
def a_home_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def watch(folder, how, steps, begun_at=0, pictures=False, scale=1.0):
    """One life of a run: a number a step, a table and pictures at the last."""
    with Tracker(folder, how, CONFIG, begun_at=begun_at) as tracker:
        for step in steps:
            tracker.log({"train/loss": scale / step, "train/kl": float("nan")}, step)
        tracker.log_table("val/volumes", TABLE, steps[-1])
        if pictures:
            assert tracker.in_background(views, folder / "media", step=steps[-1])
    return tracker


def events(folder):
    """TensorBoard's own reading of what a run left."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def text(found, name):
    (event,) = found.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_event_files_hold_numbers_pictures_tables_and_options(tmp_path):
    watch(tmp_path, Tracking(trackers=("tensorboard",)), [1, 2], pictures=True)
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert np.isnan(found.Scalars("train/kl")[0].value)
    assert found.Tags()["images"] == ["views/a/png", "views/a/gif"], "MP4 has no panel there"
    for kind in ("png", "gif"):
        (picture,) = found.Images(f"views/a/{kind}")
        assert picture.step == 2
        assert picture.encoded_image_string == (tmp_path / "media" / f"a.{kind}").read_bytes()
    assert "lr: 0.1" in text(found, "config") and "k3y" not in text(found, "config")
    assert "| Erika\\|Muster | 20.0 |" in text(found, "val/volumes")


def test_a_resumed_run_is_one_in_tensorboard_without_what_it_repeated(tmp_path):
    how = Tracking(trackers=("tensorboard",))
    watch(tmp_path, how, [1, 2, 3, 4])
    watch(tmp_path, how, [3, 4, 5], begun_at=2, scale=100.0)
    found = [(e.step, round(e.value, 2)) for e in events(tmp_path).Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 0.5), (3, 33.33), (4, 25.0), (5, 20.0)]


def test_several_trackers_see_the_same_and_wandb_is_none_of_them_unless_asked(tmp_path):
    tracker = watch(tmp_path, Tracking(trackers=("tensorboard", "wandb"), wandb="disabled"), [1])
    assert [host.guest.name for host in tracker._hosts] == ["tensorboard"]
    only = Tracker(tmp_path / "b", Tracking(trackers=("tensorboard",), wandb="offline"))
    only.close()
    assert not (tmp_path / "b" / "wandb").exists()
    both = Tracking(trackers=("wandb", "tensorboard"), wandb="offline")
    with patient(tmp_path / "c", both) as tracker:
        tracker.log({"a": 1.0}, 1)
        names = [host.guest.name for host in tracker._hosts]
    assert names == ["wandb", "tensorboard"]
    assert [e.value for e in events(tmp_path / "c").Scalars("a")] == [1.0]
    assert list((tmp_path / "c" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_tracker_that_fails_leaves_the_others_and_the_run_alone(tmp_path):
    """A file stands where the folder of event files should be made."""
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match="tensorboard: .*; the run goes on"):
        watch(tmp_path, Tracking(trackers=("tensorboard",)), [1, 2])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("trackers", "said"),
    [
        (("mlflow",), "pip install 'vae3d\\[mlflow\\]'"),
        (("tensorbord",), "'tensorbord' is not one"),
    ],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_one_line(monkeypatch, trackers, said):
    monkeypatch.setattr(options, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=said):
        Tracking(trackers=trackers)


@pytest.mark.slow
def test_mlflow_holds_numbers_pictures_tables_and_options_and_a_resume_goes_on_there(tmp_path):
    from mlflow.tracking import MlflowClient

    how = Tracking(trackers=("mlflow",))
    watch(tmp_path / "a", how, [1, 2], pictures=True)
    run_id = (tmp_path / "a" / "mlflow" / "run_id").read_text().strip()
    watch(tmp_path / "a", how, [3], begun_at=2)
    client = MlflowClient(f"sqlite:///{tmp_path}/a/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("vae3d")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "a", "FINISHED")
    losses = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert np.isnan(client.get_metric_history(run_id, "train/kl")[0].value)
    assert run.data.params["data.channels"] == "['ct']" and run.data.params["api_key"] == REDACTED

    def artifact(path):
        return client.download_artifacts(run_id, path, str(tmp_path))

    with open(artifact("val/volumes/step_00000002.json")) as file:
        assert json.load(file) == TABLE
    with open(artifact("config.yaml")) as file:
        assert "lr: 0.1" in file.read()
    for kind in ("gif", "mp4"):
        with open(artifact(f"views/a/{kind}/step_00000002.{kind}"), "rb") as file:
            assert file.read() == (tmp_path / "a" / "media" / f"a.{kind}").read_bytes()
    images = [info.path for info in client.list_artifacts(run_id, "images")]
    assert any("views~a~png" in path and path.endswith(".png") for path in images)
    about = json.dumps(run.data.tags)
    assert all(word not in about for word in ("user", "commit", "source")), about

    client.delete_run(run_id)
    watch(tmp_path / "a", how, [4])
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id != run_id and run.data.metrics["train/loss"] == 0.25


def test_cases_have_another_name_in_trackers_and_a_file_at_home_says_which(tmp_path):
    how = Tracking(trackers=("tensorboard",), hash_cases=True)
    tracker = watch(tmp_path / "a", how, [1])
    alias = tracker.alias("Erika|Muster")
    for path in (tmp_path / "a" / "tensorboard").iterdir():
        assert b"Erika" not in path.read_bytes() and alias.encode() in path.read_bytes()
    cases = json.loads((tmp_path / "a" / "cases.json").read_text())
    assert cases == {alias: "Erika|Muster"}
    assert read_tables(tmp_path / "a" / "tables.jsonl")["val/volumes"]["rows"] == TABLE
    assert Aliases(tmp_path / "b")("Erika|Muster") == alias, "the same in all runs of a user"


def test_without_the_users_key_nobody_finds_a_name_by_trying(tmp_path, monkeypatch):
    first = Aliases(tmp_path / "a")("Erika Muster")
    assert stat.S_IMODE(os.stat(tmp_path / "cache" / "case_key").st_mode) == 0o600
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path / "another"))
    assert Aliases(tmp_path / "a")("Erika Muster") != first


def test_a_key_or_a_list_of_cases_that_is_damaged_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_CACHE", str(tmp_path))
    (tmp_path / "cases.json").write_text('{"case-1": 2}')
    with pytest.raises(ValueError, match=r"cases.json: damaged .* or delete it"):
        Aliases(tmp_path)
    (tmp_path / "case_key").write_text("")  # by a full disk
    with pytest.raises(ValueError, match="case_key: holds no key; delete it"):
        Aliases(tmp_path / "b")
    (tmp_path / "case_key").unlink()
    Aliases(tmp_path / "b", ["Erika"])
    assert [path.name for path in tmp_path.glob("case_key*")] == ["case_key"]


def test_where_names_are_hashed_paths_of_the_data_are_not_told(tmp_path):
    config = {"out_dir": "runs/a", "init_from": None, "data": {"root": "/d/M", "mask": "~/M"}}
    told = what_is_told(config, True)
    assert told["data"] == {"root": REDACTED, "mask": REDACTED} and told["out_dir"] == REDACTED
    assert told["init_from"] is None and told["code"]["vae3d"]
    second = what_is_told({"latents": "z/M", "condition": "c/M", "vae": "runs/M"}, True)
    assert second == {"latents": REDACTED, "condition": REDACTED, "vae": REDACTED} | {
        "code": told["code"]
    }
    assert what_is_told(config, False)["data"]["root"] == "/d/M"


def test_ranks_that_share_a_folder_note_all_cases(tmp_path):
    first = Aliases(tmp_path, ["a", "b"])
    second = Aliases(tmp_path, ["a", "b"])
    names = {first("a"): "a", second("b"): "b"}
    assert json.loads((tmp_path / "cases.json").read_text()) == names
