"""The model card of an adapter or a model: Markdown with the hub's metadata, rendered from the records beside the weights.

Nothing on it is typed by hand, and nothing names a folder of the machine that trained: of local paths the last part is kept.
Figures have their standard error over the evaluation's rows where the record has results by row, and else none.
The licence of the base is what the base's own card says; a licence for the upload itself is the owner's to choose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, ModelCardData, metadata_load
from huggingface_hub.utils._validators import validate_repo_id

from lownibble.config import NEXT_TOKEN, PACKED, QuantConfig
from lownibble.measuring.stats import standard_error
from lownibble.planning.show import beside

DEMO = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
"""The hub id and licence of the embedded model, whose weights are a 4-bit GGUF copy of it."""

_NOT_SHOWN = {"device", "train.output_dir", "train.report_to", "train.resume"}
"""Options that say nothing of the result."""

_PATHS = {"model", "adapter", "data.path", "data.eval_path"}

_OF_FILES = (".gguf", ".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Subject:
    """What a card is of. `base`: hub id, None if not known; `run`, `merge`: records of `train`, and of `merge` or `quantize`.

    `seq2seq`: it is, or is for, an encoder-decoder model. `invocation`: tokens that activate it. `revision`: of the base.
    `packed`: whether the model is in our own format; `packed_experts`: and its experts, which transformers does not load, too.
    """

    name: str
    kind: Literal["adapter", "model"]
    base: str | None
    trained_on: str
    run: Mapping[str, Any] | None
    merge: Mapping[str, Any] | None
    seq2seq: bool = False
    invocation: Sequence[int] = ()
    revision: str | None = None
    packed: bool = False
    packed_experts: bool = False


def hub_id(name: str | None) -> str | None:
    """The hub id that a model's name is, or stands for; None of a local folder or file."""
    if name == "demo":
        return DEMO[0]
    if not name or name.count("/") != 1 or Path(name).expanduser().exists() or name.lower().endswith(_OF_FILES):
        return None
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return name


def _data_id(path: str | None) -> str | None:
    """The hub id of a data set, without the name of its configuration; None of demo data, a local folder or file."""
    return None if path is None or path == "demo" else hub_id(path.partition(":")[0])


def licence_of(base: str | None, trained_on: str) -> str | None:
    """The licence in the card of the base: its local folder's, else the hub's; None where there is none or it cannot be read."""
    readme = Path(trained_on).expanduser() / "README.md"
    try:
        if trained_on == "demo":
            return DEMO[1]
        card: Any = metadata_load(readme) if readme.is_file() else None
        if card is None and base is not None:
            card = HfApi().model_info(base, timeout=10).card_data
        name = None if card is None else card.get("license")
    except Exception:  # a card is written without network, too, and whatever the base's one holds
        return None
    return name if isinstance(name, str) else None


def render(subject: Subject, repo: str, licence: str | None) -> str:
    """The card's text, for the repository of that id."""
    data = ModelCardData(
        base_model=subject.base,
        license=licence,
        library_name="peft" if subject.kind == "adapter" else "transformers",
        pipeline_tag="text2text-generation" if subject.seq2seq else "text-generation",
        tags=["lownibble", *_methods(subject)],
        datasets=[name] if (name := _data_id(_config(subject).get("data", {}).get("path"))) else None,
        ignore_metadata_errors=False,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {subject.name}", _what(subject)]
    parts += [_loading(subject, repo), *_results(subject), *_data(subject), *_training(subject), _licence(subject, licence)]
    return "\n\n".join(parts) + "\n"


def _config(subject: Subject) -> dict[str, Any]:
    return dict((subject.run or {}).get("config", {}))


def _methods(subject: Subject) -> list[str]:
    method = _config(subject).get("method")
    return [method] if method in ("lora", "qlora") else []


def _what(subject: Subject) -> str:
    base = (
        f"[{subject.base}](https://huggingface.co/{subject.base})" if subject.base else f"`{without_folder(subject.trained_on)}`"
    )
    method = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}.get(_config(subject).get("method", ""), "")
    by = f", trained by {method}" if method else ""
    if subject.kind == "adapter":
        text = f"A LoRA adapter for {base}{by} with Lownibble."
        if tokens := subject.invocation:
            text += f" It is active from the last occurrence of the tokens {tokens} in a prompt on (activated LoRA)."
    elif subject.merge is not None and subject.merge["kind"] == "quantize":
        text = f"{base}, packed by Lownibble."
    elif subject.merge is not None:
        text = f"{base} with an adapter merged into its weights{by} with Lownibble."
    else:
        text = f"{base}{by} with Lownibble."
    if subject.trained_on == "demo":
        text += " The base's weights were those of a 4-bit GGUF copy (Q4_1), which differ a little from the ones of that name."
    return text


