"""Jobs: found again, stopped, resumed, dead; and curves from files that grow. Oracle: the processes, and the lines written."""

import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from lownibble.errors import ConfigError, OutputError
from lownibble.studio.launched import Jobs, opened
from lownibble.studio.routes import _products
from lownibble.studio.tracks import POINTS, Track
from lownibble.training.output import hold


def until(jobs, id_, status, seconds=20):
    end = time.monotonic() + seconds
    while (found := jobs.status(jobs.job(id_))) != status:
        assert time.monotonic() < end, found
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("word", "status", "note"), [("good", "ok", ""), ("bad", "failed", "Free some"), ("dies", "died", "Resume")]
)
def test_how_a_job_ends_is_known(jobs, word, status, note):
    job = jobs.start(["eval", word], None)
    until(jobs, job.id, status)
    described = jobs.describe(job)
    assert note in described["note"]
    assert described["command"] == f"lownibble eval {word}"
    assert f"asked for -m lownibble eval {word} --json" in jobs.log(job)


def test_a_job_outlives_the_studio_and_is_found_again(jobs):
    job = jobs.start(["train", "sleeps"], "runs/one")
    again = Jobs(jobs.folder, jobs.note)
    try:
        assert again.job(job.id) == job
        assert again.status(job) == "running"
        with pytest.raises(OutputError, match="is running"):
            again.start(["train", "sleeps"], "runs/one")
        assert psutil.Process(job.pid).ppid() == os.getpid()
        again.stop(job.id)
        until(jobs, job.id, "interrupted")
        resumed = again.resume(job.id)
        assert psutil.pid_exists(resumed.pid)
        while again.log(resumed).count("asked for") < 2:
            time.sleep(0.02)
        assert "asked for -m lownibble train sleeps --resume --json" in again.log(resumed)
    finally:
        for _ in range(2):
            again.stop(job.id)
        again.children[job.id].wait(10)
        again.close()


def test_a_job_that_does_not_stop_is_ended_when_asked_again(jobs):
    job = jobs.start(["merge", "deaf"], None)
    while "asked for" not in jobs.log(job):
        time.sleep(0.02)
    jobs.stop(job.id)
    time.sleep(0.3)
    assert jobs.status(jobs.job(job.id)) == "running"
    with pytest.raises(ConfigError, match="has ended can be resumed"):
        jobs.resume(job.id)
    jobs.stop(job.id)
    until(jobs, job.id, "interrupted")


def test_another_process_with_the_same_id_is_not_the_job(jobs):
    job = jobs.start(["eval", "good"], None)
    until(jobs, job.id, "ok")
    place = jobs.folder / ".studio" / "jobs" / job.id
    (place / "result").write_text("")
    written = json.loads((place / "job.json").read_text())
    (place / "job.json").write_text(json.dumps({**written, "pid": os.getpid(), "began": 1.0}))
    assert jobs.status(jobs.job(job.id)) == "died"


def test_two_studios_on_a_folder(jobs):
    jobs.announce("http://127.0.0.1:8123/")
    with pytest.raises(OutputError, match=r"8123/\. Use that one"), opened(jobs.folder):
        pass


def test_a_full_disk_is_said_and_nothing_is_started(jobs, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OutputError, match=r"No space left on device \(.* GB are free\). Free some space"):
        jobs.start(["train", "sleeps"], "runs/one")
    assert all(child.wait(10) < 0 for child in jobs.children.values())
    assert list((jobs.folder / ".studio" / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["train", "x" * (1 << 20)], "Argument list too long"),
        (["train", "a\0b"], "embedded null byte"),
    ],
    ids=["long", "zero"],
)
def test_a_process_that_cannot_start_leaves_nothing(jobs, words, why):
    with pytest.raises(ConfigError, match=f"Cannot start 'lownibble train' in .*{why}") as raised:
        jobs.start(words, "runs/one")
    assert "Free some space" not in str(raised.value)
    assert list((jobs.folder / ".studio" / "jobs").iterdir()) == []
    assert jobs.start(["train", "good"], "runs/one").id == "train-1"


