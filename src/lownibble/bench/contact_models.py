"""Checks of `bench contact`: training steps, memory, decoding and serving of tiny models, each against a plainer way.

Models are random, with weights so large that what precedes a token decides what follows it. Training is compared by losses and
gradients, decoding by logits: tokens are given, since two ways of rounding soon choose different ones.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lownibble.bench.contact_kernels import SUMS_16, Contact, SkippedError
from lownibble.bench.subject import random_ids, write_tokenizer
from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.data import Example, collate, flatten
from lownibble.decoding import Drawer, How, choose
from lownibble.decoding.modules import ModulesDecoder
from lownibble.kernels import ops
from lownibble.kernels.decoder import Adapter, LowRank, Segment
from lownibble.lora import add_lora, save_adapter, set_adapter
from lownibble.memory import usage
from lownibble.models import compute, load
from lownibble.models.attention import segment_attention
from lownibble.models.info import compute_again, info
from lownibble.quant import QuantLinear
from lownibble.serve.engine import Engine
from lownibble.serve.registry import Registry
from lownibble.serve.request import Failed, Piece, Request, Scored
from lownibble.training.compiling import Compiled, torchs_own_warnings_off
from lownibble.training.events import Stepped
from lownibble.training.loop import Trainer
from lownibble.training.loss import label_loss
from lownibble.training.offload import Offloaded, obstacle

VOCABULARY, WINDOW = 512, 16
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 64}
FAMILIES = {"llama": {}, "gemma3_text": WINDOWED}
ROUNDED = 0.1
"""Largest difference of gradients and of logits, of the largest one: bfloat16 rounds each of dozens of steps to 2^-8, which comes
to 0.01 to 0.04 on a CPU. What is computed with another token, adapter or position differs by half and more."""


def folder_of(at: Contact, family: str = "llama", **options: Any) -> str:
    """The folder of a random model in the type that the device computes in; written once."""
    folder = at.folder / "-".join([family, *map(str, options.values())])
    if not folder.exists():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **options}))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (2.0 if "embed" in name else 1.0) * 0.06 if parameter.ndim > 1 else 1 + 0.1 * noise)
        model.to(at.dtype).save_pretrained(folder)
        write_tokenizer(folder, VOCABULARY)
    return str(folder)


def adapted(
    at: Contact, how: Any = "exact", names: Sequence[str] = ("default",), folder: str | None = None, **lora: Any
) -> tuple[Any, Any]:
    """A packed model with random adapters, whose ranks differ by name, and its tokenizer."""
    quant = QuantConfig(compute=how)
    model, tokenizer = load(folder or folder_of(at), quant=quant, dtype=at.dtype, device=at.device.type)
    for number, name in enumerate(names):
        rank = 8 * (1 + 2 * number)
        add_lora(model, LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, **lora), name=name, seed=number)
    return model, tokenizer


Given = tuple[Tensor, Tensor, Tensor]
"""input_ids, attention_mask, labels."""


def batch(at: Contact, rows: int = 4, length: int = 48) -> Given:
    """Rows without padding."""
    ids = random_ids(VOCABULARY, 1, rows, length)[0].to(at.device)
    return ids, torch.ones_like(ids), ids


def gradients(model: Any, given: Given, inside: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
    """Loss and gradients of a step's pass."""
    model.train()
    model.zero_grad(set_to_none=True)
    with inside or nullcontext():
        loss = label_loss(model, *given)
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(at: Contact, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare losses and gradients."""
    at.true("as many gradients", len(expected) > 1 and found.keys() == expected.keys())
    for name, gradient in expected.items():
        at.near(name, found[name], gradient, tolerance)


def step(at: Contact) -> None:
    """A QLoRA pass on this device's kernels against the reference's."""
    model, given = adapted(at)[0], batch(at)
    found = gradients(model, given)
    with ops.use_backend("reference"):
        same(at, found, gradients(model, given), ROUNDED)


def compiled_step(at: Contact) -> None:
    """A compiled pass, with low-rank products joined, against the same one uncompiled."""
    model, given = adapted(at)[0], batch(at)
    expected = gradients(model, given)
    with torchs_own_warnings_off():
        same(at, gradients(model, given, Compiled(model, join=True)()), expected, ROUNDED)


def activated_step(at: Contact) -> None:
    """A compiled and joined pass with an adapter that is active from the middle of each row on, against the reference's."""
    model, given = adapted(at, alora_invocation_tokens=[3, 4])[0], batch(at)
    given[0][:, 20:22] = torch.tensor([3, 4], device=at.device)
    with ops.use_backend("reference"):
        expected = gradients(model, given)
    with torchs_own_warnings_off():
        same(at, gradients(model, given, Compiled(model, join=True)()), expected, ROUNDED)


def offload(at: Contact) -> None:
    """Checkpoints in pinned host memory against checkpoints on the device: the same bits."""
    model, given = adapted(at, folder=folder_of(at, num_hidden_layers=4))[0], batch(at, 16)
    if not at.on_cuda:
        raise SkippedError(obstacle(model, at.device))
    found = gradients(model, given, Offloaded(model, at.device)())
    compute_again(model)
    same(at, found, gradients(model, given), 0.0)


def packing(at: Contact) -> None:
    """Rows one after another, each attending to itself, against the same rows padded."""
    model, ids = adapted(at)[0], random_ids(VOCABULARY, 1, 5, 40)[0].tolist()
    rows = [Example(row[:n], [True] * n, "contact") for row, n in zip(ids, (40, 40, 23, 9, 2), strict=True)]
    padded, packed = collate(rows, 2).to(at.device), flatten(rows).to(at.device)
    expected = gradients(model, (padded.input_ids, padded.attention_mask, padded.labels))
    model.zero_grad(set_to_none=True)
    with segment_attention(model):
        loss = label_loss(model, packed.input_ids, packed.attention_mask, packed.labels, None, packed.segments)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(at, {"loss": loss.detach(), **found}, expected, ROUNDED)


def trainer_of(at: Contact, rows: int = 4, length: int = 48, **options: Any) -> Trainer:
    """A run that is set up."""
    model, tokenizer = adapted(at)
    data = [Example(row, [True] * length, "contact") for row in random_ids(VOCABULARY, 1, 2 * rows, length)[0].tolist()]
    config: dict[str, Any] = {
        "batch_size": rows,
        "max_length": length,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "torch_compile": False,
    }
    trainer = Trainer(model, tokenizer, data, data[:1], TrainConfig(**{**config, **options}))
    trainer.set_up()
    return trainer


def losses_of(trainer: Trainer) -> Tensor:
    """Losses of all steps."""
    steps, found = trainer.micro.steps(), []
    for number in range(trainer.total_steps):
        taken = trainer.step(number, next(steps))
        found.append(taken.loss if isinstance(taken, Stepped) else float("nan"))
    return torch.tensor(found)


def graphs(at: Contact) -> None:
    """Steps captured in CUDA graphs and replayed against steps without."""
    if not at.on_cuda:
        raise SkippedError("there are no CUDA graphs on a CPU")
    trainer = trainer_of(at, cuda_graphs=True)
    found = losses_of(trainer)
    captured = trainer.passes.graphs
    at.true("a pass is captured", captured is not None and not captured.obstacle and len(captured) > 0)
    at.near("losses", found, losses_of(trainer_of(at, cuda_graphs=False)), SUMS_16)


def budget(at: Contact) -> None:
    """A run within seven tenths of the memory that it would take, against the run that takes it."""
    if not at.on_cuda:
        raise SkippedError("a process's memory on a CPU is not an allocator's; tests have made-up memories")
    work = {"rows": 32, "length": 512, "cuda_graphs": False, "max_steps": 2}
    usage.settle(at.device)
    usage.reset_peak(at.device)
    expected = losses_of(trainer_of(at, **work))
    peak = usage.held_peak_bytes(at.device)
    usage.settle(at.device)
    usage.reset_peak(at.device)
    allowed = int(0.7 * peak / 1e6)
    try:
        trainer = trainer_of(at, **work, memory_budget=f"{allowed}MB")
        at.near("losses", losses_of(trainer), expected, SUMS_16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)  # which the budget had limited
    held = usage.held_peak_bytes(at.device)
    at.notes |= {"whole_bytes": peak, "budget_bytes": allowed * 10**6, "held_bytes": held, "max_tokens": trainer.fit.max_tokens}
    at.true("passes are smaller", trainer.fit.max_tokens is not None or bool(trainer.fit.gradient_checkpointing))
    at.true(f"{held} bytes are within {allowed} MB", held <= allowed * 10**6)


def automatic(at: Contact) -> None:
    """`compute="auto"`: all packed layers have one matmul precision, and compute with it as the reference does."""
    model, given = adapted(at, "auto")[0], batch(at)
    compute.decide(model, training=True)
    chosen = {module.compute for module in model.modules() if isinstance(module, QuantLinear)}
    at.notes["compute"] = told = info(model).compute
    at.true(f"all layers have one matmul precision ({chosen}; {told})", len(chosen) == 1)
    found = gradients(model, given)
    if chosen == {"exact"}:
        with ops.use_backend("reference"):
            same(at, found, gradients(model, given), ROUNDED)


def decoder_of(at: Contact, model: Any) -> Any:
    """The decoder of a model: on CUDA the one that is chosen; else as it is there, without graphs. A trial of the model may have
    turned it to slower passes."""
    model.eval()
    decoder = choose(model) if at.on_cuda else ModulesDecoder(model, "it stands in", static=True)
    at.notes["decoder"] = decoder.note
    _is_static(at, decoder)
    return decoder


def _is_static(at: Contact, decoder: Any) -> None:
    at.true(f"steps have fixed shapes ({decoder._not_static or decoder.note})", decoder.together and not decoder._not_static)


def decode(family: str, lengths: Sequence[int], names: Sequence[str | None], at: Contact) -> None:
    """Steps of a token of each row after prompts of these lengths, with an adapter of each row: their logits are those of the
    model's own pass over each sequence; on CUDA steps are captured and replayed."""
    adapters = sorted({name for name in names if name})
    model, _ = adapted(at, names=adapters, folder=folder_of(at, family))
    if adapters:
        set_adapter(model, None)
    decoder, steps = decoder_of(at, model), 6
    rows = [random_ids(VOCABULARY, 1, 1, n + steps)[0, 0] for n in lengths]
    held = [_adapter(model, decoder, name) for name in names]
    cache, found = decoder.cache(len(rows), 128), []
    for slot, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        decoder.prompt(row[:n], slot, cache, adapter=held[slot])
    for number in range(steps):
        tokens, slots = torch.stack([row[n + number] for row, n in zip(rows, lengths, strict=True)]), torch.arange(len(rows))
        segments = [Segment(row, row + 1, one) for row, one in enumerate(held) if one]
        with torch.inference_mode():
            found.append(decoder.step(tokens, slots, torch.tensor(lengths) + number, cache, segments=segments).clone())
    for slot, (row, name) in enumerate(zip(rows, names, strict=True)):
        if adapters:
            set_adapter(model, name)
        with torch.inference_mode(), ops.use_backend("reference"):
            expected = model(row.unsqueeze(0).to(at.device), use_cache=False).logits[0, -steps:]
        at.near(f"row {slot}, {name or 'no adapter'}", torch.stack([each[slot] for each in found]), expected, ROUNDED)
    _is_static(at, decoder)
    at.notes["graphs"] = captured = sum(graph is not None for graph in cache.steps._graphs.values())
    at.true(f"steps are captured ({cache.steps.obstacle})", captured > 0 or not at.on_cuda)


def _adapter(model: Any, decoder: Any, name: str | None) -> Adapter | None:
    """The branches of an adapter that the model carries, as a step takes them."""
    if name is None:
        return None
    layers = (model.get_submodule(path).adapters[name] for path in decoder.paths[0])
    return Adapter([[LowRank(low.lora_A.detach(), low.lora_B.detach(), low.scale) for low in layers]])


SAMPLED = (
    How(),
    How(temperature=1.0),
    How(temperature=0.7, top_p=0.9, top_k=40),
    How(temperature=1.3, min_p=0.05, presence_penalty=0.4, frequency_penalty=0.2, repetition_penalty=1.2),
)


def sampling(at: Contact) -> None:
    """Tokens drawn on the device against those drawn on the host with the same seeds: all kinds of requests in one step."""
    drawn = []
    for device in (at.device, torch.device("cpu")):
        drawer = Drawer(len(SAMPLED), VOCABULARY, device)
        for slot, how in enumerate(SAMPLED):
            drawer.begin(slot, how, [1, 2, 3], seed=slot)
        logits = [at.random(len(SAMPLED), VOCABULARY, seed=number).to(device) for number in range(8)]
        drawn.append(torch.stack([drawer(each, range(len(SAMPLED))).cpu() for each in logits]))
    at.near("tokens", drawn[0], drawn[1])
    at.true("tokens differ", len(set(drawn[0].flatten().tolist())) > 4)


def engine(at: Contact) -> None:
    """An engine of `serve` answers two requests at once, one with an adapter: its tokens have the model's largest logits."""
    model, tokenizer = adapted(at, names=["one"])
    adapters, new = at.folder / "adapters", 8
    save_adapter(model, adapters / "one", name="one")
    served, _ = load(folder_of(at), quant=QuantConfig(compute="exact"), dtype=at.dtype, device=at.device.type)
    decoder = decoder_of(at, served)
    made = Engine(
        decoder, tokenizer, Registry(decoder, Path(adapters), 10**8, dtype=torch.float32), max_batch=2, max_context=64,
        max_queue=4, cache_budget=10**8,
    )  # fmt: skip
    prompts, told = random_ids(VOCABULARY, 1, 2, 12)[0], [queue.Queue[Any](), queue.Queue[Any]()]
    names = (None, "one")
    requests = [
        Request(prompt.tolist(), new, each.put, adapter=name, ignore_eos=True)
        for prompt, each, name in zip(prompts, told, names, strict=True)
    ]
    try:
        made.submit(*requests)
        answers = [_tokens(each) for each in told]
    finally:
        made.close(0)
    _is_static(at, decoder)
    model.eval()
    for prompt, answer, name in zip(prompts, answers, names, strict=True):
        at.true(f"{new} tokens", len(answer) == new)
        set_adapter(model, name)
        ids = torch.cat([prompt, torch.tensor(answer)]).unsqueeze(0).to(at.device)
        with torch.inference_mode(), ops.use_backend("reference"):
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        at.near(f"the largest logits, {name or 'no adapter'}", chosen, logits.amax(1), ROUNDED)


def _tokens(told: queue.Queue[Any]) -> list[int]:
    """The tokens of an answer, when it has ended."""
    found = []
    while True:
        event = told.get(timeout=60)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Piece):
            found += [event.token.token] if event.token else []
        elif not isinstance(event, Scored):
            return found


MODELS: dict[str, Callable[[Contact], None]] = {
    "step": step,
    "compute-auto": automatic,
    "packing": packing,
    "offload": offload,
    "decode-one": partial(decode, "llama", (9,), (None,)),
    "decode-batch": partial(decode, "llama", (3, 20, 9), (None, None, None)),
    "decode-adapters": partial(decode, "llama", (3, 20, 9, 5), ("one", None, "two", "one")),
    "decode-windows": partial(decode, "gemma3_text", (3 * WINDOW, 4), (None, None)),
    "sampling": sampling,
    "engine": engine,
    "graphs": graphs,
    "budget": budget,
    "compiled-step": compiled_step,
    "activated-step": activated_step,
}
"""Name -> check; on a CPU they run on the compiled kernels."""
