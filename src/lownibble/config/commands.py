"""The options of each command, made of the groups."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Field, model_validator

from lownibble.config.groups import CORRECT, KEEP_THEIR_START, PER_LAYER, DataConfig, LoraConfig, QuantConfig, TrainConfig
from lownibble.config.methods import Method, method_named
from lownibble.errors import ConfigError
from lownibble.options import Known, Options, Size
from lownibble.registry import CODECS


def _path_means_data(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Data = Annotated[DataConfig, BeforeValidator(_path_means_data, json_schema_input_type=DataConfig | str)]
"""A data set with its options, or its path alone."""


class _Model(Options):
    """Options shared by every run and plan: the model and how it is adapted and trained."""

    model: str = Field("demo", description="'demo', a local folder, a .gguf file or a hub id")
    revision: str | None = Field(None, description="hub revision of the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of unquantised weights and activations; auto: bfloat16 on CUDA, float32 on a CPU"
    )
    quant: QuantConfig = QuantConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _loraplus_has_adapters(self) -> _Model:
        methods = getattr(self, "methods", None) or [getattr(self, "method", None)]
        if self.train.loraplus_lr_ratio is not None and "full" in methods:
            raise ConfigError(FOR_ADAPTERS.format("method 'full'", "use lora or qlora"))
        return self


FOR_ADAPTERS = "The 'loraplus_lr_ratio' of TrainConfig is for adapters. Got {}. Leave it out, or {}."


def _check_merge_aware(config: RunConfig | PlanConfig) -> None:
    if not config.merge_aware:
        return
    compute, dropout, start = config.quant.compute, config.lora.lora_dropout, config.lora.init_lora_weights
    changes_base = start != "auto" and start in (*CORRECT, *KEEP_THEIR_START)
    packs = "is of several" if config.method == "all" else "packs nothing"
    for wrong, what, remedy in (
        (config.method != "qlora", f"with method '{config.method}', which {packs}", "Use method qlora"),
        (compute in ("int8", "fp8"), f"with compute '{compute}': its products are exact", "Leave compute out"),
        (dropout > 0, f"with lora_dropout {dropout:g}: base and adapter are one weight", "Set lora_dropout=0"),
        (changes_base, f"with init_lora_weights '{start}', which corrects or changes packed weights", "Leave that out"),
    ):
        if wrong:
            name = type(config).__name__
            raise ConfigError(f"The 'merge_aware' of {name} cannot be done {what}. {remedy}, or leave merge_aware out.")


class _Subject(_Model):
    """Options shared by every run in addition: the device and the data."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    data: Data = DataConfig()


class RunConfig(_Subject):
    """One training run (`lownibble train`)."""

    method: Method = Field("qlora", description="full, lora (16/32-bit base) or qlora (quantised base)")
    adapter: str | None = Field(
        None, description="folder of an adapter to train on from; its own configuration holds, so leave the lora options out"
    )
    merge_aware: bool = Field(
        False,
        description="train the model that 'merge' packs: layers compute with base and adapter packed as the quant options say; "
        "the base is held in int8 until then",
    )

    @model_validator(mode="after")
    def _merging_has_something_to_round(self) -> RunConfig:
        _check_merge_aware(self)
        return self

    @model_validator(mode="after")
    def _an_adapter_brings_its_options(self) -> RunConfig:
        if self.adapter is not None and self.method == "full":
            raise ConfigError("The 'adapter' of RunConfig cannot be trained with method 'full'. Use lora or qlora.")
        if self.adapter is not None and self.lora != LoraConfig():
            raise ConfigError(f"The adapter '{self.adapter}' has its own configuration. Leave the lora options out.")
        return self


COMPARE_TRAIN = TrainConfig(
    max_steps=48, batch_size=16, learning_rate=5e-4, warmup_ratio=0.1, max_length=128, group_by_length=True, eval_steps=24
)  # fmt: skip
"""Training defaults of `compare`: minutes on two cores with the embedded model."""


class CompareConfig(_Subject):
    """The same model and data with several methods, side by side (`lownibble compare`)."""

    methods: list[str] = Field(
        ["lora", "qlora"], min_length=1,
        description="methods to compare, in this order: full, lora, qlora, and with '+' what changes them, e.g. lora+dora, "
        "qlora+int3+gptq+qera, qlora+merge-aware",
    )  # fmt: skip
    seeds: Annotated[int, Ge(1)] = Field(
        1, description="seeds that each method is trained with, from 'seed' on; with two or more, differences have intervals"
    )
    data: Data = DataConfig(max_eval_rows=256)
    train: TrainConfig = COMPARE_TRAIN

    @model_validator(mode="after")
    def _methods_are_known(self) -> CompareConfig:
        for method in self.methods:
            method_named(method)
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"The 'methods' of CompareConfig must be distinct. Got {self.methods}.")
        return self


