"""Groups of options that several commands share: codecs, adapters, data, training."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lownibble.errors import ConfigError
from lownibble.matching import by_pattern, check_patterns
from lownibble.options import Known, Options, Size
from lownibble.registry import CODECS, INITS, OBJECTIVES, OPTIMIZERS, TRACKERS

Checkpointing = bool | Literal["offload"]
"""How the layers' activations are recomputed in backward."""

CHECKPOINTING: tuple[Checkpointing, ...] = (False, True, "offload")
"""Its values, by increasing cost and decreasing memory."""

PER_LAYER = ("quant_type", "block_size", "double_quant")
"""Options of the codec that a `pattern` may set for some layers."""


FIXED: dict[str, dict[str, Any]] = {"mxfp4": {"block_size": 32, "double_quant": False}}
"""Codec -> options that its format fixes. Their defaults, meant for other codecs, are replaced; other values are refused."""

LOOK_AT_INPUTS = ("auto", "eva", "qera", "qera_approx")
"""Initialisations that a calibration pass is run for."""

CORRECT = ("auto", "loftq", "qera", "qera_approx")
"""Initialisations that start at what packing lost; on a dense base they start as kaiming, without a pass."""

KEEP_THEIR_START = ("pissa", "olora")
"""Initialisations that take their start out of the base; A and B at the start are kept, to be taken out of other bases, too."""


def _digits_are_a_number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class QuantConfig(Options):
    """How the frozen base weights are stored (QLoRA). For nf4 and fp4 these are bitsandbytes' `BitsAndBytesConfig` options."""

    quant_type: Annotated[str, Known(CODECS)] = Field(
        "nf4",
        description="codec: 'nf4' or 'fp4' (4 bits, bitsandbytes' bytes), 'nf3', 'nf2', 'int8', 'int4', 'int3', 'int2', 'fp8', "
        "'mxfp4', or one from outside",
    )
    block_size: Annotated[Literal["row", 32, 64, 128, 256, 512, 1024, 2048, 4096], BeforeValidator(_digits_are_a_number)] = Field(
        64, description="weights that share one constant; 'row' (not nf4, fp4): a row's; mxfp4 has blocks of 32"
    )
    double_quant: bool = Field(True, description="quantise the block constants to 8 bits as well; those of mxfp4 have 8 bits")
    compute: Literal["auto", "exact", "int8", "fp8"] = Field(
        "auto",
        description="precision of the frozen base's matrix products: 'exact' in the activations' dtype; 'int8' on 8-bit units, "
        "on CPUs the head's too (faster; values differ a little, the adapter stays exact); 'fp8' on those of newer CUDA devices "
        "(values differ more); 'auto' is 'int8' in training on a CPU that has it, where 'bench quality' says that it learns as "
        "well, else 'exact'",
    )
    skip_modules: list[str] = Field(["lm_head"], description="linear modules left in full precision, by last name or path")
    pattern: dict[str, dict[str, Any]] = Field(
        {}, description="other codecs by module name or regular expression, e.g. {down_proj = {quant_type = 'int8'}}"
    )

    @model_validator(mode="after")
    def _patterns_are_codecs(self) -> QuantConfig:
        check_patterns("The pattern of QuantConfig", self.pattern)
        for key, options in self.pattern.items():
            unknown = sorted(options.keys() - set(PER_LAYER))
            if unknown:
                raise ConfigError(
                    f"The pattern {key!r} of QuantConfig can set {', '.join(PER_LAYER)}. Got {', '.join(unknown)}. Leave it out."
                )
            self._with(options)
        return self

    @model_validator(mode="after")
    def _fixed_options(self) -> QuantConfig:
        for key, value in FIXED.get(self.quant_type, {}).items():
            given = getattr(self, key)
            if given not in (value, type(self).model_fields[key].default):
                raise ConfigError(f"The '{key}' of {self.quant_type} is {value}. Got {given!r}. Leave it out.")
            self.__dict__[key] = value
        return self

    def with_options(self, **changes: Any) -> QuantConfig:
        """A copy with options replaced. What a format fixes goes to no other codec, and comes from none."""
        kept = self.model_fields_set - self._fixed_unless(changes)
        return QuantConfig(**{**{name: getattr(self, name) for name in kept}, **changes})

    def _with(self, options: Mapping[str, Any]) -> QuantConfig:
        """The configuration of a layer with the options of a pattern, as `with_options`."""
        own = {key: getattr(self, key) for key in PER_LAYER if key not in self._fixed_unless(options)}
        return QuantConfig(**{**own, "compute": self.compute, **options})

    def _fixed_unless(self, changes: Mapping[str, Any]) -> set[str]:
        """Options that the format of this codec or of the one in `changes` fixes, if they are two."""
        codecs = {self.quant_type, changes.get("quant_type", self.quant_type)}
        return {key for codec in codecs for key in FIXED.get(codec, {})} if len(codecs) > 1 else set()

    def for_layer(self, path: str) -> QuantConfig:
        """Configuration of the layer at `path`: this one, with the options of the first matching `pattern` if there is one."""
        options = by_pattern(path, self.pattern, None)
        return self if options is None and not self.pattern else self._with(options or {})

    @classmethod
    def of_layers(cls, layers: Mapping[str, QuantConfig], skip_modules: list[str]) -> QuantConfig:
        """The configuration that packs each path as given: the most common options, and a pattern for each group of others.

        No two of its patterns match the same path.
        """
        ways = {path: tuple(getattr(each, key) for key in PER_LAYER) for path, each in layers.items()}
        common = Counter(ways.values()).most_common(1)[0][0]
        of_name: dict[str, set[tuple[Any, ...]]] = {}
        for path, way in ways.items():
            of_name.setdefault(path.rpartition(".")[2], set()).add(way)
        pattern = {}
        for path, way in ways.items():
            name = path.rpartition(".")[2]
            if way != common:
                pattern[re.escape(name if len(of_name[name]) == 1 else path)] = dict(zip(PER_LAYER, way, strict=True))
        options = dict(zip(PER_LAYER, common, strict=True))
        return cls(**options, skip_modules=skip_modules, pattern=dict(sorted(pattern.items())))


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm",
)  # fmt: skip
KTO_LOSSES = ("kto", "apo_zero_unpaired")
LOSS_TYPES = (*DPO_LOSSES, *KTO_LOSSES)
SMOOTHED = ("robust", "exo_pair")
"""Losses of dpo that take `label_smoothing`."""

