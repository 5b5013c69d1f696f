"""Routes of the studio (FastAPI): the page is four files of this folder, everything else is JSON below /api.

Who may use them: `gate.py`. Work that takes long or may crash on what was uploaded runs in a process of its own.
"""

from __future__ import annotations

import hmac
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from lownibble import __version__
from lownibble.config import PlanConfig
from lownibble.data.files import SUFFIXES
from lownibble.errors import ConfigError, DataError, InputError, LownibbleError, OutputError
from lownibble.planning import hardware, models
from lownibble.studio.fields import COMMANDS, command_line, configuration, fields, taken_by
from lownibble.studio.gate import Gate, cookie, ticket
from lownibble.studio.held import gpu_name
from lownibble.studio.launched import Job, Jobs
from lownibble.study.spec import read_study

HERE = Path(__file__).parent
MOST_JOBS = 100
"""Jobs in the list: the newest, and those that run."""

SPARE = 64 << 20
"""Bytes of the disk that an upload leaves free."""

MOST_NAME = 200
"""Bytes of an uploaded file's name; file systems allow 255, and more is put before it."""

_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
_POLICY += "form-action 'none'; frame-ancestors 'none'"
_REPORT = "sandbox allow-scripts allow-downloads; "
_REPORT += "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""Reports are pages with scripts of their own; sandboxed, they cannot use this server."""

_LINK = re.compile(r'<a href="(?!#)[^"]*">([^<]*)</a>')
"""A report's link to a record, which lies beside the file: here its words alone, as a sandboxed page is not answered."""

_FILES = {"/": "studio.html", "/studio.css": "studio.css", "/studio.js": "studio.js", "/charts.js": "charts.js"}


class Form(BaseModel):
    """A command and the texts of its options."""

    model_config = ConfigDict(extra="forbid")
    command: str
    values: dict[str, str] = {}
    gpu: str | None = None
    tokens: int | None = None
    toml: str | None = None


class Key(BaseModel):
    """What the page sends for the cookie."""

    key: str


