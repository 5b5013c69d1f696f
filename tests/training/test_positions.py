"""Rows longer than a model's table of positions. Oracle: the model's own forward pass, on a CPU."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig

import lownibble as ln
from lownibble.config import DataConfig, TrainConfig
from lownibble.data import Encoded, Example
from lownibble.errors import DataError
from lownibble.registry import OBJECTIVES
from lownibble.training.objectives import NEXT_TOKEN, table_of_positions

HELD = 16
TABLES = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 1},
    "ctrl": {"dff": 64},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
}


def rows(length, prompt=1):
    example = Example([5] * length, [False] * prompt + [True] * (length - prompt), "rows, line 3")
    return [Encoded([example], "prompt-completion", 0)] * 2


@pytest.mark.parametrize("family", TABLES)
def test_a_row_without_a_position_is_refused(tiny, family):
    model = tiny(family, max_position_embeddings=HELD, **TABLES[family])
    assert table_of_positions(model) == HELD
    NEXT_TOKEN.check(model, rows(HELD), DataConfig())
    model(input_ids=torch.full((1, HELD), 5))
    with pytest.raises((IndexError, RuntimeError)):  # GPT-J gathers its angles
        model(input_ids=torch.full((1, HELD + 1), 5))
    with pytest.raises(DataError, match=f"rows, line 3: a row of 17 tokens, and .* has 16 positions.*--max-length {HELD}"):
        NEXT_TOKEN.check(model, rows(HELD + 1), DataConfig())


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gpt_neox", {}), ("xglm", {"ffn_dim": 64})])
def test_positions_that_are_computed_as_needed_have_no_end(tiny, family, options):
    model = tiny(family, max_position_embeddings=HELD, **options)
    model(input_ids=torch.full((1, 3 * HELD), 5))
    NEXT_TOKEN.check(model, rows(3 * HELD), DataConfig())


def test_both_inputs_of_an_encoder_and_decoder_have_positions():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50}
    model = AutoModelForSeq2SeqLM.from_config(BartConfig(max_position_embeddings=HELD, **sizes, **widths))
    NEXT_TOKEN.check(model, rows(2 * HELD - 2, HELD - 1), DataConfig())  # the end after one, the start before the other
    for prompt in (HELD, HELD - 2):
        with pytest.raises(DataError, match="a row of 17 tokens"):
            NEXT_TOKEN.check(model, rows(2 * HELD - 2, prompt), DataConfig())


PAIR = {"prompt": "the film", "chosen": " was good", "rejected": " was " + "very " * HELD + "bad"}
LABELLED = [
    {"prompt": "the film", "completion": " was " + "very " * (HELD - 4) + "bad", "label": False},
    {"prompt": "the film was", "completion": " good", "label": True},
]  # fmt: skip
"""Of which the second prompt with the first answer alone is too long."""


@pytest.mark.parametrize(("objective", "wrong"), [("dpo", [PAIR]), ("kto", LABELLED)])
def test_every_sequence_of_a_preference_has_positions(tiny, tiny_model, tmp_path, objective, wrong):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_path=str(tmp_path / "rows.jsonl"))
    tokenizer = ln.load(str(tiny_model), device="cpu")[1]
    config = TrainConfig(objective=objective, batch_size=2)
    chosen = OBJECTIVES[objective].of(config)
    encoded = [chosen.encode(side, tokenizer, data, config.max_length) for side in ln.data.load(data)]
    with pytest.raises(DataError, match=f"tokens, and GPT2LMHeadModel has {HELD} positions"):
        chosen.check(tiny("gpt2", max_position_embeddings=HELD, **TABLES["gpt2"]), encoded, data)
