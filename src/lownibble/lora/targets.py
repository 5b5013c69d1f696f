"""Target layers of an adapter, and their ranks, from module paths alone. No torch: the planner uses it too.

Matching follows PEFT's `check_target_module_exists`, including its asymmetries: a string is a regular expression that must
match the full path; a list item matches a whole path or whole names at its end; `layers_to_transform` refers to the first number
in a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from lownibble.config import LoraConfig
from lownibble.errors import ConfigError, TargetError
from lownibble.matching import by_pattern, check_patterns, fits, names

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")

OF_LINEAR = ".weight"
"""End of a name in `target_parameters` that is a linear layer's weight."""


def candidates(paths: Collection[str], none: str = "none (no nn.Linear in this model)") -> str:
    """The distinct last names of paths, for error messages; `none` if there are none."""
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths})) or none


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
    matched += [path for path in linears_by_parameter(linears, config) if path not in matched]
    if not matched and not (config.target_parameters and (of_file or not target)):
        within = f" in layers {layers}" if layers is not None else ""
        raise TargetError(f"target_modules {target!r} match no linear module{within}. Candidates: {candidates(linears)}.")
    return matched


def match_experts(
    weights: Collection[str], config: LoraConfig, *, excluded: Collection[str] = (), of_file: bool = False
) -> list[str]:  # fmt: skip
    """Paths of the experts' weights that `config` targets: those that `target_parameters` names, and with 'all-linear' all of
    them unless `target_experts` is off.

    Args:
        weights: paths of the weights of all mixtures' experts.
        excluded: as in `match_targets`.
        of_file: as in `match_targets`; a file's 'all-linear' is PEFT's, which has no experts, and its `target_parameters` are
            whatever else it says.
    Raises:
        TargetError: `target_parameters` names what is not there; lists the candidates.
    """
    named = [path for path in weights if names(path, config.target_parameters)]
    missing = [name for name in config.target_parameters if not any(names(path, [name]) for path in weights)]
    missing = [name for name in missing if not name.endswith(OF_LINEAR)]
    if missing and not (of_file and named):
        raise TargetError(
            f"target_parameters {missing} match no weight of experts. Candidates: {candidates(weights, 'none (no experts)')}."
        )
    if of_file:
        return named
    every = config.target_modules == "all-linear" and config.target_experts
    layers, barred = config.layers_to_transform, config.exclude_modules
    allowed = [p for p in weights if not any(p.startswith(f"{outer}.") for outer in excluded)]
    allowed = [p for p in allowed if not (_is_excluded(p, barred) or _is_excluded(p.rpartition(".")[0], barred))]
    in_layers = [p for p in allowed if not layers or _layer_of(p, config.layers_pattern) in layers]
    return in_layers if every else [p for p in in_layers if p in named]


def linears_by_parameter(linears: Collection[str], config: LoraConfig) -> list[str]:
    """Paths of linear layers that `target_parameters` names by their weight.

    Raises:
        TargetError: a name that ends in '.weight' is no linear layer's.
    """
    wanted = [name for name in config.target_parameters if name.endswith(OF_LINEAR)]
    for name in wanted:
        if not any(names(f"{path}{OF_LINEAR}", [name]) for path in linears):
            raise TargetError(
                f"target_parameters ['{name}'] match no linear module's weight (a router's cannot be adapted here). Candidates: "
                f"{candidates(linears)}."
            )
    return [path for path in linears if names(f"{path}{OF_LINEAR}", wanted)]


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
    named = [patterns] if isinstance(patterns, str) and patterns else list(patterns or [])
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path) for pattern in named] or [_LAYER_INDEX.match(path)]
    return next((int(match["index"]) for match in found if match), None)


def check_ranks(config: LoraConfig, targets: list[str], of_file: bool) -> None:
    """Check the patterns for ranks and scales of these targets.

    Raises:
        TargetError: one is not valid, or (but for a saved adapter's) matches none.
    """
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        try:
            check_patterns(option, patterns)
        except ConfigError as error:
            raise TargetError(str(error)) from None
        for key in patterns:
            if not of_file and not any(fits(path, key) for path in targets):
                raise TargetError(f"{option} {key!r} matches no targeted module. Targets: {', '.join(targets[:4])}, ...")


def check_experts(config: LoraConfig, paths: Sequence[str], *, merge_aware: bool, of_file: bool = False) -> None:
    """Check that the options suit adapters on experts; a saved adapter's dropout matters no more.

    Raises:
        TargetError: one does not (named, with the remedy).
    """
    wrong = [
        what
        for given, what in (
            (config.lora_dropout > 0 and not of_file, f"lora_dropout = {config.lora_dropout:g}"), (config.use_dora, "use_dora"),
            (config.init_lora_weights not in (True, False, "gaussian"), f"init_lora_weights = {config.init_lora_weights!r}"),
            (merge_aware, "merge_aware"),
        ) if given
    ]  # fmt: skip
    if paths and wrong:
        raise TargetError(
            f"Adapters on experts ({', '.join(paths[:2])}{', ...' * (len(paths) > 2)}) cannot be combined with "
            f"{', '.join(wrong)}, nor can PEFT load that. Leave it out, or the experts: target_experts=False "
            "(--no-target-experts)."
        )


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