def app(jobs: Jobs, *, host: str = "127.0.0.1", api_key: str | None = None) -> FastAPI:
    """Build the application."""
    made = FastAPI(title="Lownibble studio", docs_url=None, redoc_url=None, openapi_url=None)
    made.add_middleware(Gate, host=host, key=api_key)
    previews = threading.Lock()

    @made.exception_handler(InputError)
    async def bad(_: Request, error: InputError) -> Response:
        return JSONResponse({"error": str(error)}, 507 if isinstance(error, OutputError) else 400)

    @made.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": error.errors()[0]["msg"]}, 400)

    @made.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"An error of the studio's own: {type(error).__name__}: {error}"}, 500)

    def file(name: str) -> Callable[[], Awaitable[Response]]:
        async def send() -> Response:
            return FileResponse(HERE / name, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})

        return send

    for path, name in _FILES.items():
        made.add_api_route(path, file(name))

    @made.post("/api/key")
    async def key(body: Key, request: Request) -> Response:
        if not api_key or not hmac.compare_digest(body.key.encode(), api_key.encode()):
            return JSONResponse({"error": "The key is wrong. It was given as --api-key or LOWNIBBLE_API_KEY."}, 401)
        answer = JSONResponse({"status": "ok"})
        answer.set_cookie(cookie(request.headers), ticket(api_key), httponly=True, samesite="strict")
        return answer

    @made.get("/api/form")
    def form() -> dict[str, Any]:
        return {
            "version": __version__, "folder": str(jobs.folder), "suffixes": SUFFIXES, "here": here(),
            "commands": {name: {"fields": fields(name), "positional": spec.positional} for name, spec in COMMANDS.items()},
            "devices": [{"name": "cpu", "title": "this machine's processor"}]
            + [{"name": d.name, "title": f"{d.title}, {d.memory_bytes / 2**30:.0f} GiB"} for d in _devices()],
            "models": ["demo", *models.names()],
        }  # fmt: skip

    @made.post("/api/check")
    def check(body: Form) -> dict[str, Any]:
        return _or_error(lambda: {"command": _shown(_words(jobs, body))})

    @made.post("/api/plan")
    def plan(body: Form) -> dict[str, Any]:
        return _or_error(lambda: make_plan(body))

    @made.post("/api/preview")
    def preview(body: Form) -> dict[str, Any]:
        with previews:
            return _or_error(lambda: _answer_of(command_line("data", taken_by("data", body.values, body.command))))

    @made.post("/api/upload")
    async def upload(name: str, request: Request) -> dict[str, Any]:
        return await _receive(jobs.folder / "uploads", name, request)

    @made.get("/api/jobs")
    def all_jobs() -> dict[str, Any]:
        found = jobs.all()
        shown = [*found[:MOST_JOBS], *(job for job in found[MOST_JOBS:] if jobs.status(job) == "running")]
        return {
            "jobs": [jobs.describe(job) for job in shown], "left_out": len(found) - len(shown),
            "disk_free": shutil.disk_usage(jobs.folder).free,
        }  # fmt: skip

    @made.post("/api/jobs")
    def start(body: Form) -> dict[str, Any]:
        return jobs.describe(_start(jobs, body, host, api_key))

    @made.get("/api/jobs/{id_}")
    def one(id_: str) -> dict[str, Any]:
        job = jobs.job(id_)
        described = jobs.describe(job)
        with jobs.lock:
            tracks = jobs.tracks_of(job)
            curves = [track.curve() for track in tracks]
            warnings = [line for track in tracks for line in track.said()]
        return {
            **described, "curves": curves, "memory": jobs.memory(job), "log": jobs.log(job), "address": jobs.address(job),
            "warnings": list(dict.fromkeys(warnings))[-20:],
            "report": job.folder is not None and (job.folder / "report.html").exists(),
            "result": _summary(jobs.result(job)), "products": _products(job),
        }  # fmt: skip

    @made.get("/api/jobs/{id_}/curves")
    def curves(id_: str) -> list[dict[str, Any]]:
        job = jobs.job(id_)
        with jobs.lock:
            return [track.curve() for track in jobs.tracks_of(job)]

    @made.get("/api/jobs/{id_}/report")
    def report(id_: str) -> Response:
        folder = jobs.job(id_).folder
        if folder is None or not (folder / "report.html").exists():
            raise ConfigError("There is no report yet. It is written when the job has ended.")
        text = (folder / "report.html").read_text(encoding="utf-8")
        return HTMLResponse(_LINK.sub(r"\1", text), headers={"Content-Security-Policy": _REPORT})

    @made.post("/api/jobs/{id_}/stop")
    def stop(id_: str) -> dict[str, Any]:
        return jobs.describe(jobs.stop(id_))

    @made.post("/api/jobs/{id_}/resume")
    def resume(id_: str) -> dict[str, Any]:
        return jobs.describe(jobs.resume(id_, _environment(jobs.job(id_).kind, api_key)))

    return made


def _or_error(answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """An answer, or what is wrong with the form: that is an answer, too, and no failed request in the browser's console."""
    try:
        return answer()
    except InputError as error:
        return {"error": str(error)}


def _words(jobs: Jobs, body: Form) -> list[str]:
    """The words after `lownibble` that do what a form says. Raises as `command_line`, and as `read_study`."""
    if body.command != "study":
        return command_line(body.command, _with_output(jobs, body))
    _check_study(body.toml or "")
    return ["study", "run", "study.toml", "--output", jobs.free_output("study")]


def _check_study(text: str) -> None:
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "study.toml"
            path.write_text(text, encoding="utf-8")
            read_study(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), path.name)) from None
    except OSError as error:
        raise OutputError(f"The study could not be checked: {error.strerror} ({gettempdir()}). Make room there.") from None


def here() -> str:
    """The planner's name for the device that runs are trained on by default."""
    known = hardware.known_as(gpu_name())
    return known if known in hardware.names() else "cpu"


