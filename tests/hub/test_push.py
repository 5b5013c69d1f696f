"""Cards and pushes. Oracles: the records; a stand-in for the hub's HTTP API (hub_server.py) that huggingface_hub talks to."""

import json
import os
import shutil
import subprocess
import sys
import tomllib

import hub_server
import pytest
from huggingface_hub import ModelCard, constants
from mixtures import folder_of
from safetensors.torch import load, load_file, save_file

from lownibble import merge, push
from lownibble.cli.main import main
from lownibble.config import DataConfig, LoraConfig, QuantizeConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError, HubError, OutputError
from lownibble.exporting.quantize import run_quantize
from lownibble.hub.card import hub_id
from lownibble.training import run

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=.*to upload raw bytes")  # huggingface_hub's own call
DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, tiny_data):
    """The output folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    train = TrainConfig(max_steps=2, batch_size=4, max_length=32, output_dir=str(folder))
    run(RunConfig(model=str(tiny_model), method="qlora", data=DataConfig(path=str(tiny_data), max_rows=40, **DATA),
                  lora=LoraConfig(r=2), quant={"block_size": 32}, train=train))  # fmt: skip
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, as the hub of this process."""
    with hub_server.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield hub


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of the run, to write cards into."""
    shutil.copytree(trained, tmp_path / "first")
    return tmp_path / "first"


def facts_in(file):
    """What an adapter's file says of its base."""
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return json.loads(header["__metadata__"]["lownibble_trained_on"])


