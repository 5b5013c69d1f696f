"""The commands for a trained model, each as in `commands.py`: pack, merge, export, push, serve; and the page for all of it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from rich.table import Table

from lownibble.cli.said import console_of, progress
from lownibble.config import ExportConfig, MergeConfig, PushConfig, QuantizeConfig, ServeConfig, StudioConfig
from lownibble.errors import ConfigError
from lownibble.flags import read


def push(arguments: argparse.Namespace) -> dict[str, Any]:
    """Upload an adapter or a model to the hub."""
    config: PushConfig = read(arguments, PushConfig)
    from lownibble.hub.push import run_push

    result = run_push(config)
    said = f"Card: {result['card']}. Nothing was uploaded." if config.dry_run else f"Pushed to {result['url']}"
    console_of(arguments).print(said, soft_wrap=True)
    return result


def merge(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merge an adapter into its base."""
    config: MergeConfig = read(arguments, MergeConfig)
    from lownibble.exporting.merge import run_merge

    with progress() as tell:
        result = run_merge(config, tell)
    console = console_of(arguments)
    if result["measured"] is not None:
        console.print(_merge_table(result["measured"]["models"]))
        console.print(f"Compared on {result['measured']['tokens']} tokens of {result['measured']['data']}.", soft_wrap=True)
    for line in result["advice"]:
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"Merged onto {result['onto']}: {result['output']}", soft_wrap=True)
    return result


def _merge_table(models: dict[str, Any]) -> Table:
    table = Table(title="compared with the unmerged adapter, on label tokens", title_justify="left")
    table.add_column("model")
    for name in ("KL (nats/token)", "same top-1 token", "perplexity", "fine-tuning gain retained"):
        table.add_column(name, justify="right")
    for model, figures in models.items():
        at = figures["label_tokens"]
        kl = f"{at['kl']:.3g} ± {at['kl_standard_error']:.1g}" if "kl" in at else "-"
        same = f"{at['top1_agreement']:.1%}" if "kl" in at else "-"
        kept = f"{max(0.0, figures['kept']):.1%}" if "kept" in figures else "-"
        table.add_row(model, kl, same, f"{at['perplexity']:.4g}", kept)
    return table


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write weights in another format."""
    config: ExportConfig = read(arguments, ExportConfig)
    from lownibble.exporting.convert import run_export

    with progress() as tell:
        result = run_export(config, tell)
    console = console_of(arguments)
    console.print(f"{result['tensors']} tensors as {config.format}: {result['output']}", soft_wrap=True)
    if warning := result.get("warning"):
        console.print(warning, soft_wrap=True)
    if isinstance(serve := result["command"], str):  # of formats without a server it is the record's list, this command
        console.print(f"Serve it with:\n{serve}", soft_wrap=True)
    return result


def quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pack a model into a checkpoint."""
    config: QuantizeConfig = read(arguments, QuantizeConfig)
    from lownibble.exporting.quantize import run_quantize

    with progress() as tell:
        result = run_quantize(config, tell)
    console = console_of(arguments)
    if mixed := result.get("mixed"):
        counts = Counter(mixed["codecs"].values()).most_common()
        console.print(
            f"{mixed['bits']:.2f} bits a weight: {', '.join(f'{n} layers {name}' for name, n in counts)}", soft_wrap=True
        )
    if ratio := result.get("error_over_rtn_median"):
        console.print(f"error of the layers' outputs: {ratio:.2f} x that of rounding to nearest (median)", soft_wrap=True)
    for path in result.get("rounded_to_nearest", ()):
        why = "experts, or not in a decoder layer, or not reached"
        console.print(f"  {path} was rounded to nearest: {why}", soft_wrap=True)
    if share := result["dense_experts"]:
        console.print(f"experts stay dense, {share:.0%} of the model: skip_modules", soft_wrap=True)
    if result["format"] == "lownibble" and config.format == "auto":
        console.print(f"No other layout holds it ({result['other_formats']})", soft_wrap=True)
    if config.quant.double_quant and not result["quant"]["double_quant"]:
        console.print(f"{result['format']} holds scales in float: they are not quantised again", soft_wrap=True)
    console.print(f"{result['layers']} layers packed as {result['format']}: {result['output']}", soft_wrap=True)
    return result


def serve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve until stopped."""
    config: ServeConfig = read(arguments, ServeConfig)
    try:
        from lownibble.serve.server import run_server
    except ImportError as error:
        raise ConfigError(f"Serving needs {error.name}. Run: pip install 'lownibble[serve]'") from None

    return run_server(config, lambda text: print(text, file=sys.stderr, flush=True))


def studio(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve the page until stopped."""
    config: StudioConfig = read(arguments, StudioConfig)
    try:
        from lownibble.studio.opening import run_studio
    except ImportError as error:
        raise ConfigError(f"The studio needs {error.name}. Run: pip install 'lownibble[serve]'") from None

    return run_studio(config, lambda text: print(text, file=sys.stderr, flush=True))