NEXT_TOKEN = "next-token"
"""The objective whose loss is the mean cross-entropy of label tokens."""

PREFERENCE: dict[str, tuple[str, ...]] = {
    "dpo": ("beta", "loss_type", "label_smoothing", "precompute_ref_log_probs"),
    "orpo": ("beta",),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight", "precompute_ref_log_probs"),
}
"""Objectives over preference data -> their own options."""


def _a_word_is_a_name(value: str | list[str] | None) -> str | list[str] | None:
    """One name is a list of one; only what cannot be a path is a regular expression."""
    return [value] if isinstance(value, str) and re.fullmatch(r"[\w.]+", value) else value


def _words_are_tokens(value: Any) -> Any:
    """What a command line has for token ids, all of them numbers, or for a text."""
    words = value.split() if isinstance(value, str) else value
    if not (isinstance(words, list) and words and all(isinstance(each, str) for each in words)):
        return value
    if all(each.isdecimal() for each in words):
        return [int(each) for each in words]
    return value if isinstance(value, str) else " ".join(value)


_ESCAPES: dict[str, Any] = {"escapes": True}
"""Of a text: its flag has new lines as `\\n` (`flags.py`)."""


class LoraConfig(Options):
    """Low-rank adapters; names and meanings are PEFT's `LoraConfig`."""

    r: Annotated[int, Ge(1)] = Field(16, description="rank of the update")
    lora_alpha: Annotated[float, Gt(0)] = Field(32, description="scale: the update is multiplied by lora_alpha / r")
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = Field(0.0, description="dropout on the adapter's input")
    target_modules: Annotated[str | list[str], AfterValidator(_a_word_is_a_name)] = Field(
        "all-linear", description="'all-linear', module names, or a regular expression over full module paths"
    )
    exclude_modules: Annotated[str | list[str] | None, AfterValidator(_a_word_is_a_name)] = Field(
        None, description="modules without adapters all the same: names, or a regular expression over full module paths"
    )
    target_parameters: list[str] = Field(
        [], description="weights of a mixture's experts with adapters, by name (gate_up_proj) or path, besides target_modules"
    )
    target_experts: bool = Field(True, description="whether 'all-linear' includes the experts of a mixture")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained too")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = Field(False, description="DoRA: train the norm of each row of the weight apart from its direction")
    init_lora_weights: bool | Annotated[str, Known(INITS)] = Field(
        True,
        description="true: A kaiming-uniform, B zero; 'gaussian': A normal / r, B zero; false: B random too (for tests); "
        "'loftq', 'qera', 'qera_approx': start at what packing lost; 'pissa', 'olora': take the main part out of the base; "
        "'eva': A from the layers' inputs; 'auto': what held up, with its learning rate; or the name of one from outside",
    )
    modules_to_save: list[str] = Field([], description="modules trained in full and saved with the adapter")
    layers_to_transform: list[Annotated[int, Ge(0)]] | None = Field(None, description="only the layers with these indices")
    layers_pattern: str | list[str] | None = Field(
        None, description="name of the list of layers that layers_to_transform counts in, where a model has several"
    )
    rank_pattern: dict[str, Annotated[int, Ge(1)]] = Field({}, description="rank by module name or regular expression")
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = Field({}, description="lora_alpha by module name or regular expression")
    alora_invocation_tokens: Annotated[list[Annotated[int, Ge(0)]] | str | None, BeforeValidator(_words_are_tokens)] = Field(
        None,
        description="activated LoRA: the adapter is active from the last occurrence of these tokens on (ids, or their text, such "
        "as the header of the assistant's turn); what comes before is the base's, and a server reads it once for all adapters",
        json_schema_extra=_ESCAPES,
    )

    @model_validator(mode="after")
    def _activated_adapters_leave_the_base(self) -> LoraConfig:
        if self.alora_invocation_tokens is None:
            return self
        if not self.alora_invocation_tokens:
            raise ConfigError("The 'alora_invocation_tokens' of LoraConfig must not be empty. Got none. Leave it out.")
        others = {"use_dora": self.use_dora, "bias": self.bias != "none", "modules_to_save": self.modules_to_save,
                  "target_parameters": self.target_parameters}  # fmt: skip
        if wrong := [name for name, given in others.items() if given]:
            raise ConfigError(
                f"The 'alora_invocation_tokens' of LoraConfig cannot be combined with {', '.join(wrong)}: before its invocation "
                "an activated adapter changes nothing. Leave one of them out."
            )
        return self


