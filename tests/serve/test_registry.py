"""Adapters in memory. Oracle: what the folder holds, and sums of tensor sizes."""

import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.decoding import choose
from lownibble.errors import AdapterError
from lownibble.kernels.decoder import PROJECTIONS
from lownibble.serve.registry import NoRoomError, PinnedError, Registry, UnknownAdapterError


@pytest.fixture
def registry(base, adapters):
    def _registry(budget=10**7, **options):
        model, _ = ln.load(str(base), quant="nf4")
        return Registry(choose(model), adapters, budget, **options)

    return _registry


def size_of(adapters, name):
    """Bytes in memory: float16."""
    return sum(2 * tensor.numel() for tensor in load_file(adapters / name / "adapter_model.safetensors").values())


def test_what_is_held_are_the_values_of_the_file(registry, adapters):
    file = adapters / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.gate_proj.lora_{}.weight"
    expected = {which: tensors[key.format(which)] for which in "AB"}
    for options in ({"dtype": torch.float32}, {}):
        held = registry(**options).acquire("one").adapter.of[1][PROJECTIONS.index("gate_proj")]
        dtype = options.get("dtype", torch.float16)
        assert torch.equal(held.A, expected["A"].to(dtype))
        assert torch.equal(held.B, expected["B"].to(dtype))
        assert held.B.t().is_contiguous()  # as the compiled kernels read it, without a copy


def test_an_adapter_that_float16_cannot_hold_stays_in_float32(registry, adapters):
    file = adapters / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][1, 0] = 70_000.0
    save_file(tensors, file)
    loaded = registry().acquire("one")
    assert loaded.nbytes == 2 * size_of(adapters, "one")
    assert any(branch.B.max() == 70_000 for layer in loaded.adapter.of for branch in layer)


def test_names_are_looked_up_and_never_paths(registry, adapters, tmp_path):
    shutil.copytree(adapters / "one", tmp_path / "outside")
    shutil.copytree(adapters / "one", adapters / ".hidden")
    (adapters / "empty").mkdir()
    made = registry()
    assert made.names() == ["one", "three", "two"]
    for name in ("../outside", "one/../two", "/etc/passwd", str(adapters / "one"), ".hidden", "..", ".", "", "empty", "one\n",
                 "one\0", "o" * 300, "one/"):  # fmt: skip
        assert name not in made
        with pytest.raises(UnknownAdapterError, match="There is no adapter"):
            made.acquire(name)
    assert Registry(made.decoder, None, 1).names() == []
    with pytest.raises(AdapterError, match="is no folder"):
        Registry(made.decoder, tmp_path / "nowhere", 1)


def test_least_recently_used_versions_leave(registry, adapters):
    sizes = {name: size_of(adapters, name) for name in ("one", "two", "three")}
    made = registry(sizes["one"] + sizes["two"])
    for name in ("one", "two", "one", "three"):
        made.release(made.acquire(name))
        assert made.nbytes <= made.budget
    assert list(made.held) == ["three"]  # 'one' was used later than 'two', but both had to leave
    assert (made.loads, made.hits, made.evictions) == (3, 1, 2)
    assert made.nbytes == sizes["three"]


def test_used_and_pinned_versions_stay(registry, adapters):
    made = registry(size_of(adapters, "one") + 10)
    held = made.acquire("one")
    with pytest.raises(NoRoomError, match="in use or pinned"):
        made.acquire("three")
    made.release(held)
    made.load("one", pin=True)
    with pytest.raises(PinnedError, match=r"pinned leave no room for 'three'\. Unload one"):
        made.acquire("three")
    made.load("one")
    made.release(made.acquire("three"))
    assert list(made.held) == ["three"]


def test_what_is_bad_evicts_nothing(registry, adapters):
    made = registry(size_of(adapters, "one") + 10)
    made.release(made.acquire("one"))
    file = adapters / "three" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("inf"))
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"of adapter 'three' holds NaN or infinite values"):
        made.acquire("three")
    assert list(made.held) == ["one"]
    with pytest.raises(AdapterError, match=r"budget of all"):
        registry(100).acquire("one")
    with pytest.raises(AdapterError, match=r"the largest that is taken has .* --max-adapter"):
        registry(max_bytes=100).acquire("one")
    with pytest.raises(AdapterError, match=r"has rank 4, above 3"):
        registry(max_rank=3).acquire("one")


