"""Numbers and pictures of a run reach the disk and W&B, and W&B never stands in the way."""

import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pytest

from vae3d.tracking.media import save_views
from vae3d.tracking.options import Tracking
from vae3d.tracking.privacy import REDACTED, redact
from vae3d.tracking.to_wandb import RunId, WandbRun, choose_mode
from vae3d.tracking.tracker import Tracker, read_metrics, read_tables

ROOT = Path(__file__).resolve().parents[1]
KEY = "k1" * 20
HELD_S = 120  # how long a server that does not answer keeps a request
AT_ONCE_S = 20  # what did not wait for such a server takes less, on a busy machine too


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """No test may find the key of whoever runs it."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


@contextmanager
def patient(*args, **kwargs):
    """A tracker that W&B may keep waiting on a busy machine."""
    tracker = Tracker(*args, timeout_s=120, **kwargs)
    yield tracker
    tracker.close(240)


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without the address of the W&B service that this process may have started."""
    return {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | more


def sync(run_dir: Path, server: "FakeWandb", *more: str) -> list[dict]:
    """Send what a run left on the disk with `wandb sync`, wandb's own reader; return its rows."""
    server.mood, server.history = "ok", []
    server.released.set()
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online"]
    done = subprocess.run(
        [*command, *more, str(run_dir / "wandb")],
        env=clean_environment(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url, WANDB_MODE="online"),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=run_dir,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return server.history


def views(folder: Path) -> dict[str, Path]:
    x = np.random.default_rng(0).random((1, 12, 10, 8), dtype=np.float32)
    return {f"views/a/{kind}": p for kind, p in save_views(folder, "a", x, x * 0.9).items()}


def test_numbers_are_lines_of_json_and_what_is_not_finite_is_null(tmp_path):
    with Tracker(tmp_path, Tracking(wandb="disabled")) as tracker:
        tracker.log({"train/loss": 0.5, "train/kl": float("nan")}, step=10)
        tracker.log({"train/loss": float("inf")}, step=20)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["train/loss"] == 0.5 and lines[0]["train/kl"] is None
    assert lines[1]["train/loss"] is None
    assert not (tmp_path / "wandb").exists()


def test_reading_merges_lines_of_a_step_and_forgets_what_a_resume_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 10, "train/loss": 1.0},
        {"step": 10, "val/psnr": 20.0},
        {"step": 20, "train/loss": 0.5},
        {"step": 30, "train/loss": 0.4},
        {"step": 20, "train/loss": 0.6},  # killed at 30, resumed from 10
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "tra')
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0] == {"step": 10, "train/loss": 1.0, "val/psnr": 20.0}
    assert rows[1]["train/loss"] == 0.6


