"""What ends an answer. Oracle: a table, written by hand, of what ends a turn in each of TRL's templates of real models."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from lownibble.data.ends import end_tokens, turn_ends

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
ENDS = {
    "cohere": {"<|END_OF_TURN_TOKEN|>"}, "deepseek": {"<｜end▁of▁sentence｜>"}, "gemma": {"<end_of_turn>"},
    "gemma4": {"<turn|>", "<|tool_response>"}, "gemma4_v2": {"<turn|>"}, "diffusion_gemma": {"<turn|>", "<|tool_response>"},
    "glm4moe": {"<|user|>", "<|observation|>"}, "gptoss": {"<|return|>", "<|call|>"}, "idefics3": {"<end_of_utterance>"},
    "smolvlm": {"<end_of_utterance>"}, "lfm2": {"<|im_end|>"}, "llama3": {"<|eot_id|>"}, "llava_next": {"</s>"},
    "muse_glimmer": {"<|eot|>"}, "nemotron": {"<|im_end|>"}, "phi3": {"<|end|>"}, "qwen": {"<|im_end|>"},
}  # fmt: skip
"""By the beginning of a template's name, the longest that fits."""


def expected(name):
    return ENDS[max((start for start in ENDS if name.startswith(start)), key=len)]


def of_model(tokenizer, template):
    """The tokenizer with the template and, as special tokens, what the template prints that looks like one."""
    made = copy.deepcopy(tokenizer)
    made.chat_template, made.bos_token = template, "<s>"
    names = set(re.findall(r"<[|｜/]?[A-Za-z_▁]+[|｜]?>|\[/?[A-Z_]+\]", template))
    special = [name for name in names if re.search(r"[|｜\[]|_turn>|utterance>|^</s>", name)]
    made.add_special_tokens({"additional_special_tokens": [*made.all_special_tokens, *sorted(special)]})
    return made


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_a_turn_ends_as_its_template_ends_it(tokenizer, name):
    made = of_model(tokenizer, (FOLDER / f"{name}.jinja").read_text())
    assert set(made.convert_ids_to_tokens(turn_ends(made))) == expected(name)


ENDLESS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
TO_COME = "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' }}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [None, ENDLESS, "{{ raise_exception('no') }}", "{{ messages[9].content }}"])
def test_templates_without_an_end(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    assert turn_ends(made) == frozenset()


def test_the_next_turn_ends_one_that_nothing_else_ends(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TO_COME
    assert turn_ends(made) == {made.convert_tokens_to_ids("<|im_start|>")}


def test_all_that_is_named(tokenizer):
    """Of model, generation config, tokenizer and template, as one number or as a list."""
    made = copy.deepcopy(tokenizer)
    made.eos_token = "<s>"
    inner = SimpleNamespace(eos_token_id=300)
    config = SimpleNamespace(eos_token_id=[301, 302], get_text_config=lambda: inner)
    model = SimpleNamespace(config=config, generation_config=GenerationConfig(eos_token_id=303))
    assert end_tokens(model, made) == {300, 301, 302, 303, *made.convert_tokens_to_ids(["<s>", "<|im_end|>"])}
    model.generation_config, config.eos_token_id = GenerationConfig(), None
    assert end_tokens(model, made) == {300, *made.convert_tokens_to_ids(["<s>", "<|im_end|>"])}
