"""`lownibble bench train`, `decode` and `plan` with `--model`. Oracles: figures worked out by hand; runs of a tiny shape."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from shapes import write_shape

from lownibble.bench import decode, plan, train
from lownibble.bench.processes import Command, Measured
from lownibble.bench.subject import subject
from lownibble.cli.main import main
from lownibble.decoding.modules import ModulesDecoder
from lownibble.errors import ConfigError
from lownibble.kernels import proven
from lownibble.measuring.turns import ratio, ratio_apart
from lownibble.models import load


def _made_up(seconds, peak=100):
    turn = {"tokens": 1000, "losses": [1.0], "peak_bytes": peak, "reserved_bytes": 2 * peak}
    return [{**turn, "seconds": each} for each in (99.0, *seconds)]


FOUND = Measured(
    {"matmul": {}, "qlora": {"first_step_s": 3.0}, "lora": {"first_step_s": 1.0}},
    {
        "matmul": [{"flops": 4e6, "seconds": each} for each in (9.0, 1.0, 2.0)],
        "qlora": _made_up((1.0, 2.0)),
        "lora": _made_up((2.0, 1.0), peak=300),
    },
    {"peft_lora": "out of memory"},
)
"""Two counted rounds: 1000 and 500 tokens/s for QLoRA, 500 and 1000 for LoRA; the limit is 4 and 2 MFLOP/s."""


def test_ratios_of_rounds_where_contenders_took_turns():
    made = train._record({}, 2000.0, FOUND, ratio)
    assert made["ratios"] == {"qlora_vs_lora": {"median": 1.25, "min": 0.5, "max": 2.0}}
    qlora = made["contenders"]["qlora"]
    assert qlora["tokens_per_s"] == {"median": 750, "min": 500, "max": 1000}
    assert qlora["limit_share"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert (qlora["peak_bytes"], qlora["reserved_bytes"], qlora["first_step_s"]) == (100, 200, 3.0)
    assert made["contenders"]["lora"]["losses"] == [1.0] * 3
    assert "matmul" not in made["contenders"]


def test_ratios_of_medians_where_they_ran_alone():
    made = train._record({}, 2000.0, FOUND, ratio_apart)
    assert made["ratios"] == {"qlora_vs_lora": {"median": 1.0, "min": 0.5, "max": 2.0}}
    assert made["contenders"]["qlora"]["limit_share"] == {"median": 0.5, "min": 0.25, "max": 1.0}


def test_without_a_limit_there_is_no_share():
    answers = {name: given for name, given in FOUND.answers.items() if name != "matmul"}
    made = train._record({}, 2000.0, FOUND._replace(answers=answers), ratio)
    assert "limit_share" not in made["contenders"]["qlora"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["kernels", "--model", "demo"],
            "--model is for 'bench train', 'bench experts', 'bench decode', 'bench plan', 'bench preference' and 'bench gpu'",
        ),
        (["train", "--time-limit", "9"], "--time-limit is for 'bench contact' and 'bench gpu';"),
        (["train", "--batch-size", "0"], "must be an integer >= 1. Got '0'"),
        (["train", "--data", "x.jsonl", "--model", "llama-3-8b"], "Leave --model or --data out"),
        (["train", "--only", "lora,unsloth"], "There is no contender 'unsloth' here. There are: lora, lora_eager,"),
        (["plan", "--max-length", "64"], "many settings for the embedded model"),
        (["train", "--model", "llama-3-8"], "Did you mean 'llama-3-8b'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def on_cuda(monkeypatch):
    """What is decided by the device, as on CUDA with float8."""
    monkeypatch.setattr(train, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(train.eightbit, "choose", lambda compute, device: compute)


def test_on_cuda_qlora_is_the_first_and_the_last(on_cuda, monkeypatch):
    monkeypatch.setattr(train, "installed", lambda kind: ([f"peer_{kind}"], {"other": "not installed: other"}))
    commands, missing = train._fixed_work(True, "folder", 4, 1024)
    assert list(commands) == ["matmul", "qlora", "lora", "qlora_fp8", "peer_cuda", "qlora_again"]
    assert missing == {"other": "not installed: other"}
    assert train._fixed_work(False, "folder", 4, 1024)[1] == {}


PROGRAM = """
import json, sys
name, record = sys.argv[1:]
if name == "fails":
    print(json.dumps({"error": "OutOfMemoryError"}), flush=True)
    sys.exit(1)
there = json.load(open(record)) if name == "last" else {}
facts = {"status": there.get("status"), "seen": sorted(there.get("contenders", {})), "failed": there.get("failed")}
print(json.dumps(facts), flush=True)
for line in sys.stdin:
    print(json.dumps({"tokens": 10, "seconds": 2, "flops": 80, "losses": [], "peak_bytes": 1, "reserved_bytes": 1}), flush=True)