def test_a_line_cut_by_a_kill_does_not_spoil_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    with Tracker(tmp_path, Tracking(wandb="disabled")) as tracker:
        tracker.log({"a": 3}, step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


@pytest.mark.parametrize(
    ("mode", "variables", "expected"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": KEY}, "online"),
        (None, {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),
    ],
)
def test_online_needs_a_key_and_an_explicit_mode_wins(monkeypatch, mode, variables, expected):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(mode) == expected


def test_online_without_a_key_goes_offline_with_a_warning_and_never_asks(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for something"))
    with pytest.warns(UserWarning, match="WANDB_API_KEY"):
        assert choose_mode("online") == "offline"


def test_a_login_in_netrc_is_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode(None) == "online"


def test_a_wrong_mode_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"--wandb 'on' .*online, offline, disabled"):
        Tracker(tmp_path, Tracking(wandb="on"))


def test_secrets_are_blanked_by_name_by_value_and_in_addresses(monkeypatch):
    monkeypatch.setenv("MY_LAB_TOKEN", "s3cr3t-value")
    config = {
        "wandb_api_key": KEY,
        "loader": {"url": "https://me:pw@host/x", "note": "uses s3cr3t-value here"},
        "num_tokens": 4,
        "channels": (1, 2),
        "path": Path("a/b"),
    }
    assert redact(config) == {
        "wandb_api_key": REDACTED,
        "loader": {"url": f"https://{REDACTED}@host/x", "note": f"uses {REDACTED} here"},
        "num_tokens": 4,
        "channels": [1, 2],
        "path": "a/b",
    }


def test_the_offline_file_holds_every_panel_with_its_media(tmp_path, server):
    config = {"lr": 0.1, "model": {"channels": [4, 8]}}
    with patient(tmp_path, Tracking(wandb="offline"), config=config) as tracker:
        tracker.log({"train/loss": 0.5, "val/psnr": 20.0}, step=7)
        tracker.log_table("val/volumes", [{"case": "a", "psnr": 20.0}], step=7)
        assert tracker.in_background(views, tmp_path / "media", step=7)
    rows = sync(tmp_path, server)
    assert all(row["step"] == 7 for row in rows)
    merged = {key: value for row in rows for key, value in row.items()}
    assert merged["train/loss"] == 0.5 and merged["val/psnr"] == 20.0
    assert merged["val/volumes"]["_type"] == "table-file" and merged["val/volumes"]["ncols"] == 2
    for kind, panel in {"png": "image-file", "gif": "video-file", "mp4": "video-file"}.items():
        value = merged[f"views/a/{kind}"]
        assert value["_type"] == panel
        assert server.files[value["path"]] == (tmp_path / "media" / f"a.{kind}").read_bytes()
    assert server.config["lr"]["value"] == 0.1
    assert server.config["model"]["value"] == {"channels": [4, 8]}
    assert server.config["code"]["value"]["vae3d"]
    axes = [metric for metric in server.config["_wandb"]["value"]["m"] if metric.get("2") == "*"]
    assert axes, "no panel uses the step axis"
    assert read_tables(tmp_path / "tables.jsonl")["val/volumes"]["rows"] == [
        {"case": "a", "psnr": 20.0}
    ]


def test_a_resumed_offline_run_is_sent_as_one_run(tmp_path, server):
    for step in (1, 2):
        with patient(tmp_path, Tracking(wandb="offline")) as tracker:
            tracker.log({"train/loss": 1.0 / step}, step=step)
        time.sleep(1.1)  # wandb names its folders by the second
    assert [row["step"] for row in sync(tmp_path, server)] == [1, 2]
    assert server.runs == [tracker.run_id]


def test_a_run_id_from_a_checkpoint_wins_over_the_folder(tmp_path):
    with patient(tmp_path, Tracking(wandb="offline")) as first:
        pass
    with Tracker(tmp_path, Tracking(wandb="disabled"), run_id="fromckpt") as second:
        assert second.run_id == "fromckpt" != first.run_id


def test_no_secret_reaches_a_file_of_the_run_folder(tmp_path):
    script = (
        "import sys; from vae3d.tracking.tracker import Tracker, Tracking\n"
        "config = {'token': 'inconfig99', 'argv': sys.argv}\n"
        "how = Tracking(wandb='offline')\n"
        f"tracker = Tracker({str(tmp_path)!r}, how, config=config, timeout_s=120)\n"
        "tracker.log({'a': 1.0}, 1); tracker.close(240)\n"
    )
    environment = clean_environment(WANDB_API_KEY=KEY, HUB_TOKEN="inenviron99")
    command = [sys.executable, "-c", script, "--token=inargv99", "inenviron99"]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=300)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for secret in (KEY, "inconfig99", "inenviron99"):
            assert secret.encode() not in content, f"{secret} in {path}"


def test_a_failing_picture_warns_and_the_run_goes_on(tmp_path):
    def broken():
        raise RuntimeError("no such color")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracker(tmp_path, Tracking(wandb="disabled")) as tracker:
            tracker.in_background(broken, step=1)
            tracker.log({"a": 1}, step=2)
    assert any("no such color" in str(w.message) for w in caught)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_slow_pictures_do_not_block_and_are_bounded_in_memory(tmp_path):
    gate, made = threading.Event(), []

    def slow(volume):
        gate.wait()
        made.append(volume.nbytes)
        return {}

    tracker = Tracker(tmp_path, Tracking(wandb="disabled"), max_pending_bytes=3000)
    volume = np.zeros(1000, np.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taken = [tracker.in_background(slow, volume, step=i) for i in range(8)]
    assert made == [], "all were asked for before the first was done"
    assert taken == [True] * 3 + [False] * 5
    assert sum("left some out" in str(w.message) for w in caught) == 5
    gate.set()
    tracker.close()
    assert made == [1000] * 3


def test_one_picture_larger_than_the_bound_is_still_made(tmp_path):
    made = []
    with Tracker(tmp_path, Tracking(wandb="disabled"), max_pending_bytes=10) as tracker:
        assert tracker.in_background(lambda v: made.append(1) or {}, np.zeros(1000), step=1)
    assert made == [1]


def test_training_waits_for_wandb_nowhere_however_long_it_takes(tmp_path, monkeypatch):
    """W&B starts only when the gate opens, which is after all that training has to say."""
    gate, init = threading.Event(), WandbRun._init

    def late(*args):
        gate.wait()
        init(*args)

    monkeypatch.setattr(WandbRun, "_init", late)
    tracker = Tracker(tmp_path, Tracking(wandb="offline"), timeout_s=120)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 5001):  # more than its queue holds
            tracker.log({"train/loss": 1.0}, step)
        tracker.log_table("val/volumes", [{"case": "a"}], 5000)
        tracker.log_media({"a": tmp_path / "a.png"}, 5000)
        assert tracker.in_background(dict, step=5000)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5000, "the run folder has them all"
        gate.set()
        tracker.close(240)
    said = [str(w.message) for w in caught]
    assert any("some calls were dropped" in text for text in said)
    assert not any("did not finish" in text for text in said)


def test_closing_takes_no_longer_than_it_is_given(tmp_path, monkeypatch):
    """A picture that never ends and a W&B that never starts: half a second is half a second."""
    never = threading.Event()
    monkeypatch.setattr(WandbRun, "_init", lambda *_: never.wait())
    tracker = Tracker(tmp_path, Tracking(wandb="offline"))
    tracker.in_background(lambda: never.wait() and {}, step=1)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="wandb sync"):
        tracker.close(0.5)
    assert time.monotonic() - begun < 30
    never.set()