class PlanConfig(_Model):
    """Requirements of a run, estimated before it is run (`lownibble plan`). Of grouped options, those in `PLANNED` matter."""

    method: Literal["full", "lora", "qlora", "all"] = Field("all", description="full, lora, qlora, or all of them")
    gpu: str = Field(
        "all",
        description="devices, separated by commas (rtx-4090,a100-80gb), 'all', 'cpu' (this machine), or one by its figures: "
        "'memory=24,bandwidth=1000,tflops=165' (GiB, GB/s, TFLOP/s)",
    )
    merge_aware: bool = Field(
        False,
        description="merge-aware training: the base held in int8, beside what layers compute with, as the quant options say",
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the adapters, their gradients and optimiser states; Lownibble trains in float32"
    )
    tokens: Annotated[int, Ge(1)] | None = Field(None, description="tokens to train on, for hours and dollars")
    data: Data = DataConfig(path="none")
    records: str | None = Field(
        None, description="folder with records of 'compare', which the recommendation goes by; default: runs, if it is there"
    )
    price: Annotated[float, Ge(0)] | None = Field(
        None, description="dollars an hour of a device; default: what the table of devices has"
    )
    gpus: list[Annotated[int, Ge(1)]] = Field(
        [], description="numbers of GPUs to train on, e.g. 2,4,8: what each card needs, speed and cost of all; default: one GPU"
    )
    gpus_per_node: Annotated[int, Ge(1)] = Field(8, description="with gpus: more of them than this talk over the network")
    link_gb_per_s: Annotated[float, Gt(0)] | None = Field(
        None, description="with gpus: GB/s that each sends to the next at; default: what the table of devices has"
    )

    @model_validator(mode="after")
    def _merging_has_something_to_round(self) -> PlanConfig:
        _check_merge_aware(self)
        return self


PACKED = (*PER_LAYER, "skip_modules", "pattern")
"""Codec options that decide what is stored; `compute` does not."""


class EvalConfig(_Subject):
    """Evaluation of a model on a task, or on tasks of lm-eval (`lownibble eval`)."""

    adapter: str | None = Field(None, description="folder of an adapter to put on the model")
    any_base: bool = Field(False, description="also where the adapter was trained on other weights than the model's")
    task: str | None = Field(None, description="kind of task that the evaluation rows of --data are: classification, nli, ...")
    harness: list[str] = Field([], description="tasks of lm-eval instead (extra 'harness'), e.g. hellaswag,arc_easy")
    harness_path: str | None = Field(None, description="folder with task files of your own for --harness")
    limit: Annotated[int, Ge(1)] | None = Field(None, description="rows of each --harness task; default: all")
    num_fewshot: Annotated[int, Ge(0)] | None = Field(
        None, description="examples in the prompt of --harness; default: the task's"
    )
    quantized: bool = Field(False, description="hold the base in 4 bits, as the quant options say")


class RowsConfig(Options):
    """Rows as a model will see them (`lownibble data`)."""

    model: str = Field("demo", description="whose tokenizer and chat template: 'demo', a model folder, a .gguf file or a hub id")
    revision: str | None = Field(None, description="hub revision of the model")
    rows: Annotated[int, Ge(0)] = Field(3, description="rows to show")
    data: Data = DataConfig()
    train: TrainConfig = TrainConfig()


