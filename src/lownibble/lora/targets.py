"""Target layers of an adapter, and their ranks, from module paths alone. No torch: the planner uses it too.

Matching follows PEFT's `check_target_module_exists`, including its asymmetries: a string is a regular expression that must
match the full path; a list item matches a whole path or whole names at its end; `layers_to_transform` refers to the first number
in a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from lownibble.config import LoraConfig
from lownibble.errors import ConfigError, TargetError
from lownibble.matching import by_pattern, check_patterns, fits, names

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def candidates(linears: Collection[str]) -> str:
    """The distinct last names of linear modules, for error messages."""
    return ", ".join(sorted({path.rpartition(".")[2] for path in linears})) or "none (no nn.Linear in this model)"


def match_targets(
    linears: Collection[str], config: LoraConfig, *, head: str | None = None, excluded: Collection[str] = (),
    of_file: bool = False,
) -> list[str]:  # fmt: skip
    """Paths of the linear layers that `config` targets.

    Args:
        linears: paths of all linear layers.
        head: path of the output head, which 'all-linear' excludes.
        excluded: modules whose linear layers cannot be targets, since they are trained in full.
        of_file: the configuration is a saved adapter's: names and patterns that match nothing are ignored, as in PEFT, so
            long as something matches.
    Raises:
        TargetError: nothing matches, or options contradict each other; lists the candidates.
    """
    allowed = [p for p in linears if not any(p == e or p.startswith(f"{e}.") for e in excluded)]
    allowed = [p for p in allowed if not _is_excluded(p, config.exclude_modules)]
    target, layers = config.target_modules, config.layers_to_transform
    if target == "all-linear":
        matched = [p for p in allowed if p != head]
    elif isinstance(target, str):
        if layers is not None:
            raise TargetError(
                "layers_to_transform needs target_modules as a list or 'all-linear'. Put the layers into the regex."
            )
        try:
            matched = [p for p in allowed if re.fullmatch(target, p)]
        except re.error as error:
            raise TargetError(f"target_modules {target!r} is not a valid regular expression: {error}. Correct it.") from None
    else:
        matched = [p for p in allowed if names(p, target)]
        missing = [name for name in target if not any(names(p, [name]) for p in linears)]
        if matched and missing and not of_file:
            raise TargetError(f"target_modules {missing} match no linear module. Candidates: {candidates(linears)}.")
    if layers:
        exact = target if isinstance(target, list) else []
        matched = [p for p in matched if p in exact or _layer_of(p, config.layers_pattern) in layers]
    if not matched:
        within = f" in layers {layers}" if layers is not None else ""
        raise TargetError(f"target_modules {target!r} match no linear module{within}. Candidates: {candidates(linears)}.")
    _check_patterns(config, matched, of_file)
    return matched


def unmatched(linears: Collection[str], config: LoraConfig, targets: Collection[str]) -> list[str]:
    """What of a saved adapter's options matches nothing in this model: 'target_modules c_attn', 'rank_pattern experts', ..."""
    given = config.target_modules if isinstance(config.target_modules, list) else []
    return [
        *(f"target_modules {name}" for name in given if not any(names(path, [name]) for path in linears)),
        *(f"rank_pattern {key}" for key in config.rank_pattern if not any(fits(path, key) for path in targets)),
        *(f"alpha_pattern {key}" for key in config.alpha_pattern if not any(fits(path, key) for path in targets)),
    ]


def _is_excluded(path: str, excluded: str | list[str] | None) -> bool:
    if not excluded:
        return False
    try:
        return bool(re.fullmatch(excluded, path)) if isinstance(excluded, str) else names(path, excluded)
    except re.error as error:
        raise TargetError(f"exclude_modules {excluded!r} is not a valid regular expression: {error}. Correct it.") from None


def _layer_of(path: str, patterns: str | list[str] | None) -> int | None:
    """The index of the layer that a path is in: the first number in it, or the first after a list of that name."""
    named = [patterns] if isinstance(patterns, str) else patterns or []
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path) for pattern in named] or [_LAYER_INDEX.match(path)]
    return next((int(match["index"]) for match in found if match), None)


def _check_patterns(config: LoraConfig, targets: list[str], of_file: bool) -> None:
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        try:
            check_patterns(option, patterns)
        except ConfigError as error:
            raise TargetError(str(error)) from None
        for key in patterns:
            if not of_file and not any(fits(path, key) for path in targets):
                raise TargetError(f"{option} {key!r} matches no targeted module. Targets: {', '.join(targets[:4])}, ...")


def parameter_shapes(n_in: int, n_out: int, r: int, use_dora: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters that LoRA or DoRA adds to a layer."""
    magnitude = {"magnitude": (n_out,)} if use_dora else {}
    return {"lora_A": (r, n_in), "lora_B": (n_out, r), **magnitude}


def scaling(r: int, alpha: float, use_rslora: bool) -> float:
    """The LoRA scaling factor of B A."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def rank_of(path: str, config: LoraConfig) -> int:
    """The rank of the layer at `path`."""
    return int(by_pattern(path, config.rank_pattern, config.r))


def alpha_of(path: str, config: LoraConfig) -> float:
    """The lora_alpha of the layer at `path`."""
    return by_pattern(path, config.alpha_pattern, config.lora_alpha)


def scale_of(path: str, config: LoraConfig) -> float:
    """The LoRA scaling factor of the layer at `path`."""
    return scaling(rank_of(path, config), alpha_of(path, config), config.use_rslora)