class FakeWandb(http.server.ThreadingHTTPServer):
    """As much of a W&B server as a run needs.

    `mood`: ok | down (500) | silent (no answer) | full (refuses uploads, 403) | slow (uploads get
    no answer) | deleted (the run, after it began, 404). Answers are held until `released`. Runs in
    `deleted` were deleted before.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.mood, self.released = "ok", threading.Event()
        self.runs, self.history, self.config, self.files = [], [], {}, {}
        self.deleted, self.upserts = set(), []  # ids; what was said of runs, newest last

    def handle_error(self, request, client_address):
        """A client that has gone away is no failure of the server."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class FakeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        upload = "file_stream" in self.path or self.path.startswith("/up/")
        if self.server.mood == "deleted" and "file_stream" in self.path:
            return self.reply({"error": "run was deleted"}, 404)
        if self.server.mood == "silent" or (self.server.mood == "slow" and upload):
            self.server.released.wait(HELD_S)
        if self.server.mood in ("down", "silent"):
            return self.reply({"error": "down"}, 500)
        if self.server.mood in ("full", "slow") and upload:
            return self.reply({"error": "storage quota exceeded"}, 403)
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            variables = request.get("variables", {})
            if "UpsertBucket" in request["query"] and variables["name"] in self.server.deleted:
                said = f"run {variables['name']} was previously created and deleted"
                return self.reply({"errors": [{"message": said}]}, 409)
            data = self.graphql(request["query"], variables)
            unknown = {"errors": [{"message": "this server does not do that"}]}
            answer = {"data": data} if data else unknown
        elif "file_stream" in self.path:
            stream = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.server.history += [json.loads(line) for line in stream.get("content", [])]
        elif self.path == "/outage":
            self.server.mood = "silent"
        elif self.path.startswith("/up/"):
            self.server.files[unquote(self.path[4:])] = body
        self.reply(answer)

    do_GET = do_PUT = do_POST

    def graphql(self, query, variables):
        project = {"id": "p", "name": "vae3d", "entity": {"id": "e", "name": "lab"}}
        if "RunResumeStatus" in query:
            known = variables["name"] in self.server.runs
            bucket = {
                "id": "b",
                "name": variables["name"],
                "displayName": "a",
                "summaryMetrics": "{}",
                "config": "{}",
                "historyLineCount": len(self.server.history),
                "eventsLineCount": 0,
                "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(r) for r in self.server.history[-1:]]),
                "eventsTail": "[]",
                "tags": [],
                "notes": None,
                "wandbConfig": "{}",
            }
            return {"model": {**project, "bucket": bucket if known else None}}
        if "UpsertBucket" in query:
            new = variables["name"] not in self.server.runs
            self.server.runs += [variables["name"]] * new
            self.server.upserts.append(variables)
            self.server.config |= json.loads(variables["config"] or "{}")
            bucket = {"id": "b", "name": variables["name"], "displayName": "a", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": new}}
        if "CreateRunFiles" in query:
            files = [
                {"name": f, "uploadUrl": f"{self.server.url}/up/{quote(f)}"}
                for f in variables["files"]
            ]
            made = {"runID": variables["run"], "uploadHeaders": [], "files": files}
            return {"createRunFiles": made}
        return {}

    def reply(self, answer, code=200):
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = FakeWandb()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def train_online(
    server, out_dir, steps, timeout_s=30.0, close_s=90.0, pause_s=0.0, before="", how="",
    wanted=None, **variables,
) -> dict:  # fmt: skip
    """A small run in a process of its own, because wandb keeps state per process."""
    script = f"""
import json, time, sys
from vae3d.tracking.tracker import Tracker, Tracking
begun = time.monotonic()
tracker = Tracker({str(out_dir)!r}, Tracking(wandb="online", {how}), None, {wanted!r},
                  timeout_s={timeout_s})
slowest = 0.0
for step in range({steps.start}, {steps.stop}):
    {before or "pass"}
    at = time.monotonic()
    tracker.log({{"train/loss": 1.0 / step}}, step)
    slowest = max(slowest, time.monotonic() - at)
    time.sleep({pause_s})
trained = time.monotonic() - begun
tracker.close({close_s})
print("RESULT", json.dumps({{"slowest": slowest, "closed": time.monotonic() - begun - trained,
                             "id": tracker.run_id}}))
"""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url, **variables),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.split("RESULT")[1])
    return result | {"err": done.stderr, "seconds": time.monotonic() - begun}