def _devices() -> list[hardware.Device]:
    return [hardware.device(name) for name in hardware.names()]


def _shown(words: list[str]) -> str:
    return f"lownibble {shlex.join(words)}"


def make_plan(body: Form) -> dict[str, Any]:
    """The plan of a run or a comparison with all methods, on one card or on 'all'; and which method was asked for.

    Raises:
        InputError: an option is not valid, or the model cannot be planned.
    """
    run = configuration(body.command, body.values)
    of_ranks = ("train.parallel", "train.fsdp_cpu_offload")
    values = {
        k: v for k, v in taken_by("plan", body.values, body.command).items() if not k.startswith("data.") and k not in of_ranks
    }
    method = str(getattr(run, "method", "all"))
    alone = method != "all" and (run.merge_aware or run.train.loraplus_lr_ratio is not None)  # what not every method can have
    values |= {"gpu": body.gpu or here(), "method": method if alone else "all"}
    return {"method": method, "plan": _plan(values | ({"tokens": str(body.tokens)} if body.tokens else {}))}


def _plan(values: dict[str, str]) -> dict[str, Any]:
    from lownibble.arch import is_known
    from lownibble.planning.plan import plan

    config: PlanConfig = configuration("plan", values)
    if is_known(models.find_config(config.model)):
        return plan(config).to_dict()
    return _answer_of(command_line("plan", values))


def _answer_of(words: list[str], seconds: float = 600) -> dict[str, Any]:
    """The JSON document of a command that runs in a process of its own, here and now.

    Raises:
        DataError: it failed; says why.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lownibble", *words, "--json"], capture_output=True, text=True, check=False, timeout=seconds,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        raise DataError(f"'{_shown(words)}' did not end within {seconds:.0f} s. Try it in a terminal.") from None
    except ValueError:
        why = done.stderr.strip().rpartition("\n")[2]
        raise DataError(
            f"'{_shown(words)}' ended without an answer (exit code {done.returncode}). {why} Is the file what its name says?"
        ) from None
    if done.returncode:
        raise DataError(str(found.get("error", "It failed.")))
    return found


_FACTS = ("model", "adapter", "adapters", "source", "method", "methods", "data.path")
"""Options that the page names a job by, and fills the next one's with."""


def _environment(command: str, api_key: str | None) -> dict[str, str]:
    """What a command gets beside the studio's own environment: a server asks for the studio's key."""
    return {"LOWNIBBLE_API_KEY": api_key} if command == "serve" and api_key else {}


def _start(jobs: Jobs, body: Form, host: str, api_key: str | None) -> Job:
    if body.command == "study":
        output = jobs.free_output("study")
        words = ["study", "run", "{job}/study.toml", "--output", output]
        return jobs.start(words, output, files={"study.toml": body.toml or ""})
    values, environment = _with_output(jobs, body), _environment(body.command, api_key)
    if environment:
        values.setdefault("host", host)
    words, leaf = command_line(body.command, values), COMMANDS[body.command].output
    planned = _planned(body) if body.command == "train" else None
    facts = {name: values[name] for name in _FACTS if name in values}
    return jobs.start(words, values.get(leaf) if leaf else None, planned=planned, facts=facts, environment=environment)


def _with_output(jobs: Jobs, body: Form) -> dict[str, str]:
    """A form's values, with a new path in the studio's folder where the command has an output and none is given."""
    leaf = COMMANDS[body.command].output if body.command in COMMANDS else None
    if leaf is None or body.values.get(leaf):
        return body.values
    name = body.values.get("method", "qlora") if body.command == "train" else body.command
    is_file = body.command == "export" and body.values.get("format", "gguf") == "gguf"
    return {**body.values, leaf: jobs.free_output(f"{name}.gguf" if is_file else name)}