def test_runs_of_a_terminal_are_listed(jobs):
    folder = jobs.folder / "by-hand"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"command": ["lownibble", "train", "--r", "4"], "status": "ok"}))
    (folder / "events.jsonl").write_text(line(1, 2.5))
    (found,) = jobs.all()
    described = jobs.describe(found)
    assert (described["status"], described["command"], described["own"]) == ("ok", "lownibble train --r 4", False)
    assert described["runs"][0]["loss"] == 2.5


def test_runs_from_a_terminal_that_are_alive(client, jobs):
    """A run and a comparison whose folders are held, as `train` and `compare` hold them."""
    (jobs.folder / "alone").mkdir()
    (jobs.folder / "alone" / "events.jsonl").write_text(line(1, 2.5))
    (jobs.folder / "both" / "lora").mkdir(parents=True)
    (jobs.folder / "both" / "lora" / "events.jsonl").write_text(line(1, 2.5))

    def listed():
        return {each["id"]: (each["kind"], each["status"]) for each in client.get("/api/jobs").json()["jobs"]}

    with hold(jobs.folder / "alone"), hold(jobs.folder / "both"):
        assert listed() == {"run:alone": ("train", "running"), "run:both": ("compare", "running")}
        assert client.get("/api/jobs/run:both").json()["runs"][0]["loss"] == 2.5
        refused = client.post("/api/jobs/run:alone/stop", json={})
        assert (refused.status_code, "where it was started" in refused.text) == (400, True)
    assert listed() == {"run:alone": ("train", "interrupted")}  # a folder of runs is none itself


