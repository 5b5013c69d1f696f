"""One function per command: read the options, make one library call, print the result and return it.

Those for a trained model are in `shipping.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lownibble import launch
from lownibble.bench import OPTIONS, SAVES, run_bench
from lownibble.cli.said import console_of
from lownibble.config import (
    CompareConfig,
    EvalConfig,
    PlanConfig,
    RowsConfig,
    RunConfig,
)
from lownibble.errors import ConfigError, LownibbleError
from lownibble.flags import read


def schema(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print options as JSON Schema."""
    from lownibble.cli.schema import schema as of

    found = of(arguments.of)
    if not arguments.json:
        print(json.dumps(found, indent=2))
    return found


def doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Show the device, memory, kernels and package versions."""
    from lownibble import record
    from lownibble.models import pick_device

    found = record.environment(pick_device())
    console = console_of(arguments)
    console.print(f"device    {found['device']} ({found['device_type']}), {found['threads']} threads, {found['cpu_capability']}")
    console.print(f"memory    {found['ram_bytes'] / 2**30:.1f} GiB")
    isa = f" ({found['kernel_isa']})" if "kernel_isa" in found else ""
    console.print(f"kernels   {found['kernels']}{isa}")
    for name, status in found["kernel_status"].items():
        console.print(f"  {name:<10}{status}", soft_wrap=True)
    console.print(f"python    {found['python']} on {found['platform']}", soft_wrap=True)
    for package, version in found["versions"].items():
        console.print(f"  {package:<14}{version}")
    for package, purpose in (("peft", "peer"), ("bitsandbytes", "peer")):
        if package not in found["versions"]:
            console.print(f"  {package:<14}missing ({purpose}; pip install 'lownibble[peers]')")
    return {"status": "ok", **found}


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one run."""
    config: RunConfig = read(arguments, RunConfig, arguments.config)
    from lownibble.training.starts import decide

    config, decided = decide(config)
    if decided and launch.rank() == 0:
        console_of(arguments).print(decided, soft_wrap=True)
    if arguments.dry_run:
        return _dry_run(config, console_of(arguments))
    if arguments.push_to_hub and launch.rank() == 0:
        from lownibble.hub.push import check

        check(arguments.push_to_hub, config)
    if config.train.output_dir is None:
        if launch.is_several():  # each would make up its own
            raise ConfigError("Several processes need one output folder. Give --output.")
        from datetime import datetime

        folder = f"runs/{config.method}-{datetime.now():%Y%m%d-%H%M%S}"
        config = config.with_options(train=config.train.with_options(output_dir=folder))
    from lownibble.memory.usage import kept_heap
    from lownibble.planning.show import beside
    from lownibble.training import ProgressSink, run

    with kept_heap():  # this process is for the run only
        result = run(config, sinks=[ProgressSink(config.method)])
    if launch.rank():
        return result.record
    first, last = result.record["evaluations"][0], result.record["evaluations"][-1]
    console = console_of(arguments)
    console.print(f"evaluation loss {first['loss']:.4f} -> {last['loss']:.4f} on {last['label_tokens']} label tokens")
    for name, value in last["scores"].items():
        console.print(f"{name} {first['scores'].get(name, float('nan')):.3f} -> {value:.3f}")
    if reference := result.record.get("reference"):
        console.print(f"reference model's log-probabilities: {_referred(reference)}", soft_wrap=True)
    planned = result.record["memory"]["planned"]
    if "unknown" not in planned:
        console.print(f"memory ({planned['figure']}): {beside(planned)}", soft_wrap=True)
    console.print(
        f"{result.record['speed'].get('tokens_per_s', 0):.0f} tokens/s, files in {config.train.output_dir}", soft_wrap=True
    )
    if arguments.push_to_hub:
        return {**result.record, **_pushed(str(config.train.output_dir), arguments.push_to_hub, console)}
    return result.record


def _pushed(folder: str, repo: str, console: Console) -> dict[str, Any]:
    """Push a run's result; what to add to the command's result. The run is complete whatever becomes of it."""
    from lownibble.hub.push import push as upload

    try:
        found = upload(folder, repo)
    except LownibbleError as error:
        message = f"{error} The run is complete; to push it: lownibble push {folder} {repo}"
        print(f"error: {message}", file=sys.stderr)
        return {"status": "failed", "error": message, "kind": type(error).__name__}
    console.print(f"Pushed to {found['url']}", soft_wrap=True)
    return {"push": found}


def _referred(reference: dict[str, Any]) -> str:
    if reference["computed"] != "before":
        return "with each step, the adapter off"
    return (
        f"{reference['rows']} rows before the first step in {reference['seconds']:.0f} s, the adapter {reference['adapter']}; "
        f"{reference['kept_rows']} kept from before"
    )