def _planned(body: Form) -> list[int] | None:
    """Low, likely and high bytes of a run by its plan; None where there is none: that is no reason not to run."""
    try:
        found = make_plan(body)
    except LownibbleError:
        return None
    row = next((row for row in found["plan"]["rows"] if row["method"] == found["method"]), None)
    return None if row is None else [int(row["memory"]["device_bytes"][end]) for end in ("low", "likely", "high")]


def _products(job: Job) -> list[dict[str, str]]:
    """What a job left that another can take: adapters, models and files."""
    folder, found = job.folder, []
    if folder is None or job.shown is None:
        return []
    for path in (folder, *(sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else ())):
        shown = job.shown if path == folder else f"{job.shown}/{path.name}"
        if (path / "adapter" / "adapter_config.json").exists():
            found.append({"what": "adapter", "path": f"{shown}/adapter", "folder": shown})
        if (path / "adapter_config.json").exists() and path == folder:
            found.append({"what": "adapter", "path": shown, "folder": str(Path(shown).parent)})
        if (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            found.append({"what": "model", "path": shown, "folder": shown})
    if folder.is_file():
        found.append({"what": "file", "path": job.shown, "folder": str(Path(job.shown).parent)})
    return found


def _summary(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a record, what the page shows: not its steps."""
    if result is None:
        return None
    kept = ("kind", "status", "error", "seconds", "advice", "output", "onto", "scores", "adapter_bytes", "format", "warnings")
    found = {name: result[name] for name in kept if name in result}
    if evaluations := result.get("evaluations"):
        found["evaluations"] = [
            {k: each.get(k) for k in ("step", "loss", "scores")} for each in (evaluations[0], evaluations[-1])
        ]
    planned = result.get("memory", {}).get("planned", {}) if isinstance(result.get("memory"), dict) else {}
    if "measured_bytes" in planned:
        found["memory"] = {name: planned[name] for name in ("planned_bytes", "measured_bytes", "error", "within")}
    if isinstance(result.get("config"), dict):
        found["config"] = result["config"]
    if isinstance(result.get("methods"), list):
        shown = ("method", "status", "eval_loss", "peak_bytes", "tokens_per_s", "error")
        found["methods"] = [{name: each.get(name) for name in shown} for each in result["methods"]]
    return found


async def _receive(folder: Path, name: str, request: Request) -> dict[str, Any]:
    """Write an uploaded file, whole or not at all.

    Raises:
        DataError: its name says no format that is read, or it was not sent whole. OutputError: the disk has no room.
    """
    clean = re.sub(r"[^\w.-]+", "_", Path(name.replace("\\", "/")).name).lstrip(".-")
    clean = clean.encode()[-MOST_NAME:].decode(errors="ignore")
    if not clean.lower().endswith(tuple(SUFFIXES)):
        raise DataError(
            f"'{name[:100]}' is no file of rows: its name must end in one of {', '.join(SUFFIXES)}. Save the table as .csv or "
            ".jsonl, then upload that."
        )
    size = request.headers.get("content-length") or "0"
    if not size.isdecimal():
        raise DataError("The upload does not say how large it is. Upload it again.")
    announced = int(size)
    free = shutil.disk_usage(folder.parent).free
    if announced + SPARE > free:
        raise OutputError(
            f"The file has {announced / 1e6:.0f} MB and the disk {free / 1e6:.0f} MB free. Free some space, or give its path."
        )
    part, received = folder / f".{clean}.{id(request)}.part", 0
    try:
        folder.mkdir(exist_ok=True)
        with part.open("wb") as file:
            async for chunk in request.stream():
                received += len(chunk)
                await run_in_threadpool(file.write, chunk)
        if received != announced and announced:
            raise DataError("The file did not arrive whole. Upload it again.")
        target = next(p for n in range(1 << 20) if not (p := folder / (clean if not n else f"{n}-{clean}")).exists())
        part.replace(target)
    except OSError as error:
        raise OutputError(f"Cannot write '{clean}': {error.strerror}. Free some space, then upload it again.") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return {"path": str(target), "bytes": received}