def test_asking_whether_a_run_is_alive_keeps_none_from_starting(jobs):
    folder = jobs.folder / "asked"
    folder.mkdir()
    (folder / ".lock").touch()
    with (folder / ".lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.03, asking.close).start()
        with hold(folder):
            assert jobs.all() == []


def test_records_and_folders_that_cannot_be_read(client, jobs, monkeypatch):
    for name, text in (("list", "[1]"), ("text", '"x"'), ("none", "null"), ("half", "{"), ("odd", '{"command": 5}')):
        (jobs.folder / name).mkdir()
        (jobs.folder / name / "record.json").write_text(text)
    (jobs.folder / "locked").mkdir()
    there = Path.exists

    def exists(self):
        if "locked" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return there(self)

    monkeypatch.setattr(Path, "exists", exists)
    listed = client.get("/api/jobs").json()["jobs"]
    assert {each["id"] for each in listed} == {"run:list", "run:text", "run:none", "run:half", "run:odd"}
    assert {each["command"] for each in listed} == {"lownibble train"}
    assert [client.get(f"/api/jobs/{each['id']}").status_code for each in listed] == [200] * 5


def line(step, loss):
    return json.dumps({"event": "Stepped", "step": step, "loss": loss, "tokens": 100, "seconds": 0.5}) + "\n"


def test_ten_long_runs_reach_the_page_at_once(client, jobs):
    """What ten runs of 10,000 steps append is on the page within a second, and only that is read."""
    losses = np.random.default_rng(0).random(10_000)
    names = [f"long-{n}" for n in range(10)]
    for name in names:
        (jobs.folder / name).mkdir()
        (jobs.folder / name / "events.jsonl").write_text("".join(line(n + 1, loss) for n, loss in enumerate(losses)))

    def page():
        listed = client.get("/api/jobs").json()["jobs"]
        return listed, [client.get(f"/api/jobs/{each['id']}/curves").json()[0] for each in listed]

    page()
    tracks = list(jobs.tracks.values())
    before = [track.tail.bytes_read for track in tracks]
    waits, new = [], ""
    for step in range(10_001, 10_004):
        new += line(step, 0.25)
        for name in names:
            with (jobs.folder / name / "events.jsonl").open("a") as file:
                file.write(line(step, 0.25))
        began = time.perf_counter()
        listed, curves = page()
        waits.append(time.perf_counter() - began)
    assert min(waits) < 0.6  # the page waits 0.4 s between two looks
    assert [each["runs"][0]["step"] for each in listed] == [10_003] * 10
    assert [track.tail.bytes_read - n for track, n in zip(tracks, before, strict=True)] == [len(new)] * 10
    for curve in curves:
        assert len(curve["step"]) <= POINTS
        width = curve["mean_of"]
        assert curve["loss"][0] == pytest.approx(losses[:width].mean(), rel=1e-4)
        assert curve["step"][-1] == 10_003


def test_steps_done_again_replace_those_of_before(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(line(n, float(n)) for n in range(1, 9)) + '{"event": "Stepped", "step": 9, "lo')
    track = Track("", path).look()
    assert track.curve()["step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    with path.open("a") as file:
        file.write(
            '\n{"event": "Started", "first_step": 4, "total_steps": 20}\n'
            + line(5, 50.0)
            + "[]\nno json\n"
            + line(6, float("nan"))
        )
    curve = track.look().curve()
    assert curve["step"] == [1, 2, 3, 4, 5, 6]
    assert curve["loss"] == [1, 2, 3, 4, 50, None]
    assert track.figures()["total"] == 20


def test_memory_is_noted_while_a_job_runs(jobs, monkeypatch):
    failures = []

    def fails_once():
        if not failures:
            failures.append(1)
            raise RuntimeError("the driver's tool said something new")
        return {}

    monkeypatch.setattr("lownibble.studio.launched.gpu_bytes", fails_once)
    job = jobs.start(["eval", "sleeps"], None, planned=[1, 2, 3])
    end = time.monotonic() + 20
    while not (found := jobs.memory(job))["bytes"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert 0 < found["peak"] < 1 << 30
    assert failures
    assert jobs.describe(job)["planned"] == [1, 2, 3]


def test_curves_are_read_under_the_lock(client, jobs, monkeypatch):
    """A look in another thread would find the columns exported, and leave them of different lengths."""
    (jobs.folder / "one").mkdir()
    (jobs.folder / "one" / "events.jsonl").write_text(line(1, 2.5))
    held = []
    for name in ("curve", "figures", "look"):
        real = getattr(Track, name)
        monkeypatch.setattr(Track, name, lambda self, real=real: (held.append(jobs.lock._is_owned()), real(self))[1])
    assert client.get("/api/jobs/run:one").json()["curves"][0]["loss"] == [2.5]
    assert client.get("/api/jobs/run:one/curves").json()[0]["loss"] == [2.5]
    assert len(held) >= 5
    assert all(held)


def test_a_run_whose_steps_are_skipped_says_so(tmp_path):
    path = tmp_path / "events.jsonl"
    skipped = [{"event": "Skipped", "step": n, "reason": "the loss is nan", "seconds": 0.5} for n in range(1, 61)]
    events = [{"event": "Started", "first_step": 0, "total_steps": 100}, *skipped]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    track = Track("", path).look()
    assert (track.figures()["step"], track.figures()["seconds_left"]) == (60, 20.0)
    assert track.said() == ["Steps that were skipped: 60. The last one, 60: the loss is nan"]
    with path.open("a") as file:
        file.write('{"event": "Started", "first_step": 40, "total_steps": 100}\n' + line(41, 1.0))
    track.look()
    assert track.figures()["step"] == 41
    assert "skipped: 40. The last one, 40" in track.said()[0]


@pytest.mark.parametrize("steps", [3, 30])
def test_a_file_that_is_written_anew_is_read_anew(tmp_path, steps):
    """Shorter or longer than the one before."""
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps({"event": "Warned", "message": "old"}) + "\n" + "".join(line(n, 9.0) for n in range(1, 11)))
    track = Track("", path).look()
    path.write_text("".join(line(n, 1.0) for n in range(1, steps + 1)))
    assert track.look().curve()["step"] == list(range(1, steps + 1))
    assert set(track.curve()["loss"]) == {1.0}
    assert track.said() == []


def test_a_servers_address_is_that_of_its_last_start(client, jobs):
    job = jobs.start(["serve", "sleeps"], None)
    log = jobs.folder / ".studio" / "jobs" / job.id / "log"

    def say(text):
        with log.open("a") as file:
            file.write(text)

    def address():
        return client.get(f"/api/jobs/{job.id}").json()["address"]

    assert address() is None
    say("listening at http://127.0.0.1:1/v1\n")
    assert address() == "http://127.0.0.1:1"
    say("a request\n" * 10_000)  # more than is shown
    assert address() == "http://127.0.0.1:1"
    jobs.stop(job.id)
    jobs.children[job.id].wait(10)
    assert address() is None
    jobs.resume(job.id)
    assert address() is None
    say("listening at http://127.0.0.1:2/v1\n")
    assert address() == "http://127.0.0.1:2"


def test_a_folder_is_the_same_from_another_one(tmp_path, monkeypatch):
    """A run is listed once, and paths of what it left mean something where the studio is now."""
    place, run = tmp_path / "home" / "runs" / ".studio" / "jobs" / "train-1", tmp_path / "home" / "runs" / "qlora-1"
    place.mkdir(parents=True)
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "events.jsonl").write_text(line(1, 2.5))
    job = {"id": "train-1", "words": ["train"], "cwd": str(tmp_path / "home"), "output": "runs/qlora-1", "pid": 1 << 30}
    (place / "job.json").write_text(json.dumps(job))
    (tmp_path / "other").mkdir()
    for there, folder in ((tmp_path / "home", "runs"), (tmp_path / "other", "../home/runs")):
        monkeypatch.chdir(there)
        with opened(folder) as jobs:
            (found,) = jobs.all()
            product = next(each for each in _products(found) if each["what"] == "adapter")
            assert Path(product["path"]).resolve() == run / "adapter"
            assert Path(product["folder"]).resolve() == Path(jobs.describe(found)["output"]).resolve() == run
            assert jobs.free_output("qlora").endswith("qlora-2")


def test_a_method_with_a_record_is_over(jobs):
    """One that failed says nothing at its end."""
    for name in ("lora", "qlora"):
        (jobs.folder / "both" / name).mkdir(parents=True)
        started = json.dumps({"event": "Started", "first_step": 0, "total_steps": 9}) + "\n"
        (jobs.folder / "both" / name / "events.jsonl").write_text(started + line(1, 2.5))
    (jobs.folder / "both" / "lora" / "record.json").write_text('{"status": "failed"}')
    with hold(jobs.folder / "both"):
        (found,) = jobs.all()
        assert [run["phase"] for run in jobs.describe(found)["runs"]] == ["finished", "training"]


def test_jobs_of_another_version_and_a_folder_that_is_gone(client, jobs):
    place = jobs.folder / ".studio" / "jobs" / "train-9"
    place.mkdir()
    for text in ('{"id": "train-9", "words": null, "cwd": "/"}', '{"id": "train-9", "words": [1], "cwd": "/"}', "{}"):
        (place / "job.json").write_text(text)
        assert client.get("/api/jobs").json()["jobs"] == []
    shutil.rmtree(jobs.folder)
    gone = client.get("/api/jobs")
    jobs.folder.mkdir()
    (jobs.folder / ".studio" / "jobs").mkdir(parents=True)
    assert gone.status_code == 507
    assert "Cannot read 'runs': No such file or directory." in gone.json()["error"]


def test_of_many_the_newest_and_what_runs_are_listed(client, jobs, monkeypatch):
    monkeypatch.setattr("lownibble.studio.routes.MOST_JOBS", 1)
    for age, name in enumerate(("new", "old", "oldest")):
        (jobs.folder / name).mkdir()
        (jobs.folder / name / "events.jsonl").write_text(line(1, 2.5))
        os.utime(jobs.folder / name / "events.jsonl", (1e9 - age, 1e9 - age))
    with hold(jobs.folder / "oldest"):
        found = client.get("/api/jobs").json()
    assert ([each["id"] for each in found["jobs"]], found["left_out"]) == (["run:new", "run:oldest"], 1)
