"""Command-line entry point: `lownibble COMMAND`. Each command is one library call.

Standard output carries the result: a table, or with `--json` one JSON document and nothing else. Messages and progress go to
standard error. Exit code 0: success; 1: failure; 2: usage or input error; 128 + signal number: interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lownibble import __version__, launch
from lownibble.bench import BENCHES
from lownibble.cli import commands, shipping
from lownibble.config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    PushConfig,
    QuantizeConfig,
    RowsConfig,
    RunConfig,
    ServeConfig,
    StudioConfig,
)
from lownibble.errors import ConfigError, InputError, LownibbleError
from lownibble.flags import add_flags

_MODELS = "'demo', a bundled model (llama-3-8b, qwen2.5-7b, ...), a config.json, a model folder, a .gguf file or a hub id"


_GPUS = "GPUs that a run is trained on, one process each; processes where there are no GPUs"


MAY_LACK = {"train": "config", "compare": "config", "data": "data"} | dict.fromkeys(
    ("plan", "eval", "quantize", "serve"), "model"
)
"""Command -> the word without a flag that may be left out."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See '{self.prog} --help'.")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1. Got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lownibble", description="LoRA and QLoRA, measured side by side; then trained, merged and served.")
    parser.add_argument("--version", action="version", version=f"lownibble {__version__}")
    commands_ = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str, example: str) -> argparse.ArgumentParser:
        sub = commands_.add_parser(
            name, help=text, description=text, epilog=f"example: {example}", allow_abbrev=False
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print one JSON document and nothing else on standard output")
        sub.set_defaults(run=run)
        return sub

    add(
        "doctor",
        commands.doctor,
        "Show the device, the kernels in use and why, versions, and what is missing.",
        "lownibble doctor",
    )

    train = add("train", commands.train, "Fine-tune a model in full, with LoRA or with QLoRA.",
                "lownibble train --model demo --data demo --method qlora --max-steps 40 --output runs/first")  # fmt: skip
    train.add_argument("config", nargs="?", metavar="CONFIG.toml", help="options from a TOML file; flags win over it")
    train.add_argument("--dry-run", action="store_true", help="try a few steps, show planned and measured memory, write nothing")
    train.add_argument(
        "--push-to-hub", metavar="ID", help="push the result to this repository on the hub afterwards, as 'lownibble push' does"
    )
    add_flags(train, RunConfig)

    data = add("data", commands.data, "Show rows as the model will see them: text, tokens, which are trained, lengths, oddities.",
               "lownibble data chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --rows 2")  # fmt: skip
    data.add_argument("data", nargs="?", default=argparse.SUPPRESS, metavar="DATA", help="'demo', a file, a folder or a hub id")
    add_flags(data, RowsConfig, positional=("path",))

    plan = add("plan", commands.plan, "Say what a run needs, what fits where, how long it takes and what it costs.",
               "lownibble plan llama-3-8b --gpu rtx-4090 --max-length 1024 --batch-size 4 --tokens 10000000")  # fmt: skip
    plan.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_MODELS)
    plan.add_argument("--config", metavar="CONFIG.toml", help="options from a TOML file; flags win over it")
    plan.add_argument("--exact", action="store_true", help="trace the real step on fake tensors instead of planning it (seconds)")
    plan.add_argument("--calibrate", action="store_true", help="first run three short steps here, and keep how fast they were")
    plan.add_argument("--html", metavar="FILE", help="also write a page with sliders for batch and length")
    add_flags(plan, PlanConfig, positional=("model",))

    claims = add("claims", commands.claims, "Judge statements about memory and time: impossible, implausible or consistent.",
                 "lownibble claims statements.toml")  # fmt: skip
    claims.add_argument("file", nargs="?", metavar="FILE.toml", help="tables [[claim]]; default: those of the articles")

    compare = add("compare", commands.compare, "Train the same model and data with several methods, side by side, and advise.",
                  "lownibble compare --methods lora qlora --output runs/compare")  # fmt: skip
    compare.add_argument("config", nargs="?", metavar="CONFIG.toml", help="options from a TOML file; flags win over it")
    compare.add_argument("--gpus-per-cell", type=_count, default=1, metavar="N", help=f"{_GPUS} (default: 1)")
    add_flags(compare, CompareConfig)

    study = add("study", commands.study, "Run a matrix of models, methods, tasks and seeds, and report it with statistics.",
                "lownibble study run study.toml --output runs/study")  # fmt: skip
    study.add_argument(
        "what",
        choices=("plan", "run", "report"),
        help="say cells, hours and power; run missing cells and report; or report existing records",
    )
    study.add_argument("path", metavar="STUDY.toml|DIR", help="plan, run: the study file; report: the study's folder")
    study.add_argument(
        "--output",
        metavar="DIR",
        help="plan, run: the study's folder (default: runs/NAME OF THE FILE); report: where the page goes",
    )
    study.add_argument(
        "--jobs",
        metavar="N",
        help="plan, run: cells at a time, each on a GPU of its own, or on all processors unless OMP_NUM_THREADS says otherwise "
        "(default: 1)",
    )
    study.add_argument("--gpus-per-cell", type=_count, metavar="N", help=f"run: {_GPUS} (default: 1)")
    study.add_argument("--executor", metavar="NAME", help="run: local, or ray for a cluster (default: local)")
    study.add_argument("--retry-failed", action="store_true", help="run: also run failed cells again")
    study.add_argument(
        "--again", type=_count, metavar="N", help="run: also run N finished cells once more, and report whether they agree"
    )

    evaluate = add("eval", commands.evaluate, "Score a model, with an adapter or without, on a task or with lm-eval.",
                   "lownibble eval demo --adapter runs/first/adapter --task classification --data demo")  # fmt: skip
    evaluate.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="'demo', a model folder, a .gguf file or a hub id")
    add_flags(evaluate, EvalConfig, positional=("model",))

    merge = add("merge", shipping.merge, "Make an adapter part of its base's weights, measured first, in little memory.",
                "lownibble merge runs/first/adapter --output runs/merged --onto dequantized")  # fmt: skip
    merge.add_argument("adapter", help="folder of the adapter")
    add_flags(merge, MergeConfig, positional=("adapter",))

    export = add("export", shipping.export, "Write a model or an adapter in the format that another tool reads.",
                 "lownibble export runs/merged --output model.gguf --format gguf --dtype q8_0")  # fmt: skip
    export.add_argument("source", help="a model, or an adapter: a folder or a .gguf file")
    add_flags(export, ExportConfig, positional=("source",))

    quantize = add("quantize", shipping.quantize, "Pack a model's layers into a checkpoint, by GPTQ or rounded to nearest.",
                   "lownibble quantize demo --output runs/int3 --quant-type int3 --calibration rows.jsonl")  # fmt: skip
    quantize.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_MODELS)
    add_flags(quantize, QuantizeConfig, positional=("model",))

    push = add("push", shipping.push, "Upload an adapter or a model to the hub, with a card made from its record.",
               "lownibble push runs/first me/first-adapter --dry-run")  # fmt: skip
    push.add_argument("source", metavar="DIR", help="a run's output folder, or the folder of an adapter or a model")
    push.add_argument("repo", metavar="ID", help="id of the repository on the hub: owner/name, or a name of your own")
    add_flags(push, PushConfig, positional=("source", "repo"))

    serve = add("serve", shipping.serve, "Serve one 4-bit base and the adapters of a folder behind OpenAI's API.",
                "lownibble serve demo --adapters runs/adapters --port 8000")  # fmt: skip
    serve.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, help="the base: 'demo', a model folder, a .gguf file, a hub id"
    )
    add_flags(serve, ServeConfig, positional=("model",))

    options = add("schema", commands.schema, "Print the options of all commands, or of one, as JSON Schema.",
                  "lownibble schema train")  # fmt: skip
    options.add_argument("of", nargs="?", metavar="COMMAND", help="train, compare, study, ... (default: all)")

    studio = add("studio", shipping.studio, "Plan, start, watch and ship runs on a page in the browser.",
                 "lownibble studio --folder runs")  # fmt: skip
    add_flags(studio, StudioConfig)

    bench = add("bench", commands.bench, "Measure kernels or the training step, next to peers.", "lownibble bench train --peers")
    bench.add_argument("what", choices=BENCHES, help="what to measure")
    bench.add_argument("--peers", action="store_true", help="measure the peers that there are for it beside it")
    bench.add_argument(
        "--data",
        help="train: rows of messages instead of fixed work, next to TRL; quality: rows of premise, hypothesis and label",
    )
    bench.add_argument(
        "--model", metavar="MODEL",
        help="train, experts, decode, plan, gpu: a model folder, or a bundled shape or config.json, of which random weights are "
        "made (default: demo; experts: a mixture of 1B; gpu: llama-3-8b)",
    )  # fmt: skip
    bench.add_argument("--batch-size", type=_count, metavar="N", help="train, experts, plan, gpu: rows in a step (default: 4)")
    bench.add_argument(
        "--max-length",
        type=_count,
        metavar="N",
        help="train, experts, plan, gpu: tokens in a row (default: 1024 on CUDA, else 256)",
    )
    bench.add_argument(
        "--only", metavar="NAMES", help="train: contenders to measure; contact: checks; separated by commas (default: all)"
    )
    bench.add_argument(
        "--time-limit",
        type=_count,
        metavar="SECONDS",
        help="contact: for all checks (default: 90); gpu: for all parts (default: 480)",
    )
    bench.add_argument(
        "--stand-in", action="store_true", default=None, help="contact: run on the CPU what can be, and say why the rest cannot"
    )
    bench.add_argument("--repeats", type=_count, metavar="N", help="interleaved repeats; quality: seeds; soak: minutes")
    bench.add_argument(
        "--output", help="write the record to this .json file; gpu: folder of the records (default: benchmarks/results)"
    )
    return parser


