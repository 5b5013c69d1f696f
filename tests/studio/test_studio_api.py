"""The studio's routes: who may use them, forms, uploads of anything. Oracle: the command line's own parser."""

import json
import time
from pathlib import Path

import psutil
import pytest
from starlette.testclient import TestClient

from lownibble.cli.main import _parser
from lownibble.errors import ConfigError
from lownibble.flags import read
from lownibble.leaves import leaves
from lownibble.studio.fields import COMMANDS, NOT_SHOWN, command_line, configuration, fields, taken_by
from lownibble.studio.routes import Form, _planned, app, make_plan

REQUIRED = {"merge": {"adapter": "a", "output": "b"}, "export": {"source": "a", "output": "b"}, "quantize": {"output": "b"}}
OPEN = {
    "lora.target_modules": "q_proj,v_proj", "quant.pattern": "{down_proj = {quant_type = 'int8'}}", "lora.r": "3",
    "data.completion_template": " {label}", "data.prompt_template": "- {text}", "train.max_steps": "7", "methods": "full,lora",
    "train.memory_budget": "2GB", "gpus": "2,4",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_form_is_the_command_line(command):
    """Each field's last choice, or a text, alone: the words mean to the parser what the form says."""
    shown = fields(command)
    config = COMMANDS[command].config
    assert {each["name"] for each in shown} == {".".join(path) for path, _ in leaves(config)} - set(NOT_SHOWN)
    tried = 0
    for each in shown:
        value = OPEN.get(each["name"]) or next((c for c in reversed(each["choices"]) if c != each["default"]), None)
        if value is None:
            continue
        values = {**REQUIRED.get(command, {}), each["name"]: value}
        try:
            expected = configuration(command, values)
        except ConfigError:
            continue  # a choice that needs another one
        arguments = _parser().parse_args(command_line(command, values))
        assert read(arguments, config) == expected, each["name"]
        tried += 1
    assert tried


def test_a_word_that_would_be_a_flag_is_refused():
    with pytest.raises(ConfigError, match="taken for an option"):
        command_line("export", {"source": "--force", "output": "x"})
    with pytest.raises(ConfigError, match="no option api_key"):
        command_line("serve", {"api_key": "seen by all"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200), ({"origin": "http://127.0.0.1:8100"}, 200), ({"host": "localhost:8100"}, 200),
        ({"host": "rebound.example:8100"}, 403), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403), ({"content-type": "text/plain"}, 415),
        ({"origin": "http://127.0.0.1:9999"}, 403), ({"content-length": "99999999"}, 413),
    ],
    ids=str,
)  # fmt: skip
def test_only_the_own_page_may_ask(client, jobs, headers, status):
    body = json.dumps({"command": "eval", "values": {"model": "good"}})
    answer = client.post("/api/jobs", content=body, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status != 200)
    assert len(jobs.all()) == (status == 200)


