"""Folders that other engines serve, with the command that does it: Ollama (llama.cpp) and vLLM.

**Ollama.** `model.gguf`, for an adapter also `adapter.gguf`, and a `Modelfile`. Ollama's templates are Go's, not Jinja: what a
chat template puts around each role's text is found by rendering sentinels, and the pieces put together must give what the
template renders for conversations of several shapes. Where they do not (a system text inside the user's turn, defaults), the
system role is left out, and where that does not help the whole template: Ollama then takes the one that it recognises from the
GGUF file's Jinja, and the result says so. What ends a turn is a `stop`.

**vLLM.** Adapters in PEFT's layout with one rank and one scale, which is all that vLLM's loader knows, experts one by one where
it holds them so; the base as compressed-tensors with a `quant_type`, else the one that the adapters name. vLLM and Ollama were
not at hand: file names and options are those of their documentation.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lownibble import stored
from lownibble.config import QuantConfig, QuantizeConfig
from lownibble.data.chat import ChatRenderer
from lownibble.data.ends import turn_ends
from lownibble.errors import AdapterError, ConfigError, DataError, ModelError, OutputError
from lownibble.exporting import gguf
from lownibble.exporting.quantize import run_quantize
from lownibble.exporting.weights import Tell, Weights, say_nothing
from lownibble.lora.adapter_file import AdapterFile
from lownibble.lora.apart import fitted, parts, split
from lownibble.lora.portable import CONFIG_FILE
from lownibble.lora.targets import match_experts, rank_of
from lownibble.lora.variants import LORA, variant_of
from lownibble.models import ModelSource, experts, load_tokenizer

_SHAPES = (("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user"))
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""


class Pieces(NamedTuple):
    """What a chat template prints: at the start, before and after each role's text, and before the answer."""

    start: str
    around: dict[str, tuple[str, str]]
    answer: str

    def text(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation, up to where the answer begins."""
        said = (self.around[one["role"]][0] + one["content"] + self.around[one["role"]][1] for one in messages)
        return self.start + "".join(said) + self.answer

    def in_go(self) -> str:
        """The same as a template for Ollama."""
        turns = (
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.around.items())
        )
        return f"{self.start}{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def chat_pieces(tokenizer: Any) -> Pieces | None:
    """The pieces of a tokenizer's chat template, without the system role if that has no turn of its own; None if pieces do not
    give what the template renders."""
    chat = ChatRenderer(tokenizer)

    def rendered(roles: Sequence[str]) -> tuple[list[dict[str, str]], str]:
        messages = [{"role": role, "content": f"sentinel{number}x"} for number, role in enumerate(roles)]
        return messages, chat.text(messages, generation=True)

    for first in (("system",), ()) if tokenizer.chat_template else ():
        try:
            roles = [*first, "user", "assistant", "user"]
            found = _cut(rendered(roles)[1], roles, rendered(("user",))[1])
            shapes = [*_SHAPES, *((*first, *shape) for shape in _SHAPES)]
            if found and all(found.text(messages) == wanted for messages, wanted in map(rendered, shapes)):
                return found
        except (DataError, ModelError):
            continue  # the template refuses such a conversation
    return None


def _cut(text: str, roles: list[str], of_one: str) -> Pieces | None:
    """The pieces of a rendered conversation; `of_one`: of one question alone."""
    between, rest = [], text
    for number in range(len(roles)):
        before, mark, rest = rest.partition(f"sentinel{number}x")
        if not mark:
            return None
        between.append(before)
    user, lone = len(roles) - 3, of_one.partition("sentinel0x")[0]
    begin_user = _common_end(lone, between[user + 2])
    start, end_assistant = lone.removesuffix(begin_user), between[user + 2].removesuffix(begin_user)
    alike = between[user + 1].startswith(end_assistant)  # as in most templates: all turns end so
    end_user = end_assistant if alike else _common_end(rest[::-1], between[user + 1][::-1])[::-1]
    around = {"user": (begin_user, end_user), "assistant": (between[user + 1].removeprefix(end_user), end_assistant)}
    if user:
        around = {"system": (between[0].removeprefix(start), between[1].removesuffix(begin_user)), **around}
    return Pieces(start, around, rest.removeprefix(end_user))


def _common_end(one: str, other: str) -> str:
    n = next((n for n in range(min(len(one), len(other))) if one[-1 - n] != other[-1 - n]), min(len(one), len(other)))
    return one[len(one) - n :]


def modelfile(tokenizer: Any, adapter: bool) -> tuple[str, str | None]:
    """The Modelfile beside model.gguf, and a warning if it has no template, or one without the system role."""
    lines, warning, pieces = ["FROM ./model.gguf", *["ADAPTER ./adapter.gguf"] * adapter], None, chat_pieces(tokenizer)
    if pieces is not None and any(mark in pieces.in_go().replace("{{ ", "") for mark in ('"""', "{{")):
        pieces = None
    if pieces is None:
        warning = "The chat template could not be put into Ollama's form: it takes what it recognises from the GGUF file."
    else:
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token  # llama.cpp puts it there
        pieces = pieces._replace(start=pieces.start.removeprefix(begins or ""))
        lines.append(f'TEMPLATE """{pieces.in_go()}"""')
        if "system" not in pieces.around:
            warning = "The chat template has no turn for the system role, and so the Modelfile has none."
    ends = {*turn_ends(tokenizer)} if tokenizer.chat_template else set()
    for token in tokenizer.convert_ids_to_tokens(sorted(ends | {tokenizer.eos_token_id} - {None})):
        lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    return "\n".join(lines) + "\n", warning


@contextmanager
def _all_or_nothing(output: Path) -> Iterator[None]:
    """Remove what an attempt that failed has written into `output`, which was empty or not there: the next finds it free."""
    was_there = output.is_dir()
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        shutil.rmtree(output, ignore_errors=True)
        if was_there:
            output.mkdir(exist_ok=True)
        if isinstance(error, OutputError) and isinstance(error.__cause__, OSError):  # it says that finished parts are kept
            why = error.__cause__
            raise OutputError(f"Cannot write '{output}': {why}. Free some space, or choose another --output.") from why
        raise


def write_ollama(
    model: ModelSource, adapter: AdapterFile | None, base: Any, output: Path, dtype: str, tell: Tell = say_nothing
) -> dict[str, Any]:
    """Write the folder for Ollama; `base`: transformers' skeleton of the model, for an adapter. Raises as `gguf.write_model` and
    `gguf.write_adapter`."""
    tokenizer = load_tokenizer(model)
    weights = Weights(model, None, None, QuantConfig(), "float32")
    onto = "dequantized" if weights.packed else "original"
    with _all_or_nothing(output):
        if adapter is not None:  # first: what it refuses is found before the model is written
            gguf.write_adapter(adapter, base, output / "adapter.gguf")
        result = gguf.write_model(weights, onto, output / "model.gguf", dtype, model, tell)
        text, warning = modelfile(tokenizer, adapter is not None)
        (output / "Modelfile").write_text(text, encoding="utf-8")
    name, of_quantised = output.name.lower(), adapter is not None and (adapter.trained_on or {}).get("quant")
    told = "The adapter was trained on quantised weights, and the file has the checkpoint's: outputs differ a little."
    warnings = " ".join(text for text in (warning, told if of_quantised else None) if text)
    command = f"ollama create {shlex.quote(name)} -f {shlex.quote(str(output / 'Modelfile'))} && ollama run {shlex.quote(name)}"
    return {**result, "command": command, **({"warning": warnings} if warnings else {})}


def adapters_of(source: Path) -> dict[str, Path]:
    """Name -> folder of the adapter `source`, or of those in its sub-folders."""
    if (source / CONFIG_FILE).is_file():
        return {source.name: source}
    return {path.name: path for path in sorted(source.iterdir()) if (path / CONFIG_FILE).is_file()} if source.is_dir() else {}


def write_vllm(
    model: ModelSource, adapters: dict[str, AdapterFile], base: Any, output: Path, quant: QuantConfig, tell: Tell = say_nothing
) -> dict[str, Any]:
    """Write adapters, and with options of the quantisation the base in compressed-tensors, for vLLM.

    Args:
        base: transformers' skeleton of the model.
    Raises:
        AdapterError: an adapter has what vLLM does not load (named), or too high a rank.
        ConfigError: the base is packed already, and options of the quantisation are given.
    """
    for name, adapter in adapters.items():
        _check_for_vllm(name, adapter, base)
    if quant != QuantConfig() and stored.of_folder(model.folder):
        raise ConfigError(f"'{model.name}' is quantised already. Leave quant options out.")
    files = {name: fitted(adapter, base) for name, adapter in adapters.items()}
    shapes = experts.shapes(base) if adapters else {}
    fused = bool(shapes) and not parts(base)
    whole = {name for name, one in adapters.items() if fused and match_experts(shapes, one.config, of_file=True)}
    rank = max((_rank(file, base, name in whole) for name, file in files.items()), default=0)
    most = next((size for size in MAX_RANKS if size >= rank), None)
    if most is None:
        raise AdapterError(f"vLLM takes ranks up to {MAX_RANKS[-1]}, and these have {rank}. Merge them (lownibble merge).")
    where, tensors = str(model.folder), 0
    with _all_or_nothing(output):
        if quant != QuantConfig():
            where = str(output / "base")
            options = {"rounding": "rtn", "format": "compressed-tensors", "quant": quant}
            run_quantize(QuantizeConfig(model=str(model.folder), output=where, **options), tell)
        for name, adapter in adapters.items():
            folder = output / "adapters" / name
            if name in whole:  # experts that are held fused: PEFT's own layout
                folder.mkdir(parents=True)
                for file in (adapter.path, adapter.folder / CONFIG_FILE):
                    (folder / file.name).write_bytes(file.read_bytes())
            else:
                split(files[name], base, folder, needs_experts=False)
            tensors += len(AdapterFile(folder).shapes)
    command = ["vllm", "serve", where]
    if adapters:
        command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(most), "--lora-modules"]
        command += [f"{name}={output / 'adapters' / name}" for name in adapters]
    return {"tensors": tensors, "adapters": sorted(adapters), "base": where, "command": shlex.join(command)}


def _rank(file: AdapterFile, base: Any, whole: bool) -> int:
    """The highest rank that an adapter's configuration names, as it is written: one for all layers, or (`whole`) as it is."""
    if whole:
        return max(file.config.r, *file.config.rank_pattern.values())
    return max(rank_of(path, file.config) for path in file.layers(base))


def _check_for_vllm(name: str, adapter: AdapterFile, base: Any) -> None:
    if variant_of(adapter.config) is not LORA:
        how = "Serve it with lownibble serve" if adapter.config.alora_invocation_tokens else "Merge it (lownibble merge)"
        raise AdapterError(f"'{name}' is no plain LoRA, which is all that vLLM loads. {how}.")
    file = fitted(adapter, base)
    expected = file.expected(base)
    file.check_fit(expected, set())
    matrices = {key for _, keys in file.layers(base).values() for key in keys.values()}
    if beyond := sorted(expected.keys() - matrices):
        raise AdapterError(f"'{name}' changes '{beyond[0]}', which vLLM does not load. Merge it (lownibble merge).")