def _check_lists(arguments: argparse.Namespace, positional: str) -> None:
    """Check that no list flag, which takes all words up to the next one, has taken the word that was meant for `positional`: a
    model, data, or the 'config' file.

    Raises:
        ConfigError: one has, as far as can be told: `positional` is not given, and the last of several words could be it.
    """
    if getattr(arguments, positional, None) is not None:
        return
    for dest, words in vars(arguments).items():
        if isinstance(words, list) and len(words) > 1 and _could_be(positional, words[-1]):
            name = dest.rpartition(".")[2]
            raise ConfigError(
                f"'{words[-1]}' follows {name}, and is read as one of them. Put it first: lownibble {arguments.command} "
                f"{words[-1]} ...; if it is one of them, separate them by commas: {','.join(words)}"
            )


def _could_be(positional: str, word: str) -> bool:
    """Whether a word names a TOML file; or, of a model or data, a file, a folder, a hub id or a bundled model."""
    if positional == "config":
        return word.endswith(".toml")
    from lownibble.planning.models import names

    return word in ("demo", *names()) or "/" in word or Path(word).exists()


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a file that is read as well as written cannot
                stream.reconfigure(errors="backslashreplace")  # names, or a terminal, not in UTF-8
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return _main(argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(*_: Any) -> None:
    raise TerminatedError


class TerminatedError(KeyboardInterrupt):
    """SIGTERM; ends a command as Ctrl-C does."""

    signal = signal.SIGTERM


def _main(argv: list[str] | None) -> int:
    as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser().parse_args(argv)
        if arguments.command in MAY_LACK:
            _check_lists(arguments, MAY_LACK[arguments.command])
        if launch.world() > 1 and arguments.command != "train":
            raise ConfigError(f"torchrun is for 'lownibble train'; start 'lownibble {arguments.command}' without it.")
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            result = arguments.run(arguments)
        if arguments.json and launch.rank() == 0:
            print(json.dumps(result, allow_nan=False))
        return 0 if result.get("status", "ok") == "ok" else 1
    except InputError as error:
        return _fail(error, 2, as_json)
    except LownibbleError as error:
        code = _fail(error, 1, as_json)
        if error.leaves_threads:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(error, 1, as_json)
    except KeyboardInterrupt as error:
        message = str(error) or "Interrupted."
        print(message, file=sys.stderr)
        if as_json and launch.rank() == 0:
            print(json.dumps({"status": "interrupted", "error": message}))
        return 128 + int(getattr(error, "signal", signal.SIGINT))


def _warn(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Print a `UserWarning` on one line; other categories in Python's format. Of several processes only the first warns."""
    if launch.rank():
        return
    text = f"warning: {message}\n" if category is UserWarning else warnings.formatwarning(message, category, where[0], where[1])
    sys.stderr.write(text)


def _fail(error: LownibbleError | OSError, code: int, as_json: bool) -> int:
    who = f"rank {launch.rank()}: " if launch.rank() else ""
    if launch.should_tell(str(error)):
        print(f"{who}error: {error}", file=sys.stderr)
    if as_json and not who:
        print(json.dumps({"status": "failed", "error": str(error), "kind": type(error).__name__}))
    return code


if __name__ == "__main__":
    sys.exit(main())
