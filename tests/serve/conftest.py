import queue
import shutil
import threading
import time

import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import lownibble as ln
from lownibble.config import ServeConfig
from lownibble.decoding import choose
from lownibble.serve.engine import Engine
from lownibble.serve.http import app
from lownibble.serve.registry import Registry
from lownibble.serve.request import Piece, Request
from lownibble.serve.server import make_service

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def base(write, tokenizer):
    """A tiny model's folder whose tokenizer has a chat template."""
    folder = write("llama", max_position_embeddings=2048)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


CHATML = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{{ hint }}"
)


@pytest.fixture
def bytes_base(write):
    """A tiny model's folder whose tokenizer knows every text: byte-level, with ChatML and Hermes' calls of tools."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "[TOOL_CALLS]", "<|eot_id|>", "<|eom_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(["user assistant system", '{"name": "weather", "arguments": {"city": "Paris"}}'] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = CHATML
    folder = write("llama", name="bytes", vocab_size=416, max_position_embeddings=2048)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(base, adapt, tmp_path):
    """A folder of adapters of `base`: 'one' and 'two', of unlike ranks and targets, 'three' like 'one' with other values."""
    folder = tmp_path / "adapters"
    options = {
        "one": {"target_modules": "all-linear"}, "two": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        "three": {"target_modules": "all-linear"},
    }  # fmt: skip
    for name, lora in options.items():
        made = adapt(base, "nf4", name=name, size=4.0 if name == "three" else 2.0, **lora)[1]
        folder.mkdir(exist_ok=True)
        shutil.move(made, folder / name)
    return folder


@pytest.fixture
def engine(base, adapters):
    """`engine(**options)`: an engine on the tiny model with those adapters, exact ones; closed in the end."""
    made = []

    def _engine(budget=10**7, dtype=torch.float32, **options):
        model, tokenizer = ln.load(str(base), quant="nf4")
        decoder = choose(model)
        registry = Registry(decoder, adapters, budget, dtype=dtype)
        values = {"max_batch": 4, "max_context": 64, "max_queue": 100, "cache_budget": 10**7, **options}
        made.append(Engine(decoder, tokenizer, registry, **values))
        return made[-1]

    yield _engine
    for one in made:
        one.close(0)


@pytest.fixture
def adapters_of(tmp_path):
    """`adapters_of(base, {name: options of LoraConfig})`: the folder of such adapters, with random values."""

    def _adapters_of(base, options):
        for seed, (name, lora) in enumerate(options.items()):
            model, _ = ln.load(str(base), quant="nf4")
            ln.add_lora(model, ln.LoraConfig(**{"r": 4, "init_lora_weights": False, **lora}), seed=seed)
            ln.save_adapter(model, tmp_path / "adapters" / name)
        return tmp_path / "adapters"

    return _adapters_of


@pytest.fixture
def serving():
    """`serving(base, adapters)`: an engine on any model with those adapters, exact ones; closed in the end."""
    made = []

    def _serving(base, adapters, **options):
        model, tokenizer = ln.load(str(base), quant="nf4")
        decoder = choose(model)
        registry = Registry(decoder, adapters, 10**7, dtype=torch.float32)
        values = {"max_batch": 3, "max_context": 64, "max_queue": 100, "cache_budget": 10**7, **options}
        made.append(Engine(decoder, tokenizer, registry, **values))
        return made[-1]

    yield _serving
    for one in made:
        one.close(0)


class Told:
    """What the engine told of a request; `wait()` for its end."""

    def __init__(self):
        self.events, self.pieces = queue.Queue(), []

    def wait(self, timeout=60):
        while True:
            event = self.events.get(timeout=timeout)
            if not isinstance(event, Piece):
                return event
            self.pieces.append(event)

    @property
    def tokens(self):
        return [piece.token.token for piece in self.pieces if piece.token is not None]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)


@pytest.fixture
def ask():
    """`ask(engine, prompt, n, **options)`: (request, what is told of it), submitted."""

    def _ask(engine, prompt, n=8, submit=True, **options):
        told = Told()
        request = Request(list(prompt), n, told.events.put, **{"ignore_eos": True, **options})
        if submit:
            engine.submit(request)
        return request, told

    return _ask


class Live:
    """A server on a port of its own."""

    def __init__(self, service):
        self.service, self.clients = service, []
        self.server = uvicorn.Server(uvicorn.Config(app(service), port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, key="none"):
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))
        return self.clients[-1]

    def close(self):
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join(30)
        self.service.engine.close(0)


@pytest.fixture
def live(base, adapters):
    """`live(folder=base, **options)`: a server on a tiny model with those adapters; closed in the end."""
    made = []

    def _live(folder=base, **options):
        values = {
            "max_batch": 4, "max_context": 256, "adapter_budget": "10MB", "adapter_dtype": "float32", "cache_budget": "50MB",
            **options,
        }  # fmt: skip
        made.append(Live(make_service(ServeConfig(model=str(folder), adapters=str(adapters), **values))))
        return made[-1]

    yield _live
    for one in made:
        one.close()