def _loading(subject: Subject, repo: str) -> str:
    auto = "AutoModelForSeq2SeqLM" if subject.seq2seq else "AutoModelForCausalLM"
    ours, theirs = "import lownibble as ln\n", f"from transformers import {auto}"
    if subject.kind == "model":
        registers = "import lownibble.integrations.transformers  # its packed layers\n" if subject.packed else ""
        theirs = f"""{registers}{theirs}, AutoTokenizer

model = {auto}.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")"""
        blocks = [] if subject.packed_experts else [f"```python\n{theirs}\n```"]
        ours += f"\n{_ours(repo)}"
    else:
        base = subject.base or subject.trained_on
        revision = f'revision="{subject.revision}"' if subject.revision else ""
        loaded = f"{auto}.from_pretrained({_call(base, revision)})"
        theirs = f'from peft import PeftModel\n{theirs}\n\nmodel = PeftModel.from_pretrained({loaded}, "{repo}")'
        blocks = [f"With PEFT:\n\n```python\n{theirs}\n```\n\nWith Lownibble:"]
        quant = f"quant={_packed(_config(subject).get('quant', {}))}" if "qlora" in _methods(subject) else ""
        own = "demo" if subject.trained_on == "demo" else base  # whose digest the adapter has
        ours += f"from huggingface_hub import snapshot_download\n\n{_ours(own, quant, revision)}"
        ours += f'\nmodel = ln.load_adapter(model, snapshot_download("{repo}"))'
    return "\n\n".join(["## How to load", *blocks, f"```python\n{ours}\n```"])


def _packed(options: Mapping[str, Any]) -> str:
    """Python of the codec options by which the base was packed."""
    default = QuantConfig().to_dict()
    given = {name: options[name] for name in PACKED if name in options and options[name] != default[name]}
    if given.keys() <= {"quant_type"}:
        return f'"{options.get("quant_type", default["quant_type"])}"'
    return f"ln.QuantConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _ours(model: str, *options: str) -> str:
    return f"model, tokenizer = ln.load({_call(model, *options)})"


def _call(model: str, *options: str) -> str:
    """Arguments in Python: a model's name, and those of `options` that are not empty."""
    return ", ".join([f'"{model}"', *filter(None, options)])


def _results(subject: Subject) -> Iterator[str]:
    if subject.run and subject.run["evaluations"]:
        yield f"## Results\n\n{_evaluation(subject.run)}"
    if measured := (subject.merge or {}).get("measured"):
        yield f"## The merge\n\n{_merged(measured, (subject.merge or {})['onto'])}"


def _evaluation(run: Mapping[str, Any]) -> str:
    first, last, objective = run["evaluations"][0], run["evaluations"][-1], run["config"]["train"]["objective"]
    lines = ["| evaluation | before | after |", "| --- | ---: | ---: |"]
    loss = "loss, nats per label token" if objective == NEXT_TOKEN else f"loss of {objective}"
    lines.append(f"| {loss} | {first['loss']:.4f} | {last['loss']:.4f} |")
    for name, value in last["scores"].items():
        before = first["scores"].get(name)
        old = "-" if before is None else _scored(name, before, first)
        lines.append(f"| {name.replace('_', ' ')} | {old} | {_scored(name, value, last)} |")
    text = "\n".join(lines) + f"\n\nOver {last['label_tokens']:,} label tokens"
    if rows := len(last.get("correct", ())):
        text += f" of {rows:,} rows"
    if rows and len(first.get("correct", ())) == rows and "reference" not in run:  # with one, all rewards are 0 before step 1
        changes = [float(b) - float(a) for a, b in zip(first["correct"], last["correct"], strict=True)]
        error = standard_error(changes)
        text += f". Row by row, accuracy changed by {sum(changes) / rows:+.3f}{'' if error is None else f' ± {error:.3f}'}"
    return f"{text}. Steps: {last['step']:,}.{' ± is the standard error over rows.' if '±' in text else ''}"