class MergeConfig(Options):
    """Merging an adapter into its base's weights (`lownibble merge`)."""

    adapter: str = Field(description="folder of the adapter")
    output: str = Field(description="folder for the merged model; must not hold anything yet")
    onto: Literal["auto", "dequantized", "original"] | Annotated[str, Known(CODECS)] = Field(
        "auto",
        description="what the adapter is added to: 'dequantized', the decoded weights it was trained on; 'original', the dense "
        "weights; or the codec's name ('nf4', 'int4', ...), the result packed again (refused where that loses the fine-tuning "
        "gain); 'auto', what is best",
    )
    base: str | None = Field(None, description="the base model; default: the one that the adapter names")
    revision: str | None = Field(None, description="hub revision of the base; default: the one that the adapter names")
    trained_on: Literal["dense", "quantized"] | None = Field(
        None,
        description="how the base was stored in training, where the adapter does not say; quantized: as the quant options say",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the merged weights; auto: that of each tensor of the base"
    )
    any_base: bool = Field(False, description="also onto weights that the adapter was not trained on")
    force: bool = Field(False, description="write a merge that loses much of the fine-tuning gain, or that was not measured")
    measure_tokens: Annotated[int, Ge(0)] = Field(
        2048, description="tokens of held-out text to compare merged models with the unmerged adapter on; 0: do not measure"
    )
    max_length: Annotated[int, Ge(2)] = Field(512, description="tokens in a row of that text; longer rows are cut")
    data: Data = DataConfig(path="run")
    quant: QuantConfig = QuantConfig()


def _without_gguf_names(value: Any) -> Any:
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    return names.get(value.lower(), value.lower()) if isinstance(value, str) else value


_OR_GGUF_NAMES = BeforeValidator(
    _without_gguf_names,
    json_schema_input_type=Literal["auto", "float32", "bfloat16", "float16", "q8_0", "f32", "f16", "bf16"],
)


class ExportConfig(Options):
    """Export of weights to another format (`lownibble export`)."""

    source: str = Field(description="a model ('demo', a folder, a .gguf file, a hub id) or an adapter (a folder, a .gguf file)")
    output: str = Field(description="folder to make; for gguf the file")
    format: Literal["safetensors", "bnb-4bit", "gguf", "peft", "peft-per-expert", "ollama", "vllm"] = Field(
        "gguf",
        description="'safetensors', dense, for transformers; 'bnb-4bit', packed, for transformers with bitsandbytes; 'gguf', for "
        "llama.cpp, of a model or an adapter; 'peft', of an adapter; 'peft-per-expert', of an adapter of a mixture, with experts "
        "one by one, for servers; 'ollama' and 'vllm', folders that these serve",
    )
    base: str | None = Field(None, description="of an adapter: its base; default: the one that the adapter names")
    revision: str | None = Field(None, description="hub revision of the model")
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "q8_0"], _OR_GGUF_NAMES] = Field(
        "auto",
        description="type of dense matrices (f32, f16 and bf16 do too); auto: gguf float16, else what they are stored in; q8_0: "
        "gguf only",
    )
    force: bool = Field(False, description="pack a merged model into 4 bits also where that loses much of its tune")
    quant: QuantConfig = QuantConfig()


class QuantizeConfig(Options):
    """Packing of a model into a checkpoint (`lownibble quantize`)."""

    model: str = Field("demo", description="'demo', a local folder, a .gguf file or a hub id; dense")
    output: str = Field(description="folder to make")
    revision: str | None = Field(None, description="hub revision of the model")
    rounding: Literal["rtn", "gptq"] = Field(
        "gptq",
        description="'rtn' rounds each weight to nearest; 'gptq' makes up for each column's error in the others, over "
        "calibration rows",
        json_schema_extra={"flag": "method"},
    )
    format: Literal["auto", "bnb-4bit", "compressed-tensors", "gptq", "lownibble"] = Field(
        "auto",
        description="layout of the checkpoint: 'bnb-4bit' (nf4, fp4), 'compressed-tensors' (int2 to int8, fp8, mxfp4), "
        "'gptq' (int2 to int8), 'lownibble', its own, of any codec; 'auto': the first of these that holds all layers",
    )
    bits: Annotated[float, Gt(0)] | None = Field(
        None,
        description="bits a weight in the mean, constants included: each layer gets the codec of quant_type's family (nf2, nf3, "
        "nf4, int8, or int2, int3, int4, int8) with which the loss rises least",
    )
    calibration: str = Field(
        "demo", description="rows for gptq: 'demo', a file, a folder or a hub data set id; like those in use"
    )
    calibration_tokens: Annotated[int, Ge(256)] = Field(65536, description="tokens of them that are used")
    max_length: Annotated[int, Ge(2)] = Field(512, description="tokens in a calibration row, which are joined without padding")
    seed: Annotated[int, Ge(0), Lt(2**32)] = Field(0, description="seed of the rows' order")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    quant: QuantConfig = QuantConfig()

    @model_validator(mode="after")
    def _bits_choose_the_codecs(self) -> QuantizeConfig:
        named = [key for key, options in self.quant.pattern.items() if "quant_type" in options]
        if self.bits is not None and named:
            raise ConfigError(
                f"The 'bits' of QuantizeConfig choose each layer's codec. Got a pattern with quant_type for {', '.join(named)}. "
                "Leave quant_type out of it, or bits."
            )
        return self

    @model_validator(mode="after")
    def _no_rows_for_rounding_to_nearest(self) -> QuantizeConfig:
        if self.rounding != "rtn" or self.bits is not None:
            return self
        given = sorted(self.model_fields_set & {"calibration", "calibration_tokens", "max_length", "seed"})
        given += ["device"] * (self.device not in ("auto", "cpu"))
        if given:
            raise ConfigError(
                f"Rounding to nearest ('rtn') reads no calibration rows, and is done on the CPU. Got {', '.join(given)}. Leave "
                "that out, or use --method gptq."
            )
        return self