def test_a_run_is_pushed_with_a_card_of_its_record(trained, hub, tiny_model):
    done = push(trained, "first", base="org/base")
    there = hub.repos["me/first"]
    assert done["repo"] == "me/first"
    assert done["commit"] == "abc"
    assert there["visibility"] == "private"
    assert set(there["files"]) == set(done["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    mine, uploaded = trained / "adapter" / "adapter_model.safetensors", there["files"]["adapter_model.safetensors"]
    assert {name: tensor.tolist() for name, tensor in load(uploaded).items()} == {
        name: tensor.tolist() for name, tensor in load_file(mine).items()
    }
    before, after = (facts_in(each) for each in (mine.read_bytes(), uploaded))
    assert before["model"] == str(tiny_model)
    assert after == before | {"model": "org/base"}
    ours = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert json.loads(there["files"]["adapter_config.json"]) == ours | {"base_model_name_or_path": "org/base"}
    for local in (trained.parent, tiny_model):
        assert str(local).encode() not in b"".join(there["files"].values()), "no local path leaves the machine"

    text = there["files"]["README.md"].decode()
    record = json.loads((trained / "record.json").read_text())
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == ("org/base", "mit", "peft")
    assert {"lownibble", "qlora"} <= set(data.tags)
    first, last = record["evaluations"][0], record["evaluations"][-1]
    n = len(last["correct"])
    error = (last["scores"]["accuracy"] * (1 - last["scores"]["accuracy"]) / (n - 1)) ** 0.5
    assert f"| loss, nats per label token | {first['loss']:.4f} | {last['loss']:.4f} |" in text
    assert f"{last['scores']['accuracy']:.3f} ± {error:.3f} |" in text
    assert record["data"]["train_digest"] in text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "me/first")' in text
    assert 'ln.load("org/base", quant=ln.QuantConfig(block_size=32))' in text
    options = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    asked = record["config"]
    assert options["quant"] == {name: value for name, value in asked["quant"].items() if value is not None}
    assert RunConfig(**options).train == RunConfig(**asked).train.with_options(output_dir=None)
    assert options["lora"]["r"] == 2

    push(trained, "first", base="org/base", public=True)
    assert there["visibility"] == "private", "one that is there keeps its visibility"


def test_a_dry_run_writes_the_card_only_and_an_edited_one_is_kept(adapter, hub):
    hub.licences.clear()
    done = push(adapter, "org/named", base="org/base", dry_run=True)
    card = adapter / "adapter" / "README.md"
    assert done["card"] == str(card)
    assert hub.repos == {}
    assert "That of the base model: not known to Lownibble" in card.read_text()
    with pytest.raises(OutputError, match=r"README\.md' is there already"):
        push(adapter, "org/named", base="org/base", dry_run=True)
    card.write_text("---\nlicense: mit\n---\nMine.\n")
    push(adapter / "adapter", "org/named", base="org/base", public=True)
    assert hub.repos["org/named"]["files"]["README.md"] == card.read_bytes()
    assert hub.repos["org/named"]["visibility"] == "public"


def test_a_merged_model_has_the_merge_and_the_training_on_its_card(trained, hub, tmp_path, tiny_model):
    merged = tmp_path / "merged"
    measured = merge(str(trained / "adapter"), str(merged), onto="original")["measured"]["models"]
    done = push(merged, "me/merged")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(done["files"])
    assert {"merge.json", "record.json"}.isdisjoint(done["files"]), "they hold paths"
    assert hub.repos["me/merged"]["files"]["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    text = hub.repos["me/merged"]["files"]["README.md"].decode()
    for name, row in (("original", "merged onto original (this one)"), ("nf4", "merged onto nf4"), ("base", "base alone")):
        at = measured[name]["label_tokens"]
        kl, same = f"{at['kl']:.3g} ± {at['kl_standard_error']:.1g}", f"{at['top1_agreement']:.1%}"
        assert f"| {row} | {kl} | {same} | {at['perplexity']:.4g} |" in text
    assert f"| adapter beside its base | - | - | {measured['live']['label_tokens']['perplexity']:.4g} |" in text
    assert "## Data" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/merged")' in text
    assert str(tiny_model) not in text
    (merged / "merge.json").unlink()
    push(merged, "me/bare")
    assert "There is no record of the training" in hub.repos["me/bare"]["files"]["README.md"].decode()


def test_the_folder_may_be_the_working_directory_and_the_record_is_of_a_runs_own_result(adapter, hub, monkeypatch):
    monkeypatch.chdir(adapter / "adapter")
    push(".", "me/inside", base="org/base")
    assert "## Data" in hub.repos["me/inside"]["files"]["README.md"].decode()
    (adapter / "adapter").rename(adapter / "another")
    push(adapter / "another", "me/another", base="org/base")
    assert "There is no record of the training" in hub.repos["me/another"]["files"]["README.md"].decode()


def test_a_card_of_an_activated_adapter_says_from_where_on_it_is_active(adapter, hub):
    file = adapter / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": [5, 7]}))
    push(adapter, "me/activated", base="org/base")
    assert "active from the last occurrence of the tokens [5, 7]" in hub.repos["me/activated"]["files"]["README.md"].decode()


def test_a_card_of_a_preference_run_that_took_no_step_when_resumed(adapter, hub):
    file = adapter / "record.json"
    record = json.loads(file.read_text())
    record["config"]["train"]["objective"] = "dpo"
    record["reference"] = {"computed": "with each step", "adapter": "off"}
    record["speed"] = {"compiled_s": 1.0}
    for each in record["evaluations"]:
        each["scores"] = {"rewards/accuracies": 0.5}
    file.write_text(json.dumps(record))
    push(adapter, "me/dpo", base="org/base")
    text = hub.repos["me/dpo"]["files"]["README.md"].decode()
    assert "| loss of dpo |" in text
    assert "nats per label token" not in text
    assert "±" not in text
    assert "Row by row" not in text
    assert "- speed" not in text


def test_an_encoder_decoder_is_loaded_as_one(adapter, hub, tmp_path):
    config = adapter / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_2_SEQ_LM"}))
    model = tmp_path / "t5"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text('{"is_encoder_decoder": true}')
    push(adapter, "me/adapter", base="org/t5")
    push(model, "me/t5")
    for repo, loaded in (("me/adapter", "org/t5"), ("me/t5", "me/t5")):
        text = hub.repos[repo]["files"]["README.md"].decode()
        assert f'AutoModelForSeq2SeqLM.from_pretrained("{loaded}")' in text
        assert "AutoModelForCausalLM" not in text
        assert ModelCard(text).data.pipeline_tag == "text2text-generation"


def test_nothing_is_made_on_the_hub_if_the_card_cannot_be_rendered(adapter, hub):
    (adapter / "record.json").write_text('{"kind": "train"}')
    with pytest.raises(KeyError):
        push(adapter, "me/x", base="org/base")
    assert hub.repos == {}


def test_what_cannot_be_pushed_is_refused(trained, hub, tmp_path):
    with pytest.raises(ConfigError, match="holds no adapter and no model"):
        push(tmp_path, "me/x")
    with pytest.raises(ConfigError, match=r"is no id of a repository: .* Give owner/name"):
        push(trained, "me/x/y")
    with pytest.raises(ConfigError, match=r"base is '.*' on this machine, which others cannot load. Name it with --base"):
        push(trained, "me/x")
    for base in (str(tmp_path), "no id"):
        with pytest.raises(ConfigError, match="is no id on the hub"):
            push(trained, "me/x", base=base)
    assert hub.calls == []


def test_a_packed_model_does_not_tell_where_it_was_made(hub, tiny_model, tmp_path):
    run_quantize(QuantizeConfig(model=str(tiny_model), output=str(tmp_path / "packed"), rounding="rtn"))
    before = json.loads((tmp_path / "packed" / "config.json").read_text())
    for options, name in (({}, tiny_model.name), ({"base": "org/base"}, "org/base")):
        push(tmp_path / "packed", "me/packed", **options)
        files = hub.repos["me/packed"]["files"]
        after = json.loads(files["config.json"])
        assert before["quantized_from"]["model"] == str(tiny_model)
        assert after == before | {"quantized_from": before["quantized_from"] | {"model": name}}
        assert str(tiny_model).encode() not in b"".join(files.values())


def text_of(hub, repo):
    return hub.repos[repo]["files"]["README.md"].decode()


def rewritten(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_card_of_a_packed_model_registers_its_layers_with_transformers(hub, tiny_model, tmp_path):
    packed = tmp_path / "packed"
    run_quantize(QuantizeConfig(model=str(tiny_model), output=str(packed), rounding="rtn", format="lownibble"))
    push(packed, "me/packed")
    code = text_of(hub, "me/packed").partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import lownibble.integrations.transformers")
    space = {}
    exec(code.replace("me/packed", str(packed)), space)
    assert type(space["model"].model.layers[0].mlp.up_proj).__name__ == "NF4Linear"
    run_quantize(QuantizeConfig(model=str(tiny_model), output=str(tmp_path / "bnb"), rounding="rtn"))
    push(tmp_path / "bnb", "me/bnb")
    assert "integrations.transformers" not in text_of(hub, "me/bnb"), "bitsandbytes' format"


def test_a_mixture_with_packed_experts_is_loaded_by_us_alone(hub, tmp_path, tokenizer):
    folder = folder_of("qwen3_moe", tmp_path / "mixture", tokenizer)
    for name, quant in (("all", {}), ("experts dense", {"quant_type": "int8", "skip_modules": ["lm_head", "experts"]})):
        run_quantize(QuantizeConfig(model=str(folder), output=str(tmp_path / name), rounding="rtn", quant=quant))
        push(tmp_path / name, "me/mixture")
        text = text_of(hub, "me/mixture")
        assert 'ln.load("me/mixture")' in text
        assert ("from transformers import" in text) == (name == "experts dense")


def test_an_adapter_of_the_demo_is_loaded_on_the_weights_that_it_has_the_digest_of(adapter, hub):
    rewritten(adapter / "adapter" / "adapter_config.json", base_model_name_or_path="demo")
    push(adapter, "me/demo")
    text = text_of(hub, "me/demo")
    assert 'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"), "me/demo")' in text
    assert 'ln.load("demo", quant=' in text


@pytest.mark.parametrize("ours", [False, True])
def test_a_pinned_revision_is_in_the_code(adapter, hub, ours):
    """PEFT has it in the configuration, Lownibble in the metadata of the weights."""
    rewritten(
        adapter / "adapter" / "adapter_config.json", base_model_name_or_path="org/base", **{} if ours else {"revision": "v2"}
    )
    if ours:
        file = adapter / "adapter" / "adapter_model.safetensors"
        facts = json.dumps(facts_in(file.read_bytes()) | {"model": "org/base", "revision": "v2"})
        save_file(load_file(file), file, {"format": "pt", "lownibble_trained_on": facts})
    push(adapter, "me/pinned")
    text = text_of(hub, "me/pinned")
    assert 'from_pretrained("org/base", revision="v2"), "me/pinned")' in text
    assert 'ln.load("org/base", quant=ln.QuantConfig(block_size=32), revision="v2")' in text
    push(adapter, "me/other", base="org/other")
    assert "v2" not in text_of(hub, "me/other")


@pytest.mark.parametrize(
    ("path", "expected"), [("demo", None), ("org/rows", ["org/rows"]), ("org/rows:easy", ["org/rows"]), ("data/rows", None)]
)
def test_data_of_the_card_are_those_of_the_hub(adapter, hub, path, expected):
    """A relative name is one where the run was started, wherever it is pushed from."""
    record = json.loads((adapter / "record.json").read_text())["config"]
    (adapter.parent / "data" / "rows").mkdir(parents=True)
    record["data"]["path"], record["train"]["output_dir"] = path, adapter.name
    rewritten(adapter / "record.json", config=record)
    push(adapter, "me/data", base="org/base")
    text = text_of(hub, "me/data")
    assert ModelCard(text).data.datasets == expected
    assert ("data/rows" in text) is False


def test_a_full_models_base_is_none_of_the_hub_if_it_was_a_folder(adapter, hub, tiny_model):
    """The same for the model that was trained."""
    record = json.loads((adapter / "record.json").read_text())["config"]
    record["model"], record["method"], record["train"]["output_dir"] = "models/base", "full", adapter.name
    rewritten(adapter / "record.json", config=record)
    shutil.copytree(tiny_model, adapter.parent / "models" / "base")
    shutil.copytree(tiny_model, adapter / "model")
    push(adapter / "model", "me/full")
    text = text_of(hub, "me/full")
    assert ModelCard(text).data.base_model is None
    assert "models/base" not in text


def test_no_configuration_tells_a_local_path(hub, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    rewritten(folder / "config.json", _name_or_path="/home/me/secret/base", text_config={"_name_or_path": "org/there"})
    rewritten(folder / "tokenizer_config.json", name_or_path="/home/me/secret/base")
    push(folder, "me/x")
    files = hub.repos["me/x"]["files"]
    assert b"secret" not in b"".join(files.values())
    assert (
        json.loads(files["config.json"])["_name_or_path"] == json.loads(files["tokenizer_config.json"])["name_or_path"] == "base"
    )
    assert json.loads(files["config.json"])["text_config"]["_name_or_path"] == "org/there"


def test_state_of_a_trainer_stays_and_templates_go(adapter, hub):
    folder = adapter / "adapter"
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"state")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    done = push(adapter, "me/checkpoint", base="org/base")
    mine = {"README.md", "adapter_config.json", "adapter_model.safetensors", "additional_chat_templates/tool_use.jinja"}
    assert set(done["files"]) == set(hub.repos["me/checkpoint"]["files"]) == mine


def test_damaged_files_and_records_of_runs_that_failed(adapter, hub):
    (adapter / "record.json").write_text('{"kind": "train", "status": "failed", "error": "boom"}')
    push(adapter, "me/x", base="org/base")
    assert "boom" not in hub.repos["me/x"]["files"]["README.md"].decode()
    rewritten(adapter / "adapter" / "adapter_config.json", base_model_name_or_path="org/base")
    (adapter / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors' cannot be read"):
        push(adapter, "me/y")
    for text in ("{", "[]"):
        (adapter / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"adapter_config.json' (cannot be read|is no JSON object)"):
            push(adapter, "me/y", base="org/base")


def test_errors_of_the_hub_are_one_sentence(trained, hub, monkeypatch):
    def message():
        with pytest.raises(HubError) as caught:
            push(trained, "me/x", base="org/base")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    hub.forbidden.add("me/x")
    assert message() == "The token may not write to 'me/x'. Use one with write access to it, or a repository of your own."
    hub.forbidden.clear()
    hub.broken["/lfs/"] = 413
    assert "The hub did not take 'me/x': it is broken. Mend that" in message()
    monkeypatch.setenv("HF_TOKEN", "hf_an_old_one")
    assert "does not know the token. Run 'hf auth login'" in message()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert message().startswith("The hub (http://127.0.0.1:9) cannot be reached: ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in message()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
    monkeypatch.setattr("huggingface_hub.utils._auth.constants.HF_TOKEN_PATH", "/no/such/file")
    assert "There is no token for the hub" in message()


def test_the_command_line_reaches_the_hub_by_hf_endpoint(trained, hub):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    words = ["push", str(trained), "me/by-command", "--base", "org/base", "--json"]
    code = (
        f"import sys; from lownibble.cli.main import main; code = main({words}); sys.exit(code or 9 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["repo"] == "me/by-command"
    assert "README.md" in hub.repos["me/by-command"]["files"]


def test_a_run_is_pushed_when_it_is_done_and_kept_when_that_fails(hub, tiny_model, tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lownibble.hub.push.hub_id", lambda name: "org/base" if name == str(tiny_model) else hub_id(name))

    def train(name, repo, **options):
        words = [
            "train",
            "--model",
            str(tiny_model),
            "--data",
            str(tiny_data),
            "--method",
            "lora",
            "--r",
            "2",
            "--max-steps",
            "1",
        ]
        words += ["--max-length", "32", "--max-rows", "40", "--output", str(tmp_path / name), "--push-to-hub", repo, "--json"]
        for key, template in DATA.items():
            words += [f"--{key.replace('_', '-')}", template]
        return main(words), json.loads(capsys.readouterr().out)

    code, result = train("a", "me/a")
    assert code == 0
    assert result["push"]["repo"] == "me/a"
    assert "adapter_model.safetensors" in hub.repos["me/a"]["files"]

    hub.broken["/api/repos/create"] = 507
    code, result = train("b", "me/b")
    assert code == 1
    assert result["status"] == "failed"
    assert f"The run is complete; to push it: lownibble push {tmp_path / 'b'} me/b" in result["error"]
    assert json.loads((tmp_path / "b" / "record.json").read_text())["status"] == "ok"
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").exists()

    for repo, role in (("someone-else/c", "write"), ("me/c", "read")):  # known before anything is trained
        hub.role = role
        code, result = train("c", repo)
        assert code == 1
        assert f"may not write to '{repo}'" in result["error"]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/base", "org/base"),
        ("/a/b", None),
        ("a.gguf", None),
        (".", None),
        ("data/rows.jsonl", None),
    ],
)
def test_what_a_models_name_is_on_the_hub(name, expected):
    assert hub_id(name) == expected