def test_a_pin_outlives_versions_and_folders(registry, adapters):
    made = registry()
    first = made.load("one", pin=True)
    file = adapters / "one" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:100])  # half copied
    with pytest.raises(AdapterError):
        made.acquire("one")
    file.write_bytes(content)
    made.release(made.acquire("one"))
    assert made.held["one"] is not first
    assert made.pinned == {"one"}
    shutil.rmtree(adapters / "one")
    made.unload("one")
    assert (made.nbytes, made.pinned) == (0, set())


def test_files_that_change_while_they_are_read_are_read_again(registry, adapters, monkeypatch):
    made, reads = registry(), []
    read = made._read

    def change(name, stamp):
        loaded = read(name, stamp)
        reads.append(name)
        if len(reads) < 3:
            (adapters / "one" / "adapter_config.json").touch()
        return loaded

    monkeypatch.setattr(made, "_read", change)
    assert made.acquire("one").stamp == made._stamp("one")
    assert len(reads) == 3
    reads.append("forever")
    monkeypatch.setattr(
        made, "_read", lambda name, stamp: (read(name, stamp), (adapters / "one" / "adapter_config.json").touch())[0]
    )
    (adapters / "one" / "adapter_config.json").touch()
    with pytest.raises(AdapterError, match="changes while it is read"):
        made.acquire("one")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("target_modules", r"(\w+\.?)*!", "too costly to match"),
        ("target_modules", ".*.*.*.*.*q_proj", "too costly to match"),
        ("rank_pattern", {"(a|b)+q_proj": 4}, "too costly to match"),
        ("rank_pattern", {"q_proj(": 4}, "not a valid regular expression"),
    ],
)
def test_patterns_of_a_config_cannot_stop_the_server(registry, adapters, option, value, says):
    file = adapters / "one" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    with pytest.raises(AdapterError, match=says):
        registry().acquire("one")


def test_metadata_that_cannot_be_read_says_nothing(registry, adapters):
    file = adapters / "one" / "adapter_model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    key = next(key for key in metadata if "trained_on" in key)
    said = {"model": "m", "digest": None, "quant": None}
    wrongs = ("{", "[]", "5", *(json.dumps({**said, **other}) for other in ({"digest": 5}, {"quant": {}}, {"quant": 7})))
    for wrong in wrongs:
        save_file(load_file(file), file, {**metadata, key: wrong})
        assert registry().acquire("one").note is None


def test_errors_of_any_kind_are_the_adapters(registry, monkeypatch):
    made = registry()
    monkeypatch.setattr("lownibble.serve.registry.scale_of", lambda path, config: 1 / 0)
    with pytest.raises(AdapterError, match=r"'one' cannot be used \(ZeroDivisionError"):
        made.acquire("one")


def test_unloading_waits_for_requests(registry, adapters):
    made = registry()
    held = made.acquire("one")
    made.unload("one")
    assert "one" not in made.names()
    with pytest.raises(UnknownAdapterError):
        made.acquire("one")
    with pytest.raises(UnknownAdapterError):
        made.unload("one")
    assert made.nbytes == size_of(adapters, "one")
    made.release(held)
    assert made.nbytes == 0
    assert made.load("one").digest == held.digest
    assert "one" in made.names()