class PushConfig(Options):
    """Upload of an adapter or a model to the hub (`lownibble push`)."""

    source: str = Field(description="a run's output folder, or the folder of an adapter or a model")
    repo: str = Field(description="id of the repository on the hub: owner/name, or a name of your own")
    base: str | None = Field(None, description="hub id of the base model; default: the one that the adapter or model names")
    public: bool = Field(False, description="make the repository public; one that is there keeps its visibility")
    dry_run: bool = Field(False, description="write the card into the folder, and upload nothing")


class ServeConfig(Options):
    """Serving one quantised base and a folder of adapters with an OpenAI-compatible API (`lownibble serve`)."""

    model: str = Field("demo", description="the base: 'demo', a model folder, a .gguf file, or a hub id")
    adapters: str | None = Field(None, description="folder whose sub-folders are adapters, by name")
    revision: str | None = Field(None, description="hub revision of the model")
    host: str = Field("127.0.0.1", description="address to listen on; any but a loopback one needs --api-key")
    port: Annotated[int, Ge(0), Le(65535)] = Field(8000, description="port to listen on; 0: any that is free")
    api_key: str | None = Field(None, description="key that clients must send; better in the environment: LOWNIBBLE_API_KEY")
    admin_key: str | None = Field(
        None, description="key for loading and unloading adapters, LOWNIBBLE_ADMIN_KEY; default: the clients' key"
    )
    max_batch: Annotated[int, Ge(1), Le(1024)] = Field(16, description="requests that run at the same time")
    max_context: Annotated[int, Ge(16)] = Field(1024, description="tokens of a request, prompt and answer")
    max_queue: Annotated[int, Ge(0)] = Field(256, description="requests that may wait; more are answered with 429")
    max_requests: Annotated[int, Ge(1)] = Field(1024, description="requests in progress, those being sent or read too")
    max_body: Size = Field("1MB", description="largest body of a request")
    max_prompt: Annotated[int, Ge(1)] | None = Field(None, description="tokens of a prompt; default: what the context holds")
    max_output: Annotated[int, Ge(1)] | None = Field(None, description="tokens of an answer; default: what the context holds")
    max_rank: Annotated[int, Ge(1)] = Field(256, description="largest rank of an adapter")
    max_adapter: Size | None = Field(None, description="largest adapter, in memory; default: the budget of all")
    adapter_dtype: Literal["float16", "float32"] = Field("float16", description="what adapters are held in; sums are in float32")
    adapter_budget: Size = Field("1GB", description="memory for adapters")
    cache_budget: Size = Field("1GB", description="memory for keys and values, and on CUDA for drawing tokens")
    preload: bool = Field(False, description="read adapters before the first request, while the budget lasts")
    any_base: bool = Field(False, description="also adapters that were trained on other weights than the model's")
    drain_seconds: Annotated[float, Ge(0)] = Field(30.0, description="time that requests have to end after SIGTERM")
    quant: QuantConfig = QuantConfig()


class StudioConfig(Options):
    """The page that plans, starts and watches all of it (`lownibble studio`)."""

    folder: str = Field("runs", description="folder of the runs, of uploads, and of the notes on started jobs")
    host: str = Field("127.0.0.1", description="address to listen on; any but a loopback one needs --api-key")
    port: Annotated[int, Ge(0), Le(65535)] = Field(8100, description="port to listen on; 0: any that is free")
    api_key: str | None = Field(None, description="key that the page asks for; better in the environment: LOWNIBBLE_API_KEY")