"""


def test_on_cuda_the_record_grows_with_each_contender(on_cuda, tmp_path, monkeypatch, capsys):
    (tmp_path / "made_up.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "record.json"
    commands = {name: Command("made_up", (name, str(output))) for name in ("matmul", "lora", "fails", "last")}
    monkeypatch.setattr(train, "_fixed_work", lambda *_: (commands, {}))
    monkeypatch.setattr(train, "_flops_per_token", lambda *_: 4.0)
    assert main(["bench", "train", "--model", write_shape(tmp_path), "--repeats", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert (record["status"], record["workload"]["length"]) == ("ok", 1024)
    last = record["contenders"]["last"]
    assert (last["status"], last["seen"]) == ("partial", ["lora"]), "what stood there before the last one began"
    assert record["failed"] == last["failed"] == {"fails": "'fails' failed: OutOfMemoryError"}
    assert last["limit_share"]["median"] == 0.5
    capsys.readouterr()
    monkeypatch.setattr(train, "_fixed_work", lambda *_: ({"fails": commands["fails"]}, {}))
    assert main(["bench", "train", "--model", str(tmp_path), "--repeats", "2"]) == 1
    assert "No contender could be measured. 'fails' failed: OutOfMemoryError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shape_is_trained_and_the_record_written(tmp_path, forked, monkeypatch, capsys):
    monkeypatch.setattr(train, "installed", lambda kind: ([], {"unsloth_qlora": "needs CUDA"}))
    output = tmp_path / "record.json"
    size = ["--batch-size", "2", "--max-length", "16", "--repeats", "1", "--only", "lora"]
    code = main(["bench", "train", "--model", write_shape(tmp_path), "--peers", *size, "--output", str(output), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    record = json.loads(output.read_text())
    assert record == json.loads(told.out)
    assert record["status"] == "ok"
    assert record["workload"]["random_weights"]
    assert record["missing"] == {"unsloth_qlora": "needs CUDA"}
    lora = record["contenders"].pop("lora")
    assert record["contenders"] == {}
    assert len(lora["losses"]) == 5, "the first step, and two rounds of two"
    assert lora["limit_share"]["median"] > 0
    assert lora["launches_per_step"] is lora["reserved_bytes"] is None


@pytest.mark.slow
def test_a_shape_is_decoded_with(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(decode, "OURS", ("nf4",))
    record = decode.bench_decode(model=write_shape(tmp_path), repeats=1, tokens=3)
    assert record["contenders"]["nf4"]["tokens_per_s"]["median"] > 0
    assert record["contenders"]["nf4"]["text"] is None, "random weights say nothing"
    assert (record["ratios"], record["failed"], record["missing"]) == ({}, {}, {})


@pytest.mark.slow
def test_a_shape_is_planned_and_measured(tmp_path, monkeypatch):
    saved = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # one for all: a start takes seconds
        monkeypatch.setattr(plan, "in_a_process", lambda run, measure: pool.submit(measure, run.model_dump_json()).result())
        record = plan.bench_plan(model=write_shape(tmp_path), batch_size=2, length=32, save=saved.append)
    assert [run["method"] for run in record["runs"]] == ["lora", "qlora"]
    lora, qlora = record["runs"]
    assert abs(lora["allocated_error"]) < 0.02  # QLoRA's needs a process of its own: this one holds buffers by then
    assert qlora["allocated_bytes"] > 0
    assert {(run["batch_size"], run["max_length"]) for run in record["runs"]} == {(2, 32)}
    assert len(saved) == 2
    assert "seconds" not in record


def test_plan_takes_no_peers():
    with pytest.raises(ConfigError, match="once each"):
        plan.bench_plan(peers=True)


def test_eight_requests_have_an_adapter_each(tmp_path, monkeypatch):
    """What a process on CUDA does in a turn, and how its two parts become contenders."""
    with subject(write_shape(tmp_path)) as found:
        model, _ = load(found.folder, quant="nf4")
    monkeypatch.setitem(proven.refused, "few_rows", "it failed")
    decoders = []
    monkeypatch.setattr(decode, "choose", lambda *_: decoders.append(ModulesDecoder(model, "a test", static=True)) or decoders[0])
    steps = []
    step = ModulesDecoder.step
    monkeypatch.setattr(ModulesDecoder, "step", lambda self, *a, **k: steps.append((a, k)) or step(self, *a, **k))
    answer = decode._several(model, torch.arange(5))(4)
    assert (answer["tokens"], answer["text"]) == (8 * 4, None)
    assert answer["seconds"] > 0
    assert answer["of_one"] > 0
    together = [k["segments"] for a, k in steps if len(a[0]) == 8]
    assert len(together) == 2 * 4
    assert [len({id(one.adapter) for one in segments}) for segments in together] == [1] * 4 + [8] * 4
    with pytest.raises(ConfigError, match="Ask for at most 1019"):
        decode._several(model, torch.arange(5))(1020)
    alone = {"tokens": 1, "seconds": 2.0, "text": None, "plain_kernels": {}}
    both = decode._both(Measured({}, {"eight_adapters": [answer] * 2, "nf4": [alone] * 2}, {}))
    record = decode._record(both, lambda a, b: {"median": a[0] / b[0]})
    assert record["ratios"]["eight_adapters_vs_eight_of_one"]["median"] == pytest.approx(answer["of_one"] / answer["seconds"])
    assert [record["contenders"][name]["plain_kernels"] for name in ("eight_of_one", "nf4")] == [{"few_rows": "it failed"}, {}]
