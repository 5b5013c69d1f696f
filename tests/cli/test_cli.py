"""The command line as a user meets it: exit codes, one JSON document, one clear error. `--version` and `doctor` are started as a
user starts them; other processes are forked, and what needs none is a call."""

import json
import os
import subprocess
import sys

import pytest
import torch

import lownibble
from lownibble.cli import commands
from lownibble.cli.main import main

TEMPLATES = ["--prompt-template", "review : {text} sentiment :", "--completion-template", " {label}"]
SMALL = [*TEMPLATES, "--max-steps", "2", "--batch-size", "4", "--max-length", "32", "--r", "2", "--block-size", "32"]


def lownibble_(*arguments, env=None):
    """Run the command; (exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "lownibble.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def here(capsys, *arguments):
    """The same by a call: a process needs seconds to import what is imported already."""
    capsys.readouterr()
    code = main([*map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_version_and_help(capsys):
    assert lownibble_("--version")[1].strip() == f"lownibble {lownibble.__version__}"
    for command in ("doctor", "train", "compare", "study", "eval", "bench"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert f"example: lownibble {command}" in capsys.readouterr().out.replace("\n", " ")


def test_doctor_prints_one_json_document():
    code, out, err = lownibble_("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["kernels"] in ("cpu", "reference")
    assert found["versions"]["torch"] in err


@pytest.mark.slow
def test_train_leaves_the_contract_files_and_resumes(tiny_model, tiny_data, tmp_path, forked, capsys):
    output = tmp_path / "out"
    arguments = ["train", "--model", tiny_model, "--data", tiny_data, "--method", "qlora", "--output", output, *SMALL, "--json"]
    code, out, err = lownibble_(*arguments)
    assert code == 0, err
    assert json.loads(out) == json.loads((output / "record.json").read_text())
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    assert list((output / "checkpoints").iterdir())
    code, out, err = here(capsys, *arguments)
    assert code == 2
    assert "holds another run" in json.loads(out)["error"]
    code, _, err = lownibble_(*arguments, "--resume")
    assert code == 0, err


def test_train_reads_toml_and_flags_win(tiny_model, tiny_data, tmp_path, capsys):
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'model = "{tiny_model}"\nmethod = "lora"\n[data]\npath = "{tiny_data}"\nprompt_template = "{{text}} :"\n'
        'completion_template = " {label}"\n[lora]\nr = 3\n[train]\nmax_steps = 5\nbatch_size = 4\nmax_length = 32\n'
    )
    code, out, err = here(capsys, "train", toml, "--max-steps", 1, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    config = json.loads(out)["config"]
    assert (config["train"]["max_steps"], config["train"]["batch_size"], config["lora"]["r"]) == (1, 4, 3)


@pytest.fixture
def bad(tiny_model, tiny_data, tmp_path):
    """Name -> arguments of `train` that cannot work."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a film", "label": "positive"}\n{"text": \n')
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text("".join(f'{{"messages": [{{"role": "user", "content": "hi {i}"}}]}}\n' for i in range(9)))
    toml = tmp_path / "bad.toml"
    toml.write_text("[lora]\nranks = 4\n")
    base = ["--model", tiny_model, "--data", tiny_data, *SMALL]
    return {
        "rank of 0": ([*base, "--r", "0"], "'r' of LoraConfig"),
        "unknown flag": ([*base, "--lora-alfa", "1"], "--lora-alfa"),
        "unknown key": ([str(toml), *base], "no option 'ranks'"),
        "unknown model": (["--model", str(tmp_path / "no-model"), "--data", tiny_data], "There is no model"),
        "target that matches nothing": ([*base, "--target-modules", "query,value"], "q_proj"),
        "absent data": (["--model", tiny_model, "--data", str(tmp_path / "no.jsonl")], "no.jsonl"),
        "empty data": (["--model", tiny_model, "--data", empty], "empty.jsonl"),
        "broken row": (["--model", tiny_model, "--data", broken], "broken.jsonl:2"),
        "no label tokens": (["--model", tiny_model, "--data", unlabelled], "unlabelled.jsonl:1"),
        "missing CUDA": ([*base, "--device", "cuda"], "--device cpu"),
    }


BAD = (
    "rank of 0", "unknown flag", "unknown key", "unknown model", "target that matches nothing", "absent data", "empty data",
    "broken row", "no label tokens", "missing CUDA",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_and_exit_code_2(name, bad, tmp_path, forked, capsys, monkeypatch):
    arguments, words = bad[name]
    whole = ["train", *arguments, "--output", tmp_path / "out", "--json"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, out, err = lownibble_(*whole) if name in ("unknown key", "broken row") else here(capsys, *whole)
    assert code == 2, err
    assert words in json.loads(out)["error"]
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "record.json").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error(tiny_model, tiny_data, tmp_path, forked):
    """A limit on file sizes stands in for the full disk: the adapter's file is larger, the lock is not."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "from lownibble.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", "--model", tiny_model, "--data", tiny_data, *SMALL, "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: Cannot write into" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("adapter/*.safetensors")), "no half adapter is left"
    assert not list((tmp_path / "out").glob("checkpoints/step-*")), "no half checkpoint is left"


def test_an_output_that_cannot_be_written_is_exit_code_2(tiny_model, tiny_data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "x"
    code, _, err = here(capsys, "train", "--model", tiny_model, "--data", tiny_data, *SMALL, "--output", output)
    assert code == 2
    assert "error: Cannot write to the output folder" in err


@pytest.mark.parametrize(("what", "words"), [("decode", "--data is for 'bench train' and"), ("train", "no rows of 'messages'")])
def test_bench_takes_real_rows_of_messages_and_only_for_training(what, words, tiny_data, capsys):
    code, _, err = here(capsys, "bench", what, "--data", tiny_data)
    assert code == 2
    assert words in err


def test_plan_says_what_fits_where(capsys):
    code, out, err = here(capsys, "plan", "llama-2-7b", "--gpu", "t4,a100-80gb", "--batch-size", 1, "--max-length", 256, "--json")
    assert code == 0, err
    found = json.loads(out)
    verdicts = {(row["device"], row["method"]): row["fits"] for row in found["rows"]}
    assert verdicts == {
        ("t4", "full"): False, ("t4", "lora"): False, ("t4", "qlora"): True, ("a100-80gb", "full"): True,
        ("a100-80gb", "lora"): True, ("a100-80gb", "qlora"): True,
    }  # fmt: skip
    assert found["config"]["train"]["max_length"] == 256


@pytest.mark.parametrize("gpu", ["all", "rtx-4090", "cpu", "memory=24,bandwidth=1000,tflops=165"])
def test_plan_shows_a_table_and_for_one_device_bars(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = here(capsys, "plan", "--gpu", gpu, "--tokens", 10**6, "--records", tmp_path)
    assert code == 0, err
    assert "demo: 0.13B parameters, batch 8 x 512" in out
    assert ("█" in out) == (gpu != "all")
    assert ("Recommendation: lora." in out) == (gpu != "all")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lama-7b"], "Did you mean 'llama-7b'?"),
        (["demo", "--gpu", "rtx-4900"], "Did you mean 'rtx-4090'?"),
        (["demo", "--target-modules", "query,value"], "Candidates: down_proj"),
        (["demo", "--method", "dora"], "The 'method' of PlanConfig must be one of"),
        (["demo", "--optim-page-budget", "much"], "must be a size such as '64MB'"),
        (["demo", "--seed", "3"], "Unrecognized arguments: --seed"),
    ],
)
def test_plan_refuses_what_makes_no_sense(arguments, words, capsys):
    code, out, err = here(capsys, "plan", *arguments, "--json")
    assert code == 2
    assert words in json.loads(out)["error"]
    assert "Traceback" not in err


def test_claims_judges_a_file(tmp_path, capsys):
    file = tmp_path / "claims.toml"
    file.write_text('[[claim]]\nkind = "memory"\ntext = "65B"\nmodel = "llama-65b"\nmethod = "qlora"\nmemory = "12GB"\n')
    code, out, err = here(capsys, "claims", file)
    assert code == 0, err
    assert out.startswith("impossible")
    assert "1.47 bits" in out
    code, out, _ = here(capsys, "claims", tmp_path / "none.toml", "--json")
    assert code == 2
    assert "Cannot read" in json.loads(out)["error"]


@pytest.mark.slow
def test_study_runs_reports_and_says_what_is_wrong(tiny_model, tiny_data, tmp_path, forked, capsys):
    (tmp_path / "study.toml").write_text(
        f'name = "small"\nseeds = [0]\n[models]\nm = "{tiny_model}"\n[methods]\nlora = {{ method = "lora" }}\n'
        f'[tasks]\nt = {{ kind = "classification", data = "{tiny_data}" }}\n[train]\n'
        "max_steps = 1\nbatch_size = 4\nmax_length = 64\n"
    )
    output = tmp_path / "out"
    code, out, err = here(capsys, "study", "run", tmp_path / "study.toml", "--output", output, "--json")
    assert code == 0, err
    assert json.loads(out)["counts"]["finished"] == 1
    assert json.loads(out) == json.loads((output / "summary.json").read_text())
    assert main(["study", "report", str(output), "--output", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "report.html").exists()
    for arguments, words in (
        (("report", tmp_path), "holds no study"),
        (("report", output, "--jobs", "2"), "--jobs is for 'study run'"),
        (("run", tmp_path / "nowhere.toml"), "Cannot read"),
        (("run", tmp_path / "study.toml", "--jobs", "x"), "integer >= 1"),
    ):
        capsys.readouterr()
        assert main(["study", *map(str, arguments)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert words in told.err


def test_a_dry_run_is_of_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--dry-run", "--parallel", "fsdp"]) == 2
    assert "A dry run is of one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["serve", "--skip-modules", "lm_head", "MODEL"], "MODEL"),
        (["quantize", "--output", "o", "--skip-modules", "lm_head", "me/model"], "me/model"),
        (["plan", "--target-modules", "q_proj", "llama-3-8b"], "llama-3-8b"),
        (["train", "--target-modules", "q_proj", "run.toml"], "run.toml"),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_a_list_does_not_take_the_model(words, taken, tiny_model, capsys):
    words = [str(tiny_model) if word == "MODEL" else word for word in words]
    code, _, told = here(capsys, *words)
    assert code == 2
    assert f"'{words[-1]}' follows" in told
    assert f"lownibble {words[0]} {words[-1]} ..." in told


def test_data_is_given_once(tiny_data, capsys):
    code, _, told = here(capsys, "data", tiny_data, "--data", "demo")
    assert (code, "give the data once" in told) == (2, True)


def test_a_record_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "run_bench", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "record.json"):
        code, _, told = here(capsys, "bench", "published", "--output", output)
        assert code == 2, told
        assert str(output) in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nobody_reads_on():
    """The command ends as it would have, and without a traceback."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lownibble.cli.main plan llama-3-8b --gpu rtx-4090 | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_terminal_that_is_not_in_utf_8(tmp_path):
    assert lownibble_("plan", "llama-3-8b", env={"PYTHONIOENCODING": "latin-1"})[0] == 0


def test_a_terminated_command_says_so_in_json():
    code = "import os, signal, lownibble.cli.main as cli; cli.commands.doctor = lambda _: os.kill(os.getpid(), signal.SIGTERM); "
    done = subprocess.run(
        [sys.executable, "-c", code + "raise SystemExit(cli.main(['doctor', '--json']))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + 15
    assert json.loads(done.stdout) == {"status": "interrupted", "error": "Interrupted."}


def test_a_plan_takes_the_file_of_a_run(tmp_path, capsys, monkeypatch):
    """Also where a cluster says that this is process one of one."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    file = tmp_path / "run.toml"
    file.write_text('model = "llama-3-8b"\ndevice = "cpu"\nmethod = "qlora"\n')
    assert here(capsys, "plan", "--config", file, "--gpu", "rtx-4090")[0] == 0
    file.write_text('devic = "cpu"\n')
    assert "has no option 'devic'" in here(capsys, "plan", "--config", file)[2]