def test_a_key_is_asked_for_and_kept_in_a_cookie(jobs):
    with TestClient(app(jobs, host="0.0.0.0", api_key="secret"), base_url="http://studio.example:8100") as client:
        assert client.get("/").status_code == 200
        assert client.get("/api/jobs").status_code == 401
        assert client.get("/api/jobs", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.post("/api/key", json={"key": "guess"}).status_code == 401
        answer = client.post("/api/key", json={"key": "secret"})
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "SameSite=strict" in answer.headers["set-cookie"]
        assert client.get("/api/jobs").status_code == 200


@pytest.mark.parametrize("host", ["[::1]", "[::1]:8100", "studio.example"])
def test_a_key_is_kept_at_any_host(jobs, host):
    with TestClient(app(jobs, host="::", api_key="secret"), base_url=f"http://{host}") as client:
        answer = client.post("/api/key", json={"key": "secret"})
        kept = answer.headers["set-cookie"].partition(";")[0]
        assert kept.startswith("studio-8100=" if "8100" in host else "studio-=")
        assert client.get("/api/jobs", headers={"cookie": kept}).status_code == 200


def test_a_key_of_any_characters_logs_in(jobs):
    key = 'a,b;c"d\\e f='
    with TestClient(app(jobs, api_key=key), base_url="http://127.0.0.1:8100") as client:
        assert client.post("/api/key", json={"key": key}).status_code == 200
        (ticket,) = client.cookies.values()
        assert client.get("/api/jobs").status_code == 200
        client.cookies.clear()
        assert client.get("/api/jobs", headers={"authorization": f"Bearer {ticket}"}).status_code == 401
        assert client.get("/api/jobs", headers={"authorization": f"Bearer {key}"}).status_code == 200


def key_of(pid):
    """The key in a process's environment, which is empty for a moment while it is started."""
    end = time.monotonic() + 10
    while not (found := psutil.Process(pid).environ()):
        assert time.monotonic() < end
    return found.get("LOWNIBBLE_API_KEY")


def test_a_server_has_the_studios_key_when_resumed_too(jobs, monkeypatch):
    monkeypatch.delenv("LOWNIBBLE_API_KEY", raising=False)
    with TestClient(app(jobs, api_key="secret"), base_url="http://127.0.0.1:8100") as client:
        client.headers["authorization"] = "Bearer secret"
        asked = {"command": "serve", "values": {"model": "sleeps"}}
        id_ = client.post("/api/jobs", json=asked).json()["id"]
        first = jobs.job(id_).pid
        assert key_of(first) == "secret"
        client.post(f"/api/jobs/{id_}/stop", json={})
        jobs.children[id_].wait(10)
        assert client.post(f"/api/jobs/{id_}/resume", json={}).status_code == 200
        resumed = jobs.job(id_).pid
        assert resumed != first
        assert key_of(resumed) == "secret"
        other = client.post("/api/jobs", json={"command": "eval", "values": {"model": "sleeps"}}).json()["id"]
        assert key_of(jobs.job(other).pid) is None


def test_a_template_with_the_word_job_stays(client, jobs):
    values = {"model": "good", "data.prompt_template": "Title: {job}"}
    id_ = client.post("/api/jobs", json={"command": "eval", "values": values}).json()["id"]
    assert any(word.endswith("Title: {job}") for word in jobs.job(id_).words)
    study = client.post("/api/jobs", json={"command": "study", "toml": "# good"}).json()["id"]
    place = jobs.folder / ".studio" / "jobs" / study
    assert jobs.job(study).words[2] == str(place / "study.toml")
    assert (place / "study.toml").read_text() == "# good"


def test_the_page_is_small_and_loads_nothing_from_elsewhere(client):
    total = 0
    for path in ("/", "/studio.css", "/studio.js", "/charts.js"):
        answer = client.get(path)
        total += len(answer.content)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "https://" not in answer.text
    assert total < 300_000


def upload(client, name, content=b"{}\n"):
    return client.post(
        "/api/upload", params={"name": name}, content=content, headers={"content-type": "application/octet-stream"}
    )


def test_uploads_of_anything(client, jobs):
    assert upload(client, "rows.jsonl").json() == {"path": "runs/uploads/rows.jsonl", "bytes": 3}
    assert upload(client, "../../rows.jsonl", b"other").json()["path"] == "runs/uploads/1-rows.jsonl"
    assert (jobs.folder / "uploads" / "rows.jsonl").read_bytes() == b"{}\n"
    assert upload(client, ".hidden.csv").json()["path"] == "runs/uploads/hidden.csv"
    for name in ("photo.png", "", "..", "rows.jsonl\0.exe", "C:\\x\\table.xlsx"):
        refused = upload(client, name, b"\x89PNG")
        assert refused.status_code == 400
        assert "must end in one of .jsonl" in refused.json()["error"]


def test_uploads_with_long_names_and_odd_lengths(client, jobs):
    """Names are cut by their bytes: letters that take three are fewer."""
    for name in ("\u6570" * 80 + ".jsonl", "a" * 300 + ".jsonl"):
        path = Path(upload(client, name).json()["path"])
        assert path.read_bytes() == b"{}\n"
        assert path.suffix == ".jsonl"
        assert 190 < len(path.name.encode()) <= 200
    headers = {"content-type": "application/octet-stream", "content-length": "abc"}
    assert client.post("/api/upload?name=a.csv", content=b"{}\n", headers=headers).status_code == 400


def test_an_upload_to_a_full_disk(client, jobs, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("lownibble.studio.routes.shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
        refused = upload(client, "rows.jsonl")
    assert refused.status_code == 507
    assert "Free some space" in refused.json()["error"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    refused = upload(client, "rows.jsonl")
    assert (refused.status_code, "No space left" in refused.json()["error"]) == (507, True)
    assert list((jobs.folder / "uploads").iterdir()) == []


def test_the_plan_is_the_planners():
    from lownibble.planning.plan import plan

    values = {"model": "demo", "train.batch_size": "2", "train.max_length": "128", "method": "qlora", "data.path": "rows.csv"}
    found = make_plan(Form(command="train", values=values, gpu="rtx-4090", tokens=100_000))
    expected = plan("demo", gpu="rtx-4090", method="all", batch_size=2, max_length=128, tokens=100_000)
    assert found["plan"]["rows"] == [row.to_dict() for row in expected.rows]
    bytes_ = next(row for row in expected.rows if row.verdict.method == "qlora").verdict.memory.device
    assert _planned(Form(command="train", values=values, gpu="rtx-4090", tokens=100_000)) == list(bytes_)
    assert _planned(Form(command="train", values={**values, "model": "no/such/model"}, gpu="rtx-4090")) is None


def test_a_plan_of_a_comparison_has_its_own_defaults():
    """Oracle: the planner, given what `compare` runs with."""
    from lownibble.planning.plan import plan

    train = configuration("compare", {}).train
    found = make_plan(Form(command="compare", values={}, gpu="rtx-4090"))
    expected = plan("demo", gpu="rtx-4090", method="all", batch_size=train.batch_size, max_length=train.max_length)
    assert found["plan"]["rows"] == [row.to_dict() for row in expected.rows]
    assert train.max_length != configuration("plan", {}).train.max_length
    taken = taken_by("data", {"lora.r": "3", "data.path": "x"}, "compare")
    assert taken == {"data.path": "x", "train.max_length": str(train.max_length), "data.max_eval_rows": "256"}
    assert taken_by("data", {"data.path": "x"}, "train") == taken_by("data", {"data.path": "x"}, "study") == {"data.path": "x"}


def test_wrong_options_are_said(client):
    answer = client.post("/api/check", json={"command": "train", "values": {"lora.r": "0"}})
    assert answer.json()["error"] == "The 'r' of LoraConfig must be an integer >= 1. Got 0."
    assert client.get("/api/jobs/nothing").status_code == 400


def test_a_study_is_checked_before_it_is_started(client):
    asked = {"command": "study", "toml": "name = 'mine'\nlora = {}"}
    assert client.post("/api/check", json=asked).json()["error"].startswith("'study.toml' has what a study does not: lora.")
    assert "TOML" in client.post("/api/check", json={**asked, "toml": "name ="}).json()["error"]
    whole = """name = "a"
seeds = [0]
models = { m = "demo" }
methods = { lora = { method = "lora" } }
tasks = { t = { kind = "classification", data = { path = "demo" } } }"""
    checked = client.post("/api/check", json={**asked, "toml": whole}).json()
    assert checked == {"command": "lownibble study run study.toml --output runs/study-1"}


def test_a_study_is_written_and_started(client, jobs):
    made = client.post("/api/jobs", json={"command": "study", "toml": "name = 'mine'", "values": {}}).json()
    assert made["output"] == "runs/study-1"
    assert (jobs.folder / ".studio" / "jobs" / made["id"] / "study.toml").read_text() == "name = 'mine'"
    assert "study.toml --output runs/study-1" in made["command"]