def test_an_online_run_arrives_and_its_resume_continues_it(server, tmp_path):
    first = train_online(server, tmp_path, range(1, 4))
    second = train_online(server, tmp_path, range(4, 6))
    assert first["id"] == second["id"] and server.runs == [first["id"]]
    assert [row["step"] for row in server.history] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_that_was_deleted_on_the_site_goes_on_under_a_new_id_and_arrives(server, tmp_path):
    server.deleted.add("old")
    first = train_online(server, tmp_path, range(3, 5), timeout_s=20.0, wanted="old")
    new = first["id"]
    assert f"run old was deleted there; this run goes on as {new}" in first["err"]
    assert [row["step"] for row in server.history] == [3, 4]
    second = train_online(server, tmp_path, range(5, 6), wanted="old")  # by the same checkpoint
    assert second["id"] == new and "deleted" not in second["err"]
    assert server.runs == [new] and [row["step"] for row in server.history] == [3, 4, 5]


@pytest.mark.slow
def test_a_run_that_is_deleted_while_it_trains_is_sent_under_a_new_id(server, tmp_path):
    server.mood = "deleted"
    run = train_online(server, tmp_path, range(1, 4))
    old = server.runs[0]
    assert f"wandb sync --include-online --id {run['id']} " in run["err"] and run["id"] != old
    rows = sync(tmp_path, server, "--id", run["id"])
    assert [row["step"] for row in rows] == [1, 2, 3] and server.runs == [old, run["id"]]
    assert RunId(tmp_path, old).now == run["id"], "the next life goes on there"


@pytest.mark.parametrize(
    ("variable", "wanted", "kept", "taken"),
    [
        (None, None, "", None),
        (None, None, "new old", "new"),
        (None, "old", "new old", "new"),
        (None, "other", "new old", "other"),
        ("sweeps", "other", "new old", "sweeps"),
        ("old", None, "new old", "new"),
    ],
)
def test_the_id_is_the_sweeps_then_the_checkpoints_then_the_folders_but_no_deleted_one(
    tmp_path, monkeypatch, variable, wanted, kept, taken
):
    if variable:
        monkeypatch.setenv("WANDB_RUN_ID", variable)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_text(kept.replace(" ", "\n"))
    found = RunId(tmp_path, wanted).now
    assert found == taken if taken else re.fullmatch("[0-9a-f]{8}", found)


def test_no_id_is_tried_again_for_ever(tmp_path, monkeypatch):
    """The old one, once a new one, and then the run is offline."""
    tried = []

    def refused(run, _wandb, _config):
        tried.append((run.mode, run.id.now))
        if run.mode == "online":
            raise RuntimeError("Timed out while retrying: HTTP 409: created and deleted")

    monkeypatch.setattr(WandbRun, "_init", refused)
    monkeypatch.setattr("wandb.teardown", lambda: None)
    ids = RunId(tmp_path, "old")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WandbRun(tmp_path, "online", ids, Tracking(), 1.0).start({})
    assert tried == [("online", "old"), ("online", ids.now), ("offline", ids.now)]
    assert ["was deleted there" in str(w.message) for w in caught] == [True, False]
    assert "offline" in str(caught[1].message)
    assert RunId(tmp_path, "old").now == ids.now != "old", "the next life knows"


