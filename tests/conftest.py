"""Tiny models of several families, the marks that follow from a test's fixtures, what is left out of a run, and the third-party
warnings that a comparison with peers cannot avoid."""

import atexit
import copy
import gc
import importlib
import importlib.util
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import surroundings  # noqa: F401 - before anything imports torch
import torch
import triton_interpreter  # noqa: F401 - before anything imports triton
from forked import Forked, server
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import lownibble as ln
from lownibble.kernels import cpu, ops, proven

if importlib.util.find_spec("hypothesis"):  # not on a machine that runs the tests marked gpu only
    hypothesis = importlib.import_module("hypothesis")
    patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("busy", **patient)  # beside other work each example takes its time
    hypothesis.settings.load_profile("busy")

TINY = {
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_config(family: str = "llama", **options):
    """A configuration of a few thousand parameters; odd sizes, so that blocks run on over row ends."""
    extra = {"head_dim": 8} if family in ("gemma2", "mistral") else {}
    return AutoConfig.for_model(family, **{**TINY, **extra, **options})


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """A random model: every parameter random, biases too (transformers starts them at zero), and logits of order 1."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **options)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model


def tiny_batch(seed: int = 0, rows: int = 2, length: int = 9):
    """(input_ids, attention_mask, labels): the second row padded on the right, a few prompt positions without label."""
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1:, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return ids, mask, labels


PEFT_WARNINGS = [
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
]
"""What PEFT 0.21 says about itself or about choices that its files are compared on."""


def pytest_collection_modifyitems(items):
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "peft" in fixtures:
            for warning in PEFT_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
        if fixtures & {"peft", "bitsandbytes"}:
            item.add_marker(pytest.mark.peer)
        if "browser" in fixtures:
            item.add_marker(pytest.mark.browser)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)  # what is left to share out at the end takes seconds


IMPORTED = pytest.StashKey[int]()
"""How many modules there were when the garbage collector last froze what there is."""


def _freeze(config):
    """What was collected and imported is not looked through again by each `gc.collect()` of each run. That was more than half of
    the time of training's tests once one of them had compiled layers, which imports as much as everything before it."""
    if len(sys.modules) != config.stash.get(IMPORTED, 0):
        gc.collect()
        gc.freeze()
        config.stash[IMPORTED] = len(sys.modules)


atexit.register(gc.unfreeze)  # else triton 3.9 tells at the end that its objects are left


def pytest_collection_finish(session):
    _freeze(session.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After a test, whose own fixtures are gone."""
    done = yield
    _freeze(item.config)
    return done


LEFT_OUT = pytest.StashKey[Counter]()
"""Reason -> how many tests were left out without being skipped. pytest-xdist's workers collect, and send it when they end."""


def pytest_configure(config):
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items):
    for item in items:
        options = item.config.option
        asked = " ".join(f"{flag} '{value}'" for flag, value in (("-m", options.markexpr), ("-k", options.keyword)) if value)
        item.config.stash[LEFT_OUT][getattr(item, "left_out", f"not asked for: {asked}")] += 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))  # all workers collect alike


def pytest_terminal_summary(terminalreporter, config):
    """Nothing is left out in silence: tests that were not asked for, and kernels that this machine has not."""
    for reason, count in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"LEFT OUT [{count}] {reason}")
    status = ops.backend_status()
    isas = cpu.available_isas() if status["cpu"] == "ok" else []
    absent = [f"cpu-{isa}" for isa in ("scalar", "avx2", "avx512", "neon") if isa not in isas]
    absent += [f"{name} ({reason})" for name, reason in status.items() if reason != "ok"]
    terminalreporter.write_line(f"Kernels that cannot run here, so without cases: {', '.join(absent) or 'none'}")


@pytest.fixture(autouse=True)
def no_kernel_was_replaced():
    """On a card a kernel that fails is replaced by plain torch, with which its test would pass."""
    yield
    replaced = proven.words()
    proven.refused.clear()
    proven.calls.clear()
    assert not replaced, replaced


@pytest.fixture
def forked(monkeypatch):
    """Processes of this Python are forked from one that has imported what they would import (`forked.py`)."""
    if sys.platform == "linux":
        server()
        monkeypatch.setattr(subprocess, "Popen", Forked)


@pytest.fixture
def one_thread():
    """On tiny tensors more threads only wait for each other, and each has scratch of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(one_thread):
    """The builder `tiny_model`."""
    return tiny_model


@pytest.fixture
def batch():
    """The builder `tiny_batch`."""
    return tiny_batch


@pytest.fixture
def clone():
    """A copy of a model that shares nothing with it."""
    return copy.deepcopy


@pytest.fixture(scope="session")
def _peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: _import(name) for name in ("peft", "bitsandbytes")}


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@pytest.fixture
def peft(_peers):
    """PEFT, or a skip."""
    if _peers["peft"] is None:
        pytest.skip("peft is not installed")
    return _peers["peft"]


@pytest.fixture
def bitsandbytes(_peers):
    """bitsandbytes, or a skip."""
    if _peers["bitsandbytes"] is None:
        pytest.skip("bitsandbytes is not installed")
    return _peers["bitsandbytes"]


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of the tiny models' 96 words."""
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(92))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def write(tiny, tokenizer, tmp_path):
    """Writes a tiny model's folder in hub layout and returns it: `write(family, shards=True, **options)`."""

    def _write(family="llama", *, shards=False, name="model", **options):
        folder = tmp_path / name
        tiny(family, **options).save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
        tokenizer.save_pretrained(folder)
        return folder

    return _write


@pytest.fixture
def adapt(tmp_path):
    """`adapt(folder, quant, **lora)`: (live model with a random adapter, the adapter's folder)."""

    def _adapt(folder, quant="nf4", name="adapter", size=1.0, **lora):
        model, _ = ln.load(str(folder), quant=quant)
        ln.add_lora(model, ln.LoraConfig(**{"r": 4, "init_lora_weights": False, **lora}), seed=3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in key:
                    parameter += size * 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
        ln.save_adapter(model, tmp_path / name)
        return model.eval(), tmp_path / name

    return _adapt