class DataConfig(Options):
    """Where rows come from and how they become prompt and completion."""

    path: str = Field(
        "demo",
        description="'demo', a .jsonl/.csv/.parquet file, a folder with train and test files, or a hub data set id",
        json_schema_extra={"flag": "data"},
    )
    eval_path: str | None = Field(
        None, description="evaluation file; default: the test side of --data", json_schema_extra={"flag": "eval-data"}
    )
    split: str = Field("train", description="training split of a hub data set or folder")
    eval_split: str = Field("test", description="evaluation split of a hub data set or folder")
    eval_fraction: Annotated[float, Gt(0), Lt(1)] = Field(0.1, description="rows held out where the data has no test side")
    prompt_template: str | None = Field(
        None, description="prompt made from a row's fields, e.g. 'Review: {text}\\nSentiment:'", json_schema_extra=_ESCAPES
    )
    completion_template: str | None = Field(
        None, description="completion made from a row's fields, e.g. ' {label}'", json_schema_extra=_ESCAPES
    )
    use_chat_template: bool = Field(False, description="wrap prompt and completion as user and assistant turns")
    mask_prompt: bool = Field(True, description="take the loss on completions and assistant turns only")
    trained_turns: Literal["all", "last"] = Field(
        "all", description="assistant turns of a conversation that are trained: 'all', or its 'last' one"
    )
    overlength: Literal["cut", "drop", "error"] = Field(
        "cut",
        description="rows longer than max_length: 'cut' them, 'drop' them, or 'error'; how many there are is said in any case",
    )
    calibration_tokens: Annotated[int, Ge(256)] = Field(
        16384,
        description="tokens of training rows over which calibrated initialisations (init_lora_weights) look at layers' inputs",
    )
    max_rows: Annotated[int, Ge(1)] | None = Field(None, description="use at most this many training rows")
    max_eval_rows: Annotated[int, Ge(1)] | None = Field(None, description="use at most this many evaluation rows")


def _a_name_is_a_list(value: Any) -> Any:
    """As in transformers: one name, or 'none'."""
    names = [value] if isinstance(value, str) else value
    return [] if names == ["none"] else names


_Tracker = Annotated[str, Known(TRACKERS)]
_NAMES_OR_ONE = BeforeValidator(_a_name_is_a_list, json_schema_input_type=list[_Tracker] | _Tracker | Literal["none"])


