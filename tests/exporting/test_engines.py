"""Folders for Ollama and vLLM. Oracles: the tokenizer's own rendering, and the live adapter. Neither engine is at hand."""

import json
import re
import shlex

import gguf
import pytest
import torch
from test_export import byte_level_bpe
from transformers import AutoTokenizer

import lownibble as ln
from lownibble.cli.main import main
from lownibble.errors import AdapterError, ConfigError, ModelError, OutputError
from lownibble.exporting.engines import chat_pieces, modelfile

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<h>' + m.role + '</h>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    ),
}  # fmt: skip
CONVERSATIONS = [
    ["user"], ["system", "user"], ["system", "user", "assistant", "user"], ["user", "assistant", "user", "assistant", "user"],
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    byte_level_bpe(tmp_path, "gpt-2")
    return AutoTokenizer.from_pretrained(tmp_path)


def in_go(template, messages):
    """What Ollama's template gives: a loop over the messages, in which roles are told apart."""
    start, body, answer = re.fullmatch(r"(?s)(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template).groups()
    branches = re.findall(r'(?s)\{\{ (?:if|else if) eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body)
    said = dict(branches)
    return start + "".join(said[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + answer


@pytest.mark.parametrize("kind", TEMPLATES)
def test_ollamas_template_renders_what_the_tokenizer_renders(tokenizer, kind):
    tokenizer.chat_template = TEMPLATES[kind]
    text, warning = modelfile(tokenizer, adapter=True)
    assert text.startswith("FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE")
    template = re.search(r'(?s)TEMPLATE """(.*?)"""', text)[1]
    for roles in CONVERSATIONS if kind != "mistral" else CONVERSATIONS[::3]:
        messages = [{"role": role, "content": f"text {n} of {role}"} for n, role in enumerate(roles)]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert in_go(template, messages) == expected
    assert ("no turn for the system role" in (warning or "")) == (kind == "mistral")
    assert 'PARAMETER stop "<|eos|>"\n' in text


def test_a_template_that_pieces_do_not_give_is_left_out(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}"
    assert chat_pieces(tokenizer) is None
    text, warning = modelfile(tokenizer, adapter=False)
    assert "TEMPLATE" not in text
    assert "could not be put" in warning


@pytest.fixture
def base(tiny, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    size = byte_level_bpe(folder, "gpt-2")
    tiny("llama", vocab_size=size, hidden_size=64, intermediate_size=128, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    return folder


def test_the_folder_for_ollama(base, adapt, tmp_path, capsys):
    _, adapter = adapt(base, "nf4", target_modules=["q_proj", "down_proj"])
    assert main(["export", str(adapter), "--format", "ollama", "--dtype", "q8_0", "--output", str(tmp_path / "Out")]) == 0
    said = capsys.readouterr().out
    assert f"ollama create out -f {tmp_path / 'Out' / 'Modelfile'}" in said
    assert "trained on quantised weights" in said
    assert sorted(path.name for path in (tmp_path / "Out").iterdir()) == ["Modelfile", "adapter.gguf", "model.gguf"]
    assert len(gguf.GGUFReader(tmp_path / "Out" / "adapter.gguf").tensors) == 8
    assert main(["export", str(base), "--format", "gguf", "--output", str(tmp_path / "out.gguf")]) == 0
    assert "Serve it with" not in capsys.readouterr().out
    model = ln.export(base, tmp_path / "model", "ollama")
    assert "ADAPTER" not in (tmp_path / "model" / "Modelfile").read_text()
    assert model["tensors"] == 21


@pytest.mark.filterwarnings("ignore:.*trained on:UserWarning")
def test_adapters_for_vllm_have_one_rank_and_one_scale(base, adapt, tmp_path):
    """And the numbers of the live adapter."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 9}, "use_rslora": True}
    live, one = adapt(base, None, name="adapters/one", **options)
    adapt(base, None, name="adapters/two", r=2, target_modules="all-linear")
    made = ln.export(one.parent, tmp_path / "out", "vllm")
    command = shlex.split(made["command"])
    assert command[:3] == ["vllm", "serve", str(base)]
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert command[-2:] == [f"{name}={tmp_path / 'out' / 'adapters' / name}" for name in ("one", "two")]
    config = json.loads((tmp_path / "out" / "adapters" / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (9, False, {}, {})
    model = ln.load_adapter(ln.load(str(base))[0], tmp_path / "out" / "adapters" / "one").eval()
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)


def test_outputs_are_named_by_the_folder_that_the_adapter_is(base, adapt, tmp_path, monkeypatch):
    adapt(base, None, name="mine", target_modules=["q_proj"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "mine")
    for number, source in enumerate((".", "~/mine")):
        assert ln.export(source, f"~/vllm{number}", "vllm")["adapters"] == ["mine"]
        ln.export(source, f"~/{number}.gguf", "gguf")
        read = gguf.GGUFReader(tmp_path / f"{number}.gguf")
        assert read.fields[gguf.Keys.General.NAME].contents() == "mine"


def test_the_base_for_vllm_in_compressed_tensors(base, adapt, tmp_path):
    _, adapter = adapt(base, None, target_modules=["q_proj"])
    quant = {"quant_type": "int4"}
    made = ln.export(adapter, tmp_path / "out", "vllm", quant=quant)
    assert made["base"] == str(tmp_path / "out" / "base")
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert f"vllm serve {made['base']} --enable-lora" in made["command"]


def test_what_vllm_does_not_load_is_refused(base, adapt, tmp_path):
    for name, options, says in (
        ("dora", {"use_dora": True}, "'dora' is no plain LoRA.*Merge it"),
        ("activated", {"alora_invocation_tokens": [3]}, "'activated' is no plain LoRA.*Serve it"),
        ("rank", {"r": 513, "target_modules": ["q_proj"]}, "ranks up to 512, and these have 513. Merge"),
        ("pattern", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 600}}, "and these have 600"),
        ("head", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "'head' changes .*lm_head"),
    ):
        with pytest.raises(AdapterError, match=says):
            ln.export(adapt(base, None, name=name, **options)[1], tmp_path / "out", "vllm")
    with pytest.raises(ConfigError, match="--base is for adapters"):
        ln.export(base, tmp_path / "out", "vllm", base=str(base))
    assert not (tmp_path / "out").exists()


def unknown_splits(base, monkeypatch):
    """Refused when the adapter is written already."""
    found = json.loads((base / "tokenizer.json").read_text())
    found["pre_tokenizer"]["use_regex"] = False
    (base / "tokenizer.json").write_text(json.dumps(found))


def full_disk(base, monkeypatch):
    def split(adapter, model, folder, **_):
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lownibble.exporting.engines.split", split)


@pytest.mark.parametrize(("form", "fault"), [("ollama", unknown_splits), ("vllm", full_disk)])
@pytest.mark.parametrize("was_there", [False, True])
def test_what_fails_leaves_the_output_free(base, adapt, tmp_path, monkeypatch, form, fault, was_there):
    _, adapter = adapt(base, None, target_modules=["q_proj"])
    fault(base, monkeypatch)
    output = tmp_path / "out"
    if was_there:
        output.mkdir()
    for _ in range(2):  # the same error again, not that the output holds something
        with pytest.raises((ModelError, OSError), match=r"not known here|No space left"):
            ln.export(adapter, output, form)
        assert output.is_dir() == was_there
        assert not list(output.glob("*"))


def test_of_a_base_that_does_not_fit_nothing_is_said_to_be_kept(base, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lownibble.exporting.merge.tensorfile.write", full)
    for _ in range(2):
        with pytest.raises(OutputError, match=r"No space left on device. Free some space, or choose another --output"):
            ln.export(base, tmp_path / "out", "vllm", quant={"quant_type": "int4"})
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_a_tied_head_is_refused(tiny, adapt, tmp_path, tied):
    """llama.cpp wants a tensor of the base for each tensor of an adapter. What the checkpoint has counts."""
    base = tmp_path / "base"
    base.mkdir()
    options = {"vocab_size": byte_level_bpe(base, "gpt-2"), "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    tiny("llama", tie_word_embeddings=tied, **options).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    ln.export(base, tmp_path / "model.gguf", "gguf")
    held = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in held) != tied
    _, adapter = adapt(base, None, target_modules=["q_proj", "lm_head"])
    for form, output in (("gguf", tmp_path / "adapter.gguf"), ("ollama", tmp_path / "out")):
        if tied:
            with pytest.raises(AdapterError, match=r"adapts 'lm_head', which is tied to the embedding.*: lownibble merge"):
                ln.export(adapter, output, form)
            assert not output.exists()
        else:
            ln.export(adapter, output, form)
            file = output / "adapter.gguf" if form == "ollama" else output
            assert {tensor.name.rpartition(".lora_")[0] for tensor in gguf.GGUFReader(file).tensors} <= held
