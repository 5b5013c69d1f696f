import queue
import shutil
import threading
import time

import openai
import pytest
import torch
import uvicorn

import lownibble as ln
from lownibble.config import ServeConfig
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
        registry = Registry(model, adapters, budget, dtype=dtype)
        values = {"max_batch": 4, "max_context": 64, "max_queue": 100, "cache_budget": 10**7, **options}
        made.append(Engine(model, tokenizer, registry, **values))
        return made[-1]

    yield _engine
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
        self.service = service
        self.server = uvicorn.Server(uvicorn.Config(app(service), port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.service.engine.close(0)


@pytest.fixture
def live(base, adapters):
    made = []

    def _live(**options):
        values = {
            "max_batch": 4, "max_context": 256, "adapter_budget": "10MB", "adapter_dtype": "float32", "cache_budget": "50MB",
            **options,
        }  # fmt: skip
        made.append(Live(make_service(ServeConfig(model=str(base), adapters=str(adapters), **values))))
        return made[-1]

    yield _live
    for one in made:
        one.close()