def test_adapters_of_other_bases(registry, adapters, base, adapt, write):
    """The base is known by its weights, not by its name; an adapter that says nothing is taken if it fits."""
    other = write("llama", name="other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    shutil.move(adapt(other, "nf4", name="stranger")[1], adapters / "stranger")
    with pytest.raises(AdapterError, match=r"'stranger' is for another base: it was trained on .* Serve it there"):
        registry().acquire("stranger")
    assert registry(any_base=True).acquire("stranger").nbytes
    file = adapters / "stranger" / "adapter_model.safetensors"
    save_file(load_file(file), file)
    assert registry().acquire("stranger").nbytes


def test_what_cannot_be_shared_in_a_batch_is_refused(registry, adapters, base, adapt):
    shutil.move(adapt(base, "nf4", name="head", target_modules=["q_proj", "lm_head"])[1], adapters / "head")
    with pytest.raises(AdapterError, match=r"changes '.*lm_head.*', which is not shared .* Merge it"):
        registry().acquire("head")


def test_folders_may_have_any_name(registry, adapters):
    names = ["client 7 (v2)", "Ünïcode-适配器", "_under", "a+b=c", "x" * 200]
    for name in names:
        shutil.copytree(adapters / "two", adapters / name)
    made = registry()
    assert made.names() == sorted(["one", "two", "three", *names])
    assert len({made.acquire(name).digest for name in names}) == 1


def test_what_is_not_taken_is_said(registry, adapters, base, adapt):
    for name in ("demo", "damaged", "line\nbreak"):
        shutil.copytree(adapters / "one", adapters / name)
    (adapters / "empty").mkdir()
    (adapters / ".hidden").mkdir()
    (adapters / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    shutil.move(adapt(base, "nf4", name="head", target_modules=["q_proj", "lm_head"])[1], adapters / "head")
    made = registry(reserved=("demo",))
    assert made.examine() == []
    says = {
        "demo": "base is called so", "damaged": "is damaged", "line\\nbreak": "cannot be printed", "head": "Merge it",
        "empty": "no adapter_config.json",
    }  # fmt: skip
    assert made.not_taken.keys() == says.keys()
    assert all(text in made.not_taken[name] for name, text in says.items()), made.not_taken
    assert str(adapters) not in "".join(made.not_taken.values())
    shutil.copy(adapters / "one" / "adapter_model.safetensors", adapters / "damaged")
    made.release(made.acquire("damaged"))
    assert "damaged" not in made.not_taken, "it has been mended"


def test_folders_that_cannot_be_looked_into(registry, adapters, monkeypatch):
    """Such as lost+found of a mounted volume; root may look into it, so what the system says is simulated."""
    (adapters / "lost+found").mkdir()
    own = Path.is_file

    def is_file(path):
        if path.parent.name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return own(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    made = registry()
    made.examine()
    assert made.not_taken == {"lost+found": "it cannot be read: Permission denied"}
    assert "lost+found" not in made
    names = made.names()
    assert names
    assert "lost+found" not in names
    adapters.rename(adapters.with_name("elsewhere"))
    assert made.names() == made.examine() == []
    assert made.not_taken["adapters"] == "it cannot be read: No such file or directory"


def test_preloading_goes_on_while_the_budget_lasts(registry, adapters):
    made = registry(size_of(adapters, "one") + size_of(adapters, "two"))
    assert made.examine(preload=True) == ["one", "two"]
    assert (made.loads, made.evictions, made.not_taken) == (2, 0, {})


def test_reading_one_holds_up_nobody(registry, monkeypatch):
    """Neither requests that end, nor those whose adapter is held, nor metrics."""
    made = registry()
    held, reading, go_on = made.acquire("one"), threading.Event(), threading.Event()
    read = made._read
    monkeypatch.setattr(made, "_read", lambda *a: (reading.set(), go_on.wait(30), read(*a))[2])
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(made.acquire, "two")
        assert reading.wait(30)
        try:
            pool.submit(lambda: (made.release(held), made.acquire("one"), made.nbytes)).result(10)
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result().name == "two"


def test_from_many_threads(registry, adapters):
    """Counts come out even, and the budget holds at every moment."""
    made = registry(size_of(adapters, "one") + size_of(adapters, "two"))
    problems = []

    def work(seed):
        for i in range(40):
            name = ("one", "two", "three")[(seed + i) % 3]
            try:
                held = made.acquire(name)
            except NoRoomError:
                continue
            if made.nbytes > made.budget:
                problems.append(made.nbytes)
            made.release(held)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not problems
    assert all(one.users == 0 for one in made.held.values())
    assert not made._old