def _scored(name: str, value: float, of: Mapping[str, Any]) -> str:
    error = standard_error([float(right) for right in of.get("correct", ())]) if name == "accuracy" else None
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


_NOT_MERGED = {"live": "adapter beside its base", "base": "base alone"}


def _merged(measured: Mapping[str, Any], onto: str) -> str:
    lines = [
        "| model | KL to the unmerged adapter, nats per token | same top-1 token | perplexity |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, figures in measured["models"].items():
        at = figures["label_tokens"]
        kl = f"{at['kl']:.3g} ± {at['kl_standard_error']:.1g}" if "kl" in at else "-"
        same = f"{at['top1_agreement']:.1%}" if "kl" in at else "-"
        what = _NOT_MERGED.get(name, f"merged onto {name}{' (this one)' if name == onto else ''}")
        lines.append(f"| {what} | {kl} | {same} | {at['perplexity']:.4g} |")
    return "\n".join(lines) + f"\n\nOn {measured['tokens']:,} tokens; ± is the standard error."


def _data(subject: Subject) -> Iterator[str]:
    if (run := subject.run) is None:
        return
    data = run["data"]
    left = ", ".join(f"{data[f'{how}_rows']:,} {how}" for how in ("cut", "dropped") if data.get(f"{how}_rows"))
    yield (
        f"## Data\n\n`{without_folder(data['name'])}`, rows of form `{data['form']}`: {data['train_rows']:,} for training"
        f"{left and f' ({left})'}, {data['eval_rows']:,} for evaluation. SHA-256 of the rows: "
        f"`{data['train_digest']}` and `{data['eval_digest']}`."
    )


def _training(subject: Subject) -> Iterator[str]:
    if (run := subject.run) is None:
        yield "## Training\n\nThere is no record of the training beside these weights."
        return
    model, speed, planned, environment = run["model"], run["speed"], run["memory"].get("planned", {}), run["environment"]
    lines = [f"- {model['trainable_parameters']:,} of {model['parameters']:,} parameters trained, {model['class']}"]
    lines += [f"- {environment['device']}; " + ", ".join(f"{name} {of}" for name, of in environment["versions"].items())]
    if "tokens_per_s" in speed:  # else no step was taken in that process
        low, _, high = speed["tokens_per_s_quartiles"]
        lines.append(f"- speed: {speed['tokens_per_s']:,.0f} tokens/s (middle half of the steps: {low:,.0f} to {high:,.0f})")
    if "planned_bytes" in planned:
        lines.append(f"- memory ({planned['figure']}): {beside(planned)}")
    yield "## Training\n\n" + "\n".join(lines)
    yield f"All options, as `lownibble train` reads them:\n\n```toml\n{_toml(run['config'])}\n```"


def _toml(config: Mapping[str, Any]) -> str:
    """The options that were set or had defaults, without local folders."""
    tables = {"": {k: v for k, v in config.items() if not isinstance(v, dict)}}
    tables |= {name: group for name, group in config.items() if isinstance(group, dict)}
    lines = []
    for name, group in tables.items():
        lines += [f"\n[{name}]"] if name else []
        for key, value in group.items():
            path = f"{name}.{key}" if name else key
            if value is not None and path not in _NOT_SHOWN:
                lines.append(f"{key} = {_value(without_folder(value) if path in _PATHS else value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _licence(subject: Subject, licence: str | None) -> str:
    known = f"`{licence}`, by its own card" if licence else "not known to Lownibble; its card says it"
    return f"## Licence\n\nThat of the base model: {known}."


def without_folder(path: str) -> str:
    """A hub id as it is; of a local path the last part."""
    local = Path(path).is_absolute() or path.startswith(("~", ".")) or path.count("/") > 1 or Path(path).exists()
    return Path(path).name if local else path
