"""`lownibble push`: an adapter or a model, with its card, to the hub, through `huggingface_hub`.

Repositories are made private: what was trained on one's own rows is published by a decision, not by a default. One that is
there already keeps its visibility. Local names stay local: records (which hold paths) are not uploaded, what they say is on the
card; an adapter whose base is a local folder is refused until `base` names it, since nobody else could load it; and where files
name the local model that they were made from, they are uploaded with `base`, or the last part of the path. Digests stay. Of a
trainer's checkpoint the state of the training is left out, whose pickles hold paths, too.

What a record calls a local folder by a relative name is looked for where the run was started, which its output folder tells: as
seen from here the name could be one of the hub.

A README.md beside the weights is uploaded as it is; `dry_run` writes the rendered one there, to be looked at and edited.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # httpx's or httpx2's, by the version
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError, safe_open

from lownibble.config import PushConfig, RunConfig
from lownibble.errors import ConfigError, HubError, OutputError
from lownibble.hub.card import Subject, hub_id, licence_of, render, without_folder
from lownibble.stored import MARKER, ORIGIN, TRAINED_ON, of

ADAPTER, CARD, MERGE, RUN = "adapter_config.json", "README.md", "merge.json", "record.json"
WEIGHTS, TEMPLATES = "adapter_model.safetensors", "additional_chat_templates"

_STATE = {"training_args.bin", "trainer_state.json", "optimizer.bin", "latest", "zero_to_fp32.py"}


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
    files = _files(folder)
    with _told(config.repo):
        api = HfApi(token=_token())
        repo = config.repo if "/" in config.repo else f"{api.whoami()['name']}/{config.repo}"
        text = card.read_bytes() if card.exists() else _card(subject, repo).encode()
        where = api.create_repo(config.repo, private=not config.public, exist_ok=True)
        changed = _without_paths(folder, subject)
        operations = [CommitOperationAdd(name, changed.get(name, path)) for name, path in files.items() if name != CARD]
        operations.append(CommitOperationAdd(CARD, text))
        what = "Adapter" if subject.kind == "adapter" else "Model"
        commit = api.create_commit(where.repo_id, operations, commit_message=f"{what} and card by Lownibble")
    return {
        **done, "repo": where.repo_id, "url": str(where), "commit": commit.oid,
        "files": sorted(each.path_in_repo for each in operations),
    }  # fmt: skip


def _files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of what is uploaded."""
    found = [*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]
    kept = sorted(path for path in found if path.is_file() and path.name[0] != "." and not _is_state(path.name))
    return {path.relative_to(folder).as_posix(): path for path in kept if path.name not in (MERGE, RUN)}


def _is_state(name: str) -> bool:
    """Whether a file of a trainer's checkpoint is the training's (transformers', DeepSpeed's), not the result's."""
    return name.endswith((".pt", ".pth", ".pkl")) or name in _STATE


def _without_paths(folder: Path, subject: Subject) -> dict[str, bytes]:
    """Name of each file that names a local model -> what is uploaded in its place."""
    changed: dict[str, bytes] = {}
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            described = _described(folder / name)
            if (without := _without_names(described, subject)) != described:
                changed[name] = _json(without)
    if subject.kind == "adapter":
        described = _described(folder / ADAPTER) | {"base_model_name_or_path": subject.base}
        changed[ADAPTER] = _json(described)
        if (folder / WEIGHTS).is_file():
            changed[WEIGHTS] = _renamed(folder / WEIGHTS, str(subject.base))
    return changed


def _without_names(described: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """A configuration that names no local model: neither as where it was read from nor as what it was packed from."""
    found = {}
    for key, value in described.items():
        if key in ("_name_or_path", "name_or_path") and isinstance(value, str) and without_folder(value) != value:
            value = subject.base or without_folder(value)
        elif key == ORIGIN and isinstance(value, dict) and hub_id(name := str(value.get("model"))) is None:
            value = value | {"model": subject.base or Path(name).name}
        found[key] = _without_names(value, subject) if isinstance(value, dict) else value
    return found


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _renamed(path: Path, base: str) -> bytes:
    """An adapter's file whose metadata (`lora/provenance.py`) name its base by its id on the hub."""
    held = path.read_bytes()
    size = 8 + int.from_bytes(held[:8], "little")
    header = json.loads(held[8:size])
    facts = _facts(header.get("__metadata__", {}))
    if not facts or hub_id(facts.get("model")) is not None:
        return held
    header["__metadata__"][TRAINED_ON] = json.dumps({**facts, "model": base}, sort_keys=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + held[size:]


def _facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of an adapter's file say of its base; {} if nothing."""
    found = json.loads(metadata.get(TRAINED_ON, "null"))
    return found if isinstance(found, dict) else {}


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
    if merge is not None and (adapter := merge["config"].get("adapter")):
        run = _run_of((_started_in(folder, merge["config"].get("output")) / Path(adapter).expanduser()).resolve(), "adapter")
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
    packed = kind == "model" and of(described).get("quant_method") == "lownibble"
    return Subject(
        config.repo.rpartition("/")[2], kind, base, named, run, merge, seq2seq, described.get("alora_invocation_tokens") or (),
        _revision(folder, described) if kind == "adapter" and base == named else None, packed,
        packed and _has_packed_experts(folder),
    )  # fmt: skip


def _revision(folder: Path, described: dict[str, Any]) -> str | None:
    """The revision of its base that an adapter was trained on, where it names one."""
    if (folder / WEIGHTS).is_file() and described.get("revision") is None:
        with _opened(folder / WEIGHTS) as file:
            return _facts(file.metadata() or {}).get("revision")
    return described.get("revision")


def _has_packed_experts(folder: Path) -> bool:
    """Whether a checkpoint of our own holds the experts of a mixture packed: facts of theirs have their number."""
    for each in sorted(folder.glob("*.safetensors")):
        with _opened(each) as file:
            if any(MARKER in key and b'"experts"' in file.get_tensor(key).tobytes() for key in sorted(file.keys())):
                return True
    return False


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}. Write the adapter or the model again.") from None


def _started_in(folder: Path, written: str | None) -> Path:
    """The working directory of the command that wrote `folder`, which it called `written`; this one's if that does not tell."""
    parts = Path(written or "").parts
    return Path(*folder.parts[: -len(parts)]) if parts and folder.parts[-len(parts) :] == parts else Path()


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}. Write the adapter or the model again.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' is no JSON object. Write the adapter or the model again.")
    return found


def _run_of(folder: Path, kind: str) -> dict[str, Any] | None:
    """The record of the run whose result the folder is: `train` calls it as its kind. Local models and data have full paths."""
    run = _record(folder.parent / RUN) if folder.name == kind else None
    if run is None:
        return None
    config = run["config"]
    where = _started_in(folder.parent, config["train"].get("output_dir"))

    def full(name: str | None) -> str | None:
        local = name is not None and name != "demo" and (where / Path(name).expanduser()).exists()
        return str((where / Path(str(name)).expanduser()).resolve()) if local else name

    data = {**config["data"], **{key: full(config["data"].get(key)) for key in ("path", "eval_path")}}
    return {**run, "config": {**config, "model": full(config["model"]), "data": data}}


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
