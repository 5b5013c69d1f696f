"""Serving families of other layouts than Llama's. Oracle: transformers' greedy loop with one adapter loaded."""

import pytest
from mixtures import folder_of
from test_serve_mixtures import PROMPTS, alone

from lownibble.decoding import CpuDecoder

TARGETS = {
    "one": {"target_modules": "all-linear"},
    "dora": {"target_modules": r".*\.(o_proj|c_proj|fc2|dense)", "use_dora": True},
    "two": {"r": 2, "target_modules": r".*\.(o_proj|c_proj|fc2|dense)", "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3", "gpt2", "phi", "falcon", "gpt_oss"])
def test_adapters_of_every_family_share_the_server(kind, tokenizer, tmp_path, adapters_of, serving, ask):
    base = folder_of(kind, tmp_path / "base", tokenizer)
    adapters = adapters_of(base, TARGETS)
    made = serving(base, adapters)
    assert isinstance(made.decoder, CpuDecoder) == (kind in ("gemma3_text", "gemma3"))
    cases = [(prompt, name) for prompt in PROMPTS[1:] for name in (None, *TARGETS)]
    expected = [alone(base, adapters, prompt, 6, name) for prompt, name in cases]
    assert len({tuple(tokens) for tokens in expected}) > 5, "the adapters make a difference"
    told = [ask(made, prompt, 6, adapter=name)[1] for prompt, name in cases]
    for one in told:
        one.wait()
    assert [one.tokens for one in told] == expected
    again = ask(made, PROMPTS[3], 6, adapter="two")[1]
    assert (again.wait().reused_tokens > 0, again.tokens) == (True, expected[-1]), "of the prefix cache"