def _dry_run(config: RunConfig, console: Console) -> dict[str, Any]:
    if launch.world() > 1:
        raise ConfigError(
            "A dry run is of one process. Start it without torchrun; 'lownibble plan --gpus N' says what each of several needs."
        )
    from lownibble.planning.show import beside
    from lownibble.rehearsal.rehearse import rehearse

    found = rehearse(config)
    run, speed, planned = found["run"], found["speed"], found["memory"]["planned"]
    console.print(
        f"{run['steps']} steps over {run['tokens']:,} tokens of {run['rows']} rows; the longest has {run['longest_row']} tokens, "
        f"{run['cut_rows']} rows are cut",
        soft_wrap=True,
    )
    if "unknown" in planned:
        console.print(f"memory: measured {found['memory']['peak_bytes'] / 2**30:.2f} GiB; not planned: {planned['unknown']}")
    else:
        console.print(f"memory ({planned['figure']}): {beside(planned)}", soft_wrap=True)
    rates, seconds = speed["tokens_per_s"], speed["run_s"]
    console.print(
        f"speed: {rates['median']:,.0f} tokens/s ({rates['low']:,.0f} to {rates['high']:,.0f}); the run takes "
        f"{_duration(seconds['likely'])} ({_duration(seconds['low'])} to {_duration(seconds['high'])}), evaluations not counted",
        soft_wrap=True,
    )
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
    console.print("Nothing was written.")
    return found


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare methods; show the table and the recommendation."""
    config: CompareConfig = read(arguments, CompareConfig, arguments.config)
    from lownibble.study.compare import compare as run_compare
    from lownibble.study.table import comparison_table

    result = run_compare(config, gpus_per_cell=arguments.gpus_per_cell)
    console = console_of(arguments)
    console.print(comparison_table(result["methods"]))
    chosen = result["advice"]["method"]
    console.print(f"Recommendation: {chosen}" if chosen else "No method finished.", style="bold")
    for reason in result["advice"]["reasons"]:
        console.print(f"  {reason}", soft_wrap=True)
    console.print(f"Report: {Path(result['output']) / 'report.html'}", soft_wrap=True)
    return result


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan a study, run it or report on an existing one."""
    from lownibble.study.power import plan_study
    from lownibble.study.report import study_page
    from lownibble.study.runner import run_study
    from lownibble.study.study_table import plan_tables, tables

    of_run = ("gpus_per_cell", "executor", "retry_failed", "again")
    ignored = {"run": (), "plan": of_run, "report": ("jobs", *of_run)}[arguments.what]
    if given := [name for name in ignored if getattr(arguments, name)]:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for 'study run'. Leave it out.")
    if arguments.what == "report":
        folder, pages = Path(arguments.path), Path(arguments.output or arguments.path)
    else:
        folder = pages = Path(arguments.output or f"runs/{Path(arguments.path).stem}")
        jobs = arguments.jobs or "1"
        if not jobs.isdecimal():
            raise ConfigError(f"The number of --jobs must be an integer >= 1. Got {jobs!r}.")
        if arguments.what == "plan":
            planned = plan_study(arguments.path, folder, int(jobs))
            console = console_of(arguments)
            for table in plan_tables(planned):
                console.print(table)
            return planned
        run_study(
            arguments.path, folder, jobs=int(jobs), gpus_per_cell=arguments.gpus_per_cell or 1,
            executor=arguments.executor or "local", retry_failed=arguments.retry_failed, again=arguments.again or 0,
        )  # fmt: skip
    summary = study_page.write(folder, pages)
    console = console_of(arguments)
    for table in tables(summary):
        console.print(table)
    console.print(f"Report: {pages / 'report.html'}", soft_wrap=True)
    return summary


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan a run, and show what fits."""
    config: PlanConfig = read(arguments, PlanConfig, arguments.config, of=RunConfig)
    if arguments.html and config.gpus:
        raise ConfigError("The page of --html is of one GPU. Leave it out, or --gpus.")
    from lownibble.planning.page import TRACED, write_page
    from lownibble.planning.show import tables
    from lownibble.rehearsal.plan import plan as make_plan
    from lownibble.rehearsal.plan import traces

    if arguments.html and traces(config, exact=arguments.exact):
        raise ConfigError(TRACED)
    console = console_of(arguments)
    if arguments.calibrate:
        from lownibble.rehearsal.calibrate import calibrate

        found = calibrate(config)
        config = config.with_options(gpu=found["device"])
        console.print(f"Calibrated for '{found['device']}', kept in {found['file']}", soft_wrap=True)
    if config.data.path != "none" and config.tokens is None:
        from lownibble.training.tokens import count_tokens

        tokens, told = count_tokens(config)
        config = config.with_options(tokens=tokens)
        if told:
            print(f"warning: {told}", file=sys.stderr)
    made = make_plan(config, exact=arguments.exact, tell=lambda what: print(what, file=sys.stderr))
    for table in tables(made):
        console.print(table, soft_wrap=not isinstance(table, Table))
    if arguments.html:
        console.print(f"Page: {write_page(made, arguments.html)}", soft_wrap=True)
    return {"kind": "plan", "status": "ok", **made.to_dict()}


def claims(arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge statements about memory and time."""
    from lownibble.planning.claims import ARTICLES, judge_file

    judged = judge_file(arguments.file or ARTICLES)
    console = console_of(arguments)
    colours = {"impossible": "red", "implausible": "yellow", "consistent": "green", "not decided": "bright_black"}
    for each in judged:
        console.print(Text(f"{each.verdict:<12}", colours[each.verdict]).append(f" {each.text}", "default"), soft_wrap=True)
        for line in each.arithmetic:
            console.print(f"             {line}", soft_wrap=True)
    return {"kind": "claims", "status": "ok", "claims": [each.to_dict() for each in judged]}


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score a model."""
    config: EvalConfig = read(arguments, EvalConfig)
    from lownibble.study.evaluate import evaluate as score

    result = score(config)
    table = Table(title=f"{config.model}{f' with {config.adapter}' if config.adapter else ''}", title_justify="left")
    for name in ("task", "score", "value", "standard error", "rows"):
        table.add_column(name, justify="left" if name in ("task", "score") else "right")
    for task, scores in result["scores"].items():
        for name, found in scores.items():
            error = "-" if found["standard_error"] is None else f"{found['standard_error']:.4f}"
            value = "not finite" if found["value"] is None else f"{found['value']:.4f}"
            table.add_row(task, name, value, error, str(found["rows"] or "-"))
    console_of(arguments).print(table)
    return result


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Show rows as the model will see them."""
    if hasattr(arguments, "data"):
        if hasattr(arguments, "data.path"):
            raise ConfigError(f"'{arguments.data}' and --data {getattr(arguments, 'data.path')}: give the data once.")
        setattr(arguments, "data.path", arguments.data)
    config: RowsConfig = read(arguments, RowsConfig)
    from lownibble.data.inspect import SHORT_RUN, inspect

    found, console = inspect(config), console_of(arguments)
    console.print(f"{found['data']}: {found['form']} rows, tokenised for {found['model']}", soft_wrap=True)
    for side in ("training", "evaluation"):
        of = found[side]
        console.print(
            f"{side}: {of['rows']:,} rows, {of['tokens']:,} tokens, {of['label_share']:.0%} of them trained; lengths "
            f"{', '.join(f'{name} {length}' for name, length in of['lengths'].items())}", soft_wrap=True,
        )  # fmt: skip
    most = max(count for _, count in found["training"]["histogram"])
    for upto, count in found["training"]["histogram"]:
        console.print(f"{upto:>7} {'█' * round(40 * count / most):<40} {count}")
    for row in found["rows"]:
        console.print(f"\n{row['origin']}, {row['tokens']} tokens; trained is marked:")
        if "label" in row:
            console.print(f"label: {'good' if row['label'] else 'bad'}")
        text = Text()
        for number, (piece, trained) in enumerate(row["pieces"]):
            if number == row.get("rejected_from"):
                text.append("\n--- rejected:\n")
            marked = piece if console.color_system or not trained else f"⟦{piece}⟧"
            text.append(marked, style="bold green" if trained else "dim")
        console.print(text, soft_wrap=True)
    short = [SHORT_RUN.format(found["training"]["rows"], epochs)] if (epochs := found["suggested_epochs"]) else []
    for warning in (*found["warnings"], *short):
        print(f"warning: {warning}", file=sys.stderr)
    return found


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a benchmark and show its figures."""
    from lownibble import record
    from lownibble.models import pick_device

    given = {name: getattr(arguments, name) for name in ("repeats", *OPTIONS)}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    file = arguments.output

    def whole(measured: dict[str, Any], status: str) -> dict[str, Any]:
        environment = record.environment(pick_device())
        return {**record.new(f"bench-{arguments.what}"), "status": status, "environment": environment, **measured}

    if file and arguments.what != "gpu":
        record.check(file)
    if arguments.what == "gpu" and file:  # a folder: each part has its record
        options["output"], file = file, None
    if arguments.what in SAVES and file:
        options["save"] = lambda measured: record.write(file, whole(measured, "partial"))
    result = whole(run_bench(arguments.what, peers=arguments.peers, **options), "ok")
    console = console_of(arguments)
    table = Table(title=f"bench {arguments.what}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result["headlines"].items():
        table.add_row(name, f"{value:,.3g}" if isinstance(value, float) else str(value))
    console.print(table)
    if file:
        record.write(file, result)
    return result