def test_project_name_tags_and_a_sweeps_id_are_taken_from_the_environment(server, tmp_path):
    sweep = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial7", "WANDB_PROJECT": "lungs"}
    more = {"WANDB_NAME": "by variable", "WANDB_TAGS": "a,b", "WANDB_ENTITY": "lab"}
    run = train_online(server, tmp_path, range(1, 3), **sweep, **more)
    assert run["id"] == "trial7" and server.runs == ["trial7"]
    said = server.upserts[0]
    assert (said["project"], said["sweep"], said["displayName"]) == (
        "lungs",
        "sweep1",
        "by variable",
    )
    assert said["tags"] == ["a", "b"]


def test_options_of_project_name_and_tags_come_before_the_environment(server, tmp_path):
    how = "wandb_project='hearts', wandb_name='by option', wandb_tags=('c', 'd e')"
    variables = {"WANDB_PROJECT": "lungs", "WANDB_NAME": "by variable", "WANDB_TAGS": "a,b"}
    train_online(server, tmp_path, range(1, 3), how=how, **variables)
    said = server.upserts[0]
    assert (said["project"], said["displayName"]) == ("hearts", "by option")
    assert said["tags"] == ["c", "d e"]
    assert {upsert["host"] or "" for upsert in server.upserts} == {""}, "a host may be a name"
    assert {upsert["program"] for upsert in server.upserts} <= {"vae3d", None}


@pytest.mark.parametrize("mood", ["down", pytest.param("silent", marks=pytest.mark.slow)])
def test_an_outage_at_the_start_costs_nothing_and_leaves_a_file_to_sync(server, tmp_path, mood):
    server.mood = mood
    run = train_online(server, tmp_path, range(1, 4), timeout_s=2.0)
    assert run["slowest"] < AT_ONCE_S and "this run is offline" in run["err"]
    assert run["seconds"] < HELD_S
    assert [row["step"] for row in sync(tmp_path, server)] == [1, 2, 3]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_an_outage_in_the_middle_costs_nothing_and_leaves_a_file_to_sync(server, tmp_path):
    outage = """if step == 5:
        import os, urllib.request
        while not tracker._hosts[0].there:
            time.sleep(0.1)
        urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/outage")"""
    run = train_online(server, tmp_path, range(1, 11), pause_s=0.3, before=outage, close_s=2.0)
    assert run["slowest"] < AT_ONCE_S and run["closed"] < 2 + AT_ONCE_S
    assert "wandb sync" in run["err"]
    assert [row["step"] for row in sync(tmp_path, server)] == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mood", "close_s", "said"),
    [("full", 90, "refused uploads (403 Forbidden)"), ("slow", 3, "did not finish")],
)
def test_a_full_quota_and_a_slow_upload_cost_nothing_and_leave_all_to_sync(
    server, tmp_path, mood, close_s, said
):
    server.mood = mood
    picture = """while not tracker._hosts[0].there:  # else it may have begun nothing in 3 s
        time.sleep(0.1)
    if step == 2:
        import numpy
        from pathlib import Path
        from vae3d.tracking.media import write_png
        path = Path(tracker.out_dir) / "media" / "a.png"
        image = numpy.zeros((8, 8, 3), numpy.uint8)
        path.parent.mkdir()
        tracker.in_background(lambda: {"views/a": write_png(path, image)}, step=2)"""
    run = train_online(server, tmp_path, range(1, 8), pause_s=0.5, before=picture, close_s=close_s)
    assert run["slowest"] < AT_ONCE_S and run["closed"] < close_s + AT_ONCE_S
    assert said in run["err"] and "wandb sync" in run["err"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 7
    assert server.history == [] and server.files == {}, "nothing had arrived"
    rows = sync(tmp_path, server)
    assert sorted({row["step"] for row in rows}) == list(range(1, 8))
    panel = next(row["views/a"] for row in rows if "views/a" in row)
    assert server.files[panel["path"]] == (tmp_path / "media" / "a.png").read_bytes()


@pytest.mark.slow
def test_a_dead_wandb_service_warns_and_the_run_goes_on(server, tmp_path):
    kill = """if step == 5:
        import os, psutil
        while not tracker._hosts[0].there:
            time.sleep(0.1)
        services = [p for p in psutil.process_iter() if p.name() == "wandb-core"]
        ours, = [p for p in services if str(os.getpid()) in p.cmdline()]
        ours.kill()
        time.sleep(1)"""
    run = train_online(server, tmp_path, range(1, 10), before=kill, close_s=5.0)
    assert run["slowest"] < AT_ONCE_S and run["closed"] < 5 + AT_ONCE_S
    assert "the run goes on" in run["err"] and "wandb sync" in run["err"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 9
