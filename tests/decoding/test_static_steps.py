"""Steps of one token of each row in fixed shapes. Oracles: transformers' `generate` on each prompt alone; the recorded
operations of a step, whose replay sees its tensors and nothing that the host had decided; the uses of tensors' values."""

import gc
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import NEW, adapter_of, alone, build, decoded, louder, quiet, rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from waits import Waits

import lownibble as ln
from lownibble.decoding import Drawer, How, choose
from lownibble.decoding.generate import _cache
from lownibble.decoding.modules import ModulesDecoder
from lownibble.decoding.static import StaticSteps, _Streams, prepared
from lownibble.errors import BackendError
from lownibble.kernels import ops, proven
from lownibble.kernels.decoder import Adapter, LowRank, Segment
from lownibble.models.kept import KEPT
from lownibble.quant import QuantLinear


def static(model, **options):
    with quiet():
        decoder = ModulesDecoder(model, "it is a test", static=True, **options)
    assert decoder.together
    assert not decoder._not_static
    return decoder


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma4_text", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_rows_give_the_tokens_of_each_sequence_alone(kind, monkeypatch):
    """Grouped heads, windows, caps, sinks, values of another size, Conv1D; prompts in parts beside sequences that generate."""
    passes = []
    call = StaticSteps.__call__
    monkeypatch.setattr(
        StaticSteps, "__call__", lambda self, lines, *rest: passes.append(len(lines[0])) or call(self, lines, *rest)
    )
    model = louder(build(kind, 96))
    decoder = static(model)
    passes.clear()
    expected = [alone(model, prompt) for prompt in rows()]
    assert len({tuple(tokens) for tokens in expected}) > 2
    assert decoded(decoder, rows(), [None] * 4) == expected
    assert {1, 2, 3} <= set(passes)
    assert len(passes) >= NEW


class Recorded(TorchDispatchMode):
    """Captures a step as a graph does: the operations that it runs, on the very tensors, with all else as it was."""

    def __init__(self):
        super().__init__()
        self.captured, self.replays = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self, run):
        self.captured += 1
        self.calls = calls = []
        with self:
            logits = run()

        def replay():
            self.replays += 1
            now = {}
            for func, args, kwargs, before in calls:
                args, kwargs = tree_map(lambda a, now=now: now.get(id(a), a), (args, kwargs))
                after = func(*args, **kwargs)
                now.update(zip(map(id, tree_leaves(before)), tree_leaves(after), strict=True))
            result.copy_(now[id(logits)])

        result = logits.clone()
        return replay, result


def test_replayed_steps_see_tokens_slots_positions_and_adapters_of_each_step():
    model, capture = louder(build("gemma3_text", 96)), Recorded()
    for seed, name in enumerate(("one", "two")):
        ln.add_lora(model, ln.LoraConfig(r=2 + seed, target_modules="all-linear", init_lora_weights=False), name=name, seed=seed)
    model.eval()
    prompts, names = [rows()[0], rows()[2][:5], rows()[3][:5]], ["one", "two", "one"]
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        ln.set_adapter(model, name)
        expected.append(alone(model, prompt))
    ln.set_adapter(model, None)
    assert expected != [alone(model, prompt) for prompt in prompts]
    with ln.use_backend("reference"):
        decoder = static(model, capture=capture)
        assert capture.captured == 1, "by the trial of the model"
        capture.captured = capture.replays = 0
        held = [adapter_of(model, decoder, name) for name in names]
        assert decoded(decoder, prompts, held) == expected
    assert capture.captured == 1, "three rows, padded to four"
    assert capture.replays >= NEW - 2


def linear_steps(places=4, capture=None):
    """Steps of a "model" that is a linear layer's branch: the tables are all there is to see."""
    seen = []

    def run(lines, adapters):
        tokens = lines[0]
        y = torch.zeros(len(tokens), 3)
        if adapters is not None:
            seen.append(adapters)
            ops.add_low_rank_rows(y, tokens.unsqueeze(1).float().repeat(1, 5), adapters, 1)
        return y

    steps = StaticSteps(places, 2, torch.float32, torch.device("cpu"), capture)
    return partial(steps, run=run), seen