class TrainConfig(Options):
    """The training run; names are transformers' `TrainingArguments` where the meaning is the same."""

    learning_rate: Annotated[float, Gt(0)] = Field(2e-4, description="peak learning rate")
    max_steps: Annotated[int, Ge(1)] | None = Field(None, description="optimiser steps; default: num_train_epochs over the data")
    num_train_epochs: Annotated[float, Gt(0)] = Field(1.0, description="passes over the data where max_steps is not given")
    batch_size: Annotated[int, Ge(1)] = Field(8, description="rows (with packing: packs) in one forward pass")
    gradient_accumulation_steps: Annotated[int, Ge(1)] = Field(1, description="forward passes in one optimiser step")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("linear", description="schedule after the warm-up")
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = Field(0.03, description="share of the steps that warm up")
    max_grad_norm: Annotated[float, Gt(0)] | None = Field(1.0, description="clip the gradient to this norm")
    router_aux_loss_coef: Annotated[float, Ge(0)] | None = Field(
        None,
        description="weight of a mixture's load-balancing loss; none: the model's own, if its configuration asks for it "
        "(output_router_logits)",
    )
    weight_decay: Annotated[float, Ge(0)] = Field(0.0, description="decoupled weight decay")
    loraplus_lr_ratio: Annotated[float, Gt(0)] | None = Field(
        None, description="LoRA+: learning rate of the matrices B, and of vectors, as a multiple of learning_rate, e.g. 16"
    )
    objective: Annotated[str, Known(OBJECTIVES)] = Field(
        NEXT_TOKEN,
        description="what is minimised: 'next-token' (cross-entropy of label tokens); 'dpo' or 'orpo' over rows of chosen and "
        "rejected answers, 'kto' over answers labelled good or bad; or one from outside",
    )
    beta: Annotated[float, Gt(0)] = Field(
        0.1, description="dpo, kto: what leaving the reference model costs; orpo: weight of the odds ratio; ipo: tau"
    )
    loss_type: Literal[LOSS_TYPES] | None = Field(  # type: ignore[valid-type]
        None,
        description="dpo: sigmoid (default), hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, "
        "sigmoid_norm; kto: kto (default), apo_zero_unpaired; names and formulas are TRL's",
    )
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = Field(
        0.0, description="dpo with loss_type robust or exo_pair: share of the rows whose preference is taken to be wrong"
    )
    desirable_weight: Annotated[float, Gt(0)] = Field(1.0, description="kto: weight of the losses of good answers")
    undesirable_weight: Annotated[float, Gt(0)] = Field(1.0, description="kto: weight of the losses of bad answers")
    precompute_ref_log_probs: bool | Literal["auto"] = Field(
        "auto",
        description="dpo, kto: compute the reference model's log-probabilities before the first step, and keep them in the "
        "output folder; false: in each step, with the adapter off; auto: before, which never costs more",
    )
    optim: Annotated[str, Known(OPTIMIZERS)] = Field(
        "adamw",
        description="optimiser: adamw, paged_adamw, adamw_8bit, paged_adamw_8bit, or one from outside; paged: the same results "
        "with only part of the states in memory, the rest in a file (CUDA: in host memory); 8bit: both moments in 8 bits",
    )
    optim_page_budget: Size | None = Field(
        None, description="states that a paged optimiser keeps in memory, e.g. '64MB'; default: a tenth of them, at least 16MiB"
    )
    memory_budget: Size | None = Field(
        None,
        description="most memory to use, e.g. '12GB' (CUDA: of the device; else the whole process): before the first step, "
        "forward passes, checkpointing and paging are chosen so that the longest batch fits; the effective batch stays the same",
    )
    max_length: Annotated[int, Ge(2)] = Field(512, description="tokens in a row; longer rows are cut")
    group_by_length: bool = Field(False, description="batch rows of like length together (less padding)")
    packing: bool = Field(False, description="rows one after the other up to max_length, no padding; each row sees itself only")
    gradient_checkpointing: Checkpointing = Field(
        False,
        description="recompute activations in backward: less memory, slower; 'offload' (CUDA): and keep decoder layers' inputs "
        "in pinned host memory until then, for long rows",
    )
    torch_compile: bool | Literal["auto"] = Field(
        "auto", description="compile one decoder layer and use it for all; auto: where the run is long enough for it to pay"
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto", description="on CUDA, replay passes as graphs, without waiting for the host; auto: where layers are compiled"
    )
    deterministic: bool = Field(
        False, description="on CUDA, the same bits from run to run, with a slower backward pass of attention; CPUs always are"
    )
    seed: Annotated[int, Ge(0), Lt(2**32)] = Field(0, description="seed of data order, initialisation and dropout")
    eval_steps: Annotated[int, Ge(1)] | None = Field(None, description="evaluate every so many steps; default: before and after")
    save_steps: Annotated[int, Ge(1)] | None = Field(None, description="checkpoint every so many steps; default: at the end")
    output_dir: Annotated[str, AfterValidator(os.path.expanduser)] | None = Field(
        None,
        description="folder for adapter, record and checkpoints; default on the command line: a new one below runs/",
        json_schema_extra={"flag": "output"},
    )
    report_to: Annotated[list[_Tracker], _NAMES_OR_ONE] = Field(
        [], description="trackers that get curves, options, record and adapter: tensorboard, wandb, mlflow, trackio, swanlab"
    )
    resume: bool = Field(False, description="resume from the newest checkpoint in the output folder")
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="how the processes of torchrun share the model: each holds all of it ('ddp'), or a part of each layer "
        "('fsdp'); auto: ddp where the run fits a device by the plan, else fsdp. batch_size is the run's, whatever their number",
    )
    fsdp_cpu_offload: bool = Field(
        False,
        description="fsdp: keep shards, gradients and optimiser states in host memory, where the optimiser steps; a layer is on "
        "the GPU only while it runs (accelerate: fsdp_offload_params)",
    )

    @model_validator(mode="after")
    def _one_remedy_for_padding(self) -> TrainConfig:
        if self.packing and self.group_by_length:
            raise ConfigError(
                "The 'group_by_length' of TrainConfig must be false with packing, which leaves no padding. Got true. "
                "Set group_by_length=False (--no-group-by-length)."
            )
        return self

    @model_validator(mode="after")
    def _shards_on_the_host(self) -> TrainConfig:
        if not self.fsdp_cpu_offload:
            return self
        if self.parallel != "fsdp":
            raise ConfigError(
                f"The 'fsdp_cpu_offload' of TrainConfig is for shards. Got parallel='{self.parallel}'. Set parallel='fsdp' "
                "(--parallel fsdp), or leave it out."
            )
        if self.gradient_checkpointing == "offload":
            raise ConfigError(
                "The 'gradient_checkpointing' of TrainConfig must be true or false with fsdp_cpu_offload. Got 'offload'. Set "
                "gradient_checkpointing=True (--gradient-checkpointing true)."
            )
        if OPTIMIZERS[self.optim].paged == self.optim:
            raise ConfigError(
                "The 'optim' of TrainConfig must not be paged with fsdp_cpu_offload, which keeps all states in host memory. Got "
                f"'{self.optim}'. Set optim='{OPTIMIZERS[self.optim].plain}' (--optim)."
            )
        return self

    @model_validator(mode="after")
    def _options_of_preference_objectives(self) -> TrainConfig:
        objective, own = self.objective, PREFERENCE.get(self.objective, ())
        if own or objective == NEXT_TOKEN:
            for name in dict.fromkeys(name for names in PREFERENCE.values() for name in names):
                if name not in own and getattr(self, name) != type(self).model_fields[name].default:
                    users = " or ".join(each for each, names in PREFERENCE.items() if name in names)
                    raise ConfigError(f"The '{name}' of TrainConfig is for objective {users}. Got '{objective}'. Leave it out.")
        if not own:
            return self
        if self.packing:
            raise ConfigError(f"The 'packing' of TrainConfig cannot be done with objective '{objective}'. Leave it out.")
        if self.parallel == "fsdp":
            raise ConfigError(f"Objective '{objective}' does not run on shards (parallel 'fsdp'). Use --parallel ddp.")
        if self.router_aux_loss_coef:
            raise ConfigError(f"The 'router_aux_loss_coef' of TrainConfig is not for objective '{objective}'. Leave it out.")
        losses = DPO_LOSSES if objective == "dpo" else KTO_LOSSES
        if self.loss_type is not None and self.loss_type not in losses:
            raise ConfigError(
                f"The 'loss_type' of TrainConfig with objective '{objective}' must be one of {', '.join(losses)}. Got "
                f"'{self.loss_type}'."
            )
        if (self.label_smoothing > 0) != (self.loss_type in SMOOTHED) and (self.label_smoothing or self.loss_type == "exo_pair"):
            raise ConfigError(
                "The 'label_smoothing' of TrainConfig goes with loss_type robust or exo_pair, and exo_pair needs it. Got "
                f"{self.label_smoothing:g} with {self.loss_type or 'sigmoid'}."
            )
        return self
