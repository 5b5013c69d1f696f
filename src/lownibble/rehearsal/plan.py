"""`lownibble plan` for any model that transformers knows.

A model whose family the planner knows is planned on its tape, in a fraction of a second and without torch. Any other is built by
transformers on fake tensors, and its real training step is traced (`trace.py`): the same plan, after some seconds for each
method. What could not be trained is refused here, too, by the same words: training compares logits, and without values it can
still be seen whether the head reads the body's output and whether anything comes after it (`models.head.check_head_unseen`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lownibble.arch import Counts, ModelShape, is_known
from lownibble.config import METHODS, Checkpointing, LoraConfig, Method, PlanConfig, QuantConfig
from lownibble.errors import ConfigError, InputError, ModelError
from lownibble.planning.memory import PASS_UNKNOWN, needs_pass
from lownibble.planning.models import find_config
from lownibble.planning.plan import Plan, as_stored, configured
from lownibble.planning.plan import plan as of_family

if TYPE_CHECKING:
    from lownibble.planning.linear import Runtime
    from lownibble.planning.step import Batch
    from lownibble.planning.tape import Tape

Tell = Callable[[str], None]
"""Progress callback."""


def plan(model: str | PlanConfig = "demo", *, exact: bool = False, tell: Tell = lambda _: None, **options: Any) -> Plan:
    """Plan a training run.

    Args:
        model: 'demo', a bundled model, a config.json, a model folder or a hub id; or the whole configuration.
        exact: trace the step of a known family, too.
        tell: called with a line of text before each step is traced.
        options: of `PlanConfig` (gpu, method, tokens, price, dtype), or of its groups by their own names (max_length=512).
    Raises:
        ConfigError, ModelError, TargetError: an invalid request, or a model that cannot be trained; says why.
    """
    config = configured(model, options)
    if not traces(config, exact=exact):
        return of_family(config)
    contents = find_config(config.model)
    _check_no_pass(config)
    from lownibble.rehearsal.trace import exact_step

    if is_known(contents):
        config, _ = as_stored(config)
        return of_family(config, step=exact_step(contents, config.quant, config.lora))
    tell("building the model on fake tensors")
    built = _Built(contents, config.model, config.lora, config.quant)
    shape = built.shape
    config, _ = as_stored(config, shape)
    built.quant = config.quant
    step = _Steps(exact_step(contents, config.quant, config.lora), built, tell)
    refused = {m: why for m in METHODS if config.method in ("all", m) and (why := built.refusal(m))}
    while True:
        try:
            return of_family(config, step=step, shape=shape, refused=refused)
        except _CannotBeTracedError as error:
            if config.method != "all":
                raise
            refused[error.method] = error.why


def traces(config: PlanConfig, *, exact: bool) -> bool:
    """Whether steps are traced for the plan of a configuration.

    Raises:
        ModelError: there is no such model.
    """
    return exact or not is_known(find_config(config.model))


def _check_no_pass(config: PlanConfig) -> None:
    """Refuse starts whose calibration pass would have to be traced, before a step is.

    Raises:
        ConfigError: it is one, for a method that runs the pass.
    """
    init, methods = str(config.lora.init_lora_weights), METHODS if config.method == "all" else (config.method,)
    if any(needs_pass(method, init) for method in methods):
        raise ConfigError(PASS_UNKNOWN.format(init))


class _CannotBeTracedError(ModelError):
    """A step that does not run without values."""

    def __init__(self, name: str, method: Method, why: str) -> None:
        super().__init__(f"'{name}' cannot be planned: {why}")
        self.method: Method = method
        self.why = why


@dataclass
class _Built:
    """A model that transformers builds from the contents of a config.json, on fake tensors."""

    contents: Mapping[str, Any]
    name: str
    lora: LoraConfig
    quant: QuantConfig

    @cached_property
    def shape(self) -> ModelShape:
        """Its sizes, counted."""
        import torch

        from lownibble.lora import add_lora
        from lownibble.lora.activated import for_shapes
        from lownibble.models.experts import number_in
        from lownibble.models.skeleton import empty_model
        from lownibble.quant import is_linear, matrix

        try:
            model = empty_model(self.contents, torch.float32)
        except ModelError as error:
            raise ModelError(f"'{self.name}': {error}") from None
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        parameters = tuple(p.numel() for p in model.parameters())
        linears = {path: matrix(m) for path, m in model.named_modules() if is_linear(m) and m is not head}
        rows = {path: int(weight.shape[1]) for path, weight in linears.items()}
        linear = sum(weight.numel() for weight in linears.values())
        experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
        every = number_in(config)
        active = min(every, _of(config, "num_experts_per_tok", "top_k", "moe_topk"))

        def passed(n: int) -> int:
            """Of n elements of all experts, those that a token passes through."""
            return n * active // every if every else n

        add_lora(model, for_shapes(self.lora))
        trained = [p for p in model.parameters() if p.requires_grad]
        adapters, of_experts = tuple(p.numel() for p in trained), sum(p.numel() for p in trained if p.ndim == 3)
        embeddings = model.get_input_embeddings().weight
        heads = _of(config, "num_attention_heads")
        return ModelShape(
            self.name, str(self.contents.get("model_type")), layers=_of(config, "num_hidden_layers"),
            hidden=int(embeddings.shape[1]), ffn=0, heads=heads, key_heads=heads,
            head_dim=_of(config, "head_dim") or (_of(config, "hidden_size") // heads if heads else 0),
            vocab=int(embeddings.shape[0]), tied=False, linears=(), activation="", rotary_dim=0,
            counts=Counts(parameters, linear, passed(experts), adapters, sum(adapters) - of_experts + passed(of_experts), rows),
        )  # fmt: skip

    def refusal(self, method: Method) -> str:
        """Why it cannot be trained by a method, or ''."""
        from lownibble.rehearsal.trace import check

        try:
            check(self.contents, self.quant if method == "qlora" else None)
        except InputError as error:
            return str(error)
        except Exception as error:  # of the model's own code
            return _cannot(method, error)
        return ""


def _of(config: Any, *names: str) -> int:
    """The first of these sizes that a configuration has, or 0."""
    held = vars(config)  # attributes may raise where layers differ
    found = (held.get(config.attribute_map.get(name, name)) for name in names)
    return int(next((value for value in found if isinstance(value, int)), 0))


def _cannot(method: Method, error: Exception) -> str:
    first = str(error).partition("\n")[0]
    packed = " with these layers packed" if method == "qlora" else ""
    return f"its step cannot be traced without values{packed} ({type(error).__name__}: {first})."


@dataclass
class _Steps:
    """Traced steps, each made once: options of the optimiser do not change them."""

    trace: Any
    built: _Built
    tell: Tell

    def __post_init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tape] = {}

    def __call__(self, method: Method, run: Runtime, batch: Batch, checkpointing: Checkpointing, passes: int) -> Tape:
        key = (method, run, batch, checkpointing, passes)
        if key not in self._made:
            more = ", checkpoints offloaded" if checkpointing == "offload" else ", checkpointed" if checkpointing else ""
            self.tell(f"tracing {method}: {batch.rows} x {batch.length} tokens{more}")
            try:
                self._made[key] = self.trace(method, run, batch, checkpointing, passes)
            except InputError:
                raise
            except Exception as error:
                raise _CannotBeTracedError(self.built.name, method, _cannot(method, error)) from error
        return self._made[key].copy()