def adapter(seed, r):
    generator = torch.Generator().manual_seed(seed)
    return Adapter([[None], [LowRank(torch.randn(r, 5, generator=generator), torch.randn(3, r, generator=generator), 0.5)]])


@pytest.mark.parametrize("backend", [name for name in ("reference", "triton") if ops.backend_status()[name] == "ok"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
def test_adapters_come_and_go_and_larger_ranks_are_captured_anew(backend):
    calls = []

    def capture(run):
        calls.append(1)
        logits = run().clone()
        return lambda: logits.copy_(run()), logits

    steps, seen = linear_steps(capture=capture)
    a, b, wide = adapter(1, 2), adapter(2, 3), adapter(3, 20)

    def expected(of_rows, tokens):
        x = torch.tensor(tokens).unsqueeze(1).float().repeat(1, 5)
        branches = [one and one.of[1][0] for one in of_rows]
        return torch.stack(
            [row @ b.A.t() @ b.B.t() * b.scale if b else torch.zeros(3) for row, b in zip(x, branches, strict=True)]
        )

    for of_rows, captured in (
        ([a, None, b], 0), ([b, a, None], 1), ([a, a, b, b], 1), ([wide, a], 1), ([wide, b], 1 + 1), ([None, wide, b], 2),
    ):  # fmt: skip
        tokens = list(range(1, 1 + len(of_rows)))
        with ln.use_backend(backend):
            found = steps([tokens], of_rows)
        torch.testing.assert_close(found, expected(of_rows, tokens))
        assert len(calls) == (captured if backend == "triton" else 0), of_rows
    assert seen[0].largest_r == 16
    assert seen[-1].largest_r == 32
    assert seen[-1].ranks[:2].tolist() == [[0, 2], [0, 1]]
    held = seen[-1].branches[0][1]
    assert seen[-1].pointers[0, 1].tolist() == [held.A.data_ptr(), held.B.data_ptr()]


@pytest.mark.parametrize("backend", [name for name in ("reference", "triton") if ops.backend_status()[name] == "ok"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
def test_without_the_kernel_a_graph_has_only_the_adapters_that_it_was_captured_with(backend, monkeypatch):
    monkeypatch.setitem(proven.refused, "low_rank_rows", "it is a test")
    capture = Recorded()
    steps, _ = linear_steps(capture=capture)
    with ln.use_backend(backend):
        for one in (adapter(1, 2), adapter(2, 2), adapter(1, 2)):
            y = torch.full((5,), 3.0) @ one.of[1][0].A.t() @ one.of[1][0].B.t() * 0.5
            for _ in range(3):
                torch.testing.assert_close(steps([[3]], [one])[0], y)
    assert (capture.captured, capture.replays) == (3, 6)


def test_an_adapter_of_another_scale_shares_the_matrices_on_the_device():
    one, dtype, device = adapter(1, 2), torch.float32, torch.device("cpu")
    scaled = Adapter([[None], [one.of[1][0]._replace(scale=2.0)]], unscaled=one)
    its, ours = (prepared(each, dtype, device) for each in (one, scaled))
    assert ours.pointers is its.pointers
    assert ours.branches[1].A is its.branches[1].A
    assert (its.scales.tolist(), ours.scales.tolist()) == ([0.0, 0.5], [0.0, 2.0])


def test_a_step_that_cannot_be_captured_goes_on_without_graphs(caplog):
    def capture(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    steps, _ = linear_steps(capture=capture)
    one = adapter(1, 2)
    first, second, third = (steps([[3]], [one]) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert "cannot be captured (operation not permitted" in steps.func.obstacle
    assert caplog.text.count("cannot be captured (operation not permitted") == 1


def test_steps_of_fixed_shapes_that_fail_are_passes_of_any_shape_from_then_on(monkeypatch, caplog):
    model = louder(build("qwen3", 96))
    decoder, expected = static(model), [alone(model, prompt) for prompt in rows()]
    run = StaticSteps.__call__

    def failing(self, lines, *rest):
        if len(lines[0]) > 2:
            raise RuntimeError("CUDA error: invalid configuration argument\nmore")
        return run(self, lines, *rest)

    monkeypatch.setattr(StaticSteps, "__call__", failing)
    assert decoded(decoder, rows(), [None] * 4) == expected
    assert caplog.text.count("falls back to eager passes of dynamic shapes, which are slower: a step of") == 1
    assert "invalid configuration argument)" in decoder._not_static
    monkeypatch.setattr(StaticSteps, "__call__", lambda *_: 1 / 0)
    with quiet():
        assert "ZeroDivisionError" in ModulesDecoder(model, "it is a test", static=True)._not_static, "in the trial, too"


def test_a_kernel_that_ends_the_cuda_context_in_the_trial_is_named(monkeypatch):
    """Its message says how to start again; every later call fails with another."""

    def lost(*_, **__):
        raise BackendError("The kernel 'attend_slots' failed and has ended this process's CUDA context. Start again with X.")

    model = louder(build("qwen3", 96))
    monkeypatch.setattr(ops, "attend_slots", lost)
    with quiet(), pytest.raises(BackendError, match=r"'attend_slots' failed .*Start again"):
        ModulesDecoder(model, "it is a test", static=True)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_no_tensor_of_a_step_is_on_another_device_than_the_model(kind):
    """The device is torch's 'meta', which mixes with the host's as little as CUDA does, and whose values nobody can read."""
    model = louder(build(kind, 96))
    decoder, device, ids = static(model), torch.device("meta"), torch.arange(3)
    model.to(device)
    decoder._device = device
    branches = [LowRank(torch.ones(2, m.in_features), torch.ones(m.out_features, 2), 1.0) for m in decoder._modules]
    one, drawer = Adapter([branches]), Drawer(4, 96, device)
    with ln.use_backend("reference"), torch.inference_mode():
        cache = decoder.cache(4, 32)
        cache.steps = StaticSteps(4, len(branches), torch.float32, device, lambda run: (lambda: None, run()))
        for segments in ([], [Segment(0, 2, one)]):
            for position in range(3):
                logits = decoder.step(ids, ids, torch.full_like(ids, position), cache, segments=segments)
                assert (logits.device, logits.shape, decoder._not_static) == (device, (3, 96), "")
        assert decoder.prompt(torch.arange(20), 3, cache, adapter=one).device == device
        cache.fork(0, 1, 2)
        for slot, how in enumerate((How(), How(1.0), How(0.7, 0.9, 0.1, 5, 0.1, 0.1, 1.2))):
            drawer.begin(slot, how, [1, 2], 3)
        assert drawer(logits, [0, 1, 2]).device == device


def test_logits_of_16_bit_models_are_processed_in_float32():
    """Oracle: transformers' loop. In bfloat16 the sums of what top_p keeps would be wrong."""
    model, seen = louder(build("qwen3", 96)).bfloat16(), []
    ids = torch.tensor([rows()[0], rows()[0]])
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "logits_processor": [lambda ids, scores: seen.append(scores.dtype) or scores], "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    with quiet():
        found, expected = (model.generate(ids, **options, **loop) for loop in ({"custom_generate": ln.decode}, {}))
    assert seen == [torch.float32] * 6
    assert [one.dtype for one in found.logits] == [one.dtype for one in expected.logits]


@pytest.mark.skipif(ops.backend_status()["triton"] != "ok" or torch.cuda.is_available(), reason="launches are only noted")
def test_no_kernel_is_compiled_for_a_later_step(tiny, monkeypatch):
    """What Triton compiles a kernel for: constants, types, integers that are 1 or divisible by 16, alignment of tensors."""
    from lownibble.kernels import triton_decode, triton_few

    model = tiny("llama", hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module))
    with ln.use_backend("reference"):
        decoder = static(model)
    compiled = set()

    def noted(kernel, programs, *given, **constants):
        names, free = kernel.arg_names, kernel.kwargs.get("do_not_specialize") or ()
        compiled.add((kernel.fn.__name__, *sorted(constants.items()), *(
            (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor)
            else type(value) if isinstance(value, float) or name in free
            else (value == 1, value % 16 == 0)
            for name, value in zip(names, given, strict=False)
        )))  # fmt: skip

    for module in (triton_few, triton_decode):
        monkeypatch.setattr(module, "_launch", noted)

    def adapters(rank):
        branches = [LowRank(torch.ones(rank, m.in_features), torch.ones(m.out_features, rank), 1.0) for m in decoder._modules]
        return [Adapter([branches]) for _ in range(4)]

    def steps(rank, order, begin):
        for count in range(1, 5):
            slots, given = torch.tensor(order[:count]), adapters(rank)
            segments = [Segment(row, row + 1, given[row]) for row in range(0, count, 2)]
            for position in (begin, begin + 17):
                for now in ([], segments):
                    decoder.step(slots + 3, slots, torch.full_like(slots, position), cache, segments=now)

    with ln.use_backend("triton"), torch.inference_mode():
        cache = decoder.cache(4, 128)
        steps(8, [0, 1, 2, 3], 0)
        first = set(compiled)
        steps(5, [3, 1, 0, 2], 64)
    assert compiled == first
    found = Counter(name for name, *_ in first)
    assert {*found} == {"one_row", "few_rows", "add_parts", "attend_part", "attend_whole", "shrink", "expand"}
    assert found["shrink"] <= 4, "by rows' alignment and sizes, not by layer"


def test_dora_and_branches_of_experts_are_copied_to_the_device_once():
    decoder = static(louder(build("qwen3", 96)))
    branch = LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.ones(4))
    one = Adapter([[branch, None]])
    decoder._device = torch.device("meta")
    found = decoder._on_device(one)
    assert found is decoder._on_device(one)
    assert {t.device.type for t in (found[0].A, found[0].B, found[0].gain)} == {"meta"}
    assert found[1] is None


def test_a_step_that_failed_is_not_taken_for_one_whose_kernels_are_loaded():
    captured = []
    steps, _ = linear_steps(capture=lambda run: captured.append(1) or (lambda: None, run()))
    failing = [MemoryError("out of memory")]

    def run(lines, _):
        if failing:
            raise failing.pop()
        return torch.zeros(lines.shape[1], 3)

    with pytest.raises(MemoryError):
        steps([[3]], [None], run=run)
    steps([[3]], [None], run=run)
    assert not captured
    steps([[3]], [None], run=run)
    assert captured


def test_caches_of_a_thread_share_a_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    streams, device = _Streams(), torch.device("cuda", 0)
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(streams.of, device).result()
    assert streams.of(device) is streams.of(device) is not elsewhere
    assert streams.of(torch.device("cuda", 1)) is not streams.of(device)


def test_nothing_in_a_step_waits_for_the_device():
    model = louder(build("qwen3", 96))
    with ln.use_backend("reference"), torch.inference_mode():
        decoder = static(model)
        branches = [LowRank(torch.randn(2, m.in_features), torch.randn(m.out_features, 2), 1.0) for m in decoder._modules]
        cache, one = decoder.cache(4, 32), Adapter([branches])
        first, slots = torch.tensor([5, 6]), torch.tensor([0, 1])
        plain = decoder.step(first, slots, torch.zeros_like(slots), cache)
        adapted = decoder.step(first, slots, torch.zeros_like(slots), cache, segments=[Segment(0, 1, one)])
        assert not torch.equal(plain[0], adapted[0])
        assert torch.equal(plain[1], adapted[1])
        for adapters in ([None, None], [one, None]):
            step = partial(cache.steps, [[7, 8], [0, 1], [1, 1], [1, 1]], adapters, partial(decoder._rows_pass, cache))
            with Waits(model) as waits:
                step()
            assert waits.found == []
            hook = model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.sum().item() and None)
            with Waits(model) as waits:
                step()
            hook.remove()
            assert waits.found, "the modes see what waits"


def test_a_cache_and_its_graphs_are_freed_at_once():
    """Without Python's collector, which knows nothing of a GPU's memory."""
    decoder = static(louder(build("qwen3", 96)), capture=lambda run: (lambda: None, run()))
    cache, ids = decoder.cache(2, 8), torch.tensor([0, 1])
    gc.disable()
    try:
        with torch.inference_mode():
            for position in range(3):
                decoder.step(ids, ids, torch.full_like(ids, position), cache)
        held = [weakref.ref(cache), weakref.ref(cache.steps), weakref.ref(cache.layers[0].keys)]
        assert cache.steps._graphs[2, False] is not None
        del cache
        assert [each() for each in held] == [None] * 3
    finally:
        gc.enable()


def test_generation_again_captures_nothing_until_what_its_graphs_depend_on_changes(monkeypatch):
    """Of `lownibble.decode`. Oracle: transformers' own loop, after every change."""
    model, capture = louder(build("gemma3_text", 96)), Recorded()
    for seed, name in enumerate(("one", "two")):
        ln.add_lora(model, ln.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), name=name, seed=seed)
    model.eval()
    decoder = static(model, capture=capture)
    monkeypatch.setattr("lownibble.decoding.generate.choose", lambda model: decoder)

    def captured(prompt, rows=1):
        """How many steps were captured, and replayed."""
        before = capture.captured, capture.replays
        ids = torch.tensor([prompt] * rows)
        asked = {
            "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0,
            "eos_token_id": None,
        }  # fmt: skip
        with quiet():
            found, expected = (model.generate(ids, **asked, **loop) for loop in ({"custom_generate": ln.decode}, {}))
        assert torch.equal(found, expected)
        return capture.captured - before[0], capture.replays - before[1]

    short, long = rows()[2], rows()[3]
    with ln.use_backend("reference"):
        assert captured(short) == (1, NEW - 2), "the first step of a shape runs as it is"
        assert captured(short) == (0, NEW - 1)
        assert captured(short[:5]) == (0, NEW - 1), "another prompt"
        assert captured(long)[0] == 1, "a longer context"
        assert captured(short)[0] == 0
        assert captured(short, rows=2)[0] == 1, "more rows"
        assert captured(short)[0] == 1, "another shape in the same cache"
        assert captured(short) == (0, NEW - 1)
        ln.set_adapter(model, "one")
        assert captured(short)[0] == 1, "another adapter"
        assert captured(short)[0] == 0
        with torch.no_grad():
            model.get_input_embeddings().weight[3:9].neg_()
        assert captured(short)[0] == 1, "changed in place"
        layer = model.model.layers[0].self_attn.q_proj
        layer.adapters["one"].lora_A = torch.nn.Parameter(-layer.adapters["one"].lora_A.detach())
        assert captured(short)[0] == 1, "replaced"
        layer.adapters["one"].scale *= 3
        assert captured(short)[0] == 1, "another scale"
        assert captured(short)[0] == 0
        first = model.model.layers[0]
        hooks = [first.register_forward_hook(lambda module, args, y: y * -2)]
        assert captured(short)[0] == 1, "a hook"
        hooks.append(first.mlp.register_forward_pre_hook(lambda module, args: (args[0] * 3,)))
        assert captured(short)[0] == 1, "a hook of inputs"
        assert captured(short)[0] == 0
        for hook in hooks:
            hook.remove()
        assert captured(short)[0] == 1, "no hooks"
        first.self_attn.scaling *= 3
        assert captured(short)[0] == 1, "a number of a module"
        for kind in (torch.nn.Tanh, torch.nn.Sigmoid):
            first.mlp.act_fn = kind()
            assert captured(short)[0] == 1, "another activation"
        model.config.final_logit_softcapping = 0.5
        assert captured(short)[0] == 1, "a setting"
        first.mlp.forward = lambda x: -x
        assert captured(short)[0] == 1, "another forward"
        assert captured(short)[0] == 0
    assert captured(short)[0] == 1, "other kernels"


def generate(model):
    with quiet():
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, pad_token_id=0, eos_token_id=None, custom_generate=ln.decode)


def test_what_is_kept_is_dropped_where_nothing_is_captured_and_on_request(monkeypatch):
    model = louder(build("qwen3", 96))
    plain, drawing = choose(model), static(model, capture=lambda run: (lambda: None, run()))

    def kept(decoder):
        monkeypatch.setattr("lownibble.decoding.generate.choose", lambda model: decoder)
        generate(model)
        return weakref.ref(KEPT[model].cache) if model in KEPT else None

    cache = kept(drawing)
    assert cache().capacity == 5
    assert kept(plain) is None, "as after model.cpu()"
    assert cache() is None
    cache = kept(drawing)
    ln.drop_cache(model)
    assert cache() is None


def test_contexts_are_rounded_up_by_less_than_a_quarter():
    decoder = SimpleNamespace(draws=True, cache=lambda slots, capacity: capacity)
    found = [_cache(decoder, None, None, 1, n) for n in range(1, 5000)]
    assert all(n <= rounded < 1.25 * n for n, rounded in enumerate(found, 1))
    assert len(set(found[1024:2048])) == 4


def test_what_is_kept_goes_with_its_model(monkeypatch):
    def generated():
        model = louder(build("qwen3", 96))
        decoder = static(model, capture=lambda run: (lambda: None, run()))
        monkeypatch.setattr("lownibble.decoding.generate.choose", lambda model: decoder)
        generate(model)
        return weakref.ref(model), weakref.ref(KEPT[model].cache)

    held = generated()
    monkeypatch.undo()
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_a_slot_is_copied_from_another():
    """Oracle: the same prompt read in one slot."""
    model = louder(build("gemma3_text", 96))
    decoder = static(model)
    cache, prompt = decoder.cache(2, 64), torch.tensor(rows()[3])
    with torch.inference_mode():
        expected = decoder.prompt(prompt, 0, cache)
        cache.fork(0, 1, 30)
        assert not cache.layers[0].keys[1, :, 30:].any()
        torch.testing.assert_close(decoder.prompt(prompt[30:], 1, cache, position=30), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss"])
def test_graphs_on_a_gpu_give_the_tokens_of_each_sequence_alone(kind):
    model = louder(build(kind, 96))
    for seed, name in enumerate(("one", "two")):
        ln.add_lora(
            model, ln.LoraConfig(r=2 + 16 * seed, target_modules="all-linear", init_lora_weights=False), name=name, seed=seed
        )
    model.eval().cuda()
    names, expected = [None, "one", "two", "one"], []
    for prompt, name in zip(rows(), names, strict=True):
        ln.set_adapter(model, name)
        expected.append(alone(model, prompt))
    ln.set_adapter(model, None)
    with quiet():
        decoder = choose(model)
    graphs = "with CUDA graphs" in decoder.note
    assert graphs or kind == "gpt_oss", decoder.note  # whose experts of float32 torch multiplies by what the host has counted
    held = {name: adapter_of(model, decoder, name) for name in ("one", "two")}
    assert decoded(decoder, rows(), [held.get(name) for name in names]) == expected
    kept = []
    for _ in range(2):  # `lownibble.decode` replays the graphs of its last call
        ids = torch.tensor([rows()[0]], device="cuda")
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None,
                               custom_generate=ln.decode)  # fmt: skip
        assert found[0, ids.shape[1] :].tolist() == expected[0]
        kept.append(KEPT[model].cache if graphs else None)
    assert kept[0] is kept[1]


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [{}, {"quant_type": "int4"}, {"quant_type": "int8", "block_size": "row"}], ids=str)
def test_packed_weights_are_decoded_with_graphs_on_a_gpu(quant, tiny):
    """The trial of a model compares a replayed step with the model's own pass."""
    model = tiny("llama", hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module, ln.QuantConfig(**quant)))
    with quiet():
        assert "with CUDA graphs" in choose(model.cuda()).note
