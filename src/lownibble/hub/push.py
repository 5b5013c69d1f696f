"""`lownibble push`: an adapter or a model, with its card, to the hub, through `huggingface_hub`.

Repositories are made private: what was trained on one's own rows is published by a decision, not by a default. One that is
there already keeps its visibility. Local names stay local: records (which hold paths) are not uploaded, what they say is on the
card; an adapter whose base is a local folder is refused until `base` names it, since nobody else could load it; and where files
name the local model that they were made from, they are uploaded with `base`, or the last part of the path. Digests stay.

A README.md beside the weights is uploaded as it is; `dry_run` writes the rendered one there, to be looked at and edited.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # httpx's or httpx2's, by the version
from huggingface_hub.utils._validators import validate_repo_id

from lownibble.config import PushConfig, RunConfig
from lownibble.errors import ConfigError, HubError, OutputError
from lownibble.hub.card import Subject, hub_id, licence_of, render
from lownibble.stored import ORIGIN, TRAINED_ON

ADAPTER, CARD, MERGE, RUN = "adapter_config.json", "README.md", "merge.json", "record.json"
WEIGHTS = "adapter_model.safetensors"


def push(source: str | Path, repo: str, **options: Any) -> dict[str, Any]:
    """Upload an adapter or a model with a card rendered from its record; returns what was done.

    Args:
        source: a run's output folder, or the folder of an adapter or a model.
        repo: id of the repository, made if it is not there: owner/name, or a name of one's own.
        options: of `PushConfig`: base, public, dry_run (write the card into the folder, upload nothing).
    Raises:
        ConfigError: the folder holds neither, the id is none, or the adapter's base is a local folder.
        HubError: no token, no network, no right, or the hub refuses.
    """
    return run_push(PushConfig(source=str(source), repo=repo, **options))


def run_push(config: PushConfig) -> dict[str, Any]:
    """`push` from a `PushConfig`."""
    _check_id(config.repo)
    folder = _find(Path(config.source).expanduser().resolve())
    subject = _subject(folder, config)
    card = folder / CARD
    done = {"kind": "push", "status": "ok", "repo": config.repo, "folder": str(folder), "what": subject.kind}
    if config.dry_run:
        if card.exists():
            raise OutputError(f"'{card}' is there already, and would be uploaded as it is. Delete it to have it written anew.")
        card.write_text(_card(subject, config.repo), encoding="utf-8")
        return {**done, "card": str(card)}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and path.name not in (MERGE, RUN))
    with _told(config.repo):
        api = HfApi(token=_token())
        repo = config.repo if "/" in config.repo else f"{api.whoami()['name']}/{config.repo}"
        text = card.read_bytes() if card.exists() else _card(subject, repo).encode()
        where = api.create_repo(config.repo, private=not config.public, exist_ok=True)
        changed = _without_paths(folder, subject)
        operations = [CommitOperationAdd(path.name, changed.get(path.name, path)) for path in files if path.name != CARD]
        operations.append(CommitOperationAdd(CARD, text))
        what = "Adapter" if subject.kind == "adapter" else "Model"
        commit = api.create_commit(where.repo_id, operations, commit_message=f"{what} and card by Lownibble")
    return {
        **done, "repo": where.repo_id, "url": str(where), "commit": commit.oid,
        "files": sorted(each.path_in_repo for each in operations),
    }  # fmt: skip


def _without_paths(folder: Path, subject: Subject) -> dict[str, bytes]:
    """Name of each file that names a local model -> what is uploaded in its place."""
    if subject.kind == "adapter":
        described = _described(folder / ADAPTER) | {"base_model_name_or_path": subject.base}
        weights = {WEIGHTS: _renamed(folder / WEIGHTS, str(subject.base))} if (folder / WEIGHTS).is_file() else {}
        return {ADAPTER: _json(described), **weights}
    described = _described(folder / "config.json")
    origin = described.get(ORIGIN)
    if not isinstance(origin, dict) or hub_id(name := str(origin.get("model"))) is not None:
        return {}
    return {"config.json": _json(described | {ORIGIN: origin | {"model": subject.base or Path(name).name}})}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _renamed(path: Path, base: str) -> bytes:
    """An adapter's file whose metadata (`lora/provenance.py`) name its base by its id on the hub."""
    held = path.read_bytes()
    size = 8 + int.from_bytes(held[:8], "little")
    header = json.loads(held[8:size])
    facts = json.loads(header.get("__metadata__", {}).get(TRAINED_ON, "null"))
    if not isinstance(facts, dict) or hub_id(facts.get("model")) is not None:
        return held
    header["__metadata__"][TRAINED_ON] = json.dumps({**facts, "model": base}, sort_keys=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + held[size:]


def check(repo: str, config: RunConfig) -> None:
    """Before a run that is to be pushed: refuse what can be known to fail.

    Raises:
        ConfigError: the id is none, or the run's adapter would name a local folder as its base.
        HubError: no token, no network, or the token may not write to that owner's repositories.
    """
    _check_id(repo)
    if config.method != "full":
        _check_base(hub_id(config.model), config.model, "Train without --push-to-hub, then 'lownibble push' with --base")
    with _told(repo):
        found = HfApi(token=_token()).whoami()
    owners = {found["name"], *(org["name"] for org in found.get("orgs", ()))}
    owner = repo.partition("/")[0] if "/" in repo else found["name"]
    role = found.get("auth", {}).get("accessToken", {}).get("role")
    if owner not in owners or role == "read":
        raise HubError(_no_right(repo))


def _check_id(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ConfigError(f"'{repo}' is no id of a repository: {' '.join(str(error).split())} Give owner/name.") from None


def _check_base(base: str | None, named: str, remedy: str) -> None:
    if base is None:
        raise ConfigError(f"The adapter's base is '{named}' on this machine, which others cannot load. {remedy} OWNER/NAME.")


def _find(folder: Path) -> Path:
    """The folder with the weights: the given one, or that of the run's result in it."""
    for each in (folder, folder / "adapter", folder / "model"):
        if (each / ADAPTER).is_file() or ((each / "config.json").is_file() and any(each.glob("*.safetensors"))):
            return each
    raise ConfigError(f"'{folder}' holds no adapter and no model. Give a run's output folder, or that of an adapter or a model.")


def _subject(folder: Path, config: PushConfig) -> Subject:
    kind: Literal["adapter", "model"] = "adapter" if (folder / ADAPTER).is_file() else "model"
    merge, run = _record(folder / MERGE), _run_of(folder, kind)
    described = _described(folder / (ADAPTER if kind == "adapter" else "config.json"))
    if merge is not None:
        run = _run_of(Path(merge["config"].get("adapter") or ""), "adapter")
    if kind == "adapter":
        named = described.get("base_model_name_or_path") or "not named"
    elif merge is not None:
        named = merge["base"]["model"]
    else:
        named = run["config"]["model"] if run else "a model"
    seq2seq = described.get("task_type") == "SEQ_2_SEQ_LM" or bool(described.get("is_encoder_decoder"))
    base = hub_id(config.base or named)
    if config.base and base is None:
        raise ConfigError(f"'{config.base}' is no id on the hub. Name the base with --base OWNER/NAME.")
    if kind == "adapter":
        _check_base(base, named, "Name it with --base")
    return Subject(
        config.repo.rpartition("/")[2], kind, base, named, run, merge, seq2seq, described.get("alora_invocation_tokens") or ()
    )


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}. Write the adapter or the model again.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' is no JSON object. Write the adapter or the model again.")
    return found


def _run_of(folder: Path, kind: str) -> dict[str, Any] | None:
    """The record of the run whose result the folder is: `train` calls it as its kind."""
    return _record(folder.parent / RUN) if folder.name == kind else None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = ("train", "merge", "quantize")
    return found if isinstance(found, dict) and found.get("kind") in kinds and found.get("status", "ok") == "ok" else None


def _card(subject: Subject, repo: str) -> str:
    return render(subject, repo, licence_of(subject.base, subject.trained_on))


def _token() -> str:
    token: str | None = get_token()
    if token is None:
        raise HubError("There is no token for the hub. Run 'hf auth login', or set HF_TOKEN, with a token that may write.")
    return token


def _no_right(repo: str) -> str:
    return f"The token may not write to '{repo}'. Use one with write access to it, or a repository of your own."


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Errors of the hub's client as one sentence with what to do."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("The hub is switched off by HF_HUB_OFFLINE. Unset it to push.") from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, HubError):
            raise
        raise HubError(_words(error, repo)) from error


def _words(error: BaseException, repo: str) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    if cause is not None and not isinstance(cause, HfHubHTTPError):
        why = str(cause) or type(cause).__name__
        return f"The hub ({constants.ENDPOINT}) cannot be reached: {why}. Check the network and push again."
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status == 401:
        return "The hub does not know the token. Run 'hf auth login', or set HF_TOKEN, with a token that may write."
    if status == 403:
        return _no_right(repo)
    said = getattr(cause, "server_message", None) or " ".join(str(cause or error).split())
    return f"The hub did not take '{repo}': {said.rstrip('.')}. Mend that and push again."
