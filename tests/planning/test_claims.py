"""Judging statements. Oracle: the verdicts that were worked out by hand for the articles (issue, section 'claims')."""

import pytest

from lownibble.errors import ConfigError, ModelError
from lownibble.planning.claims import judge_claim, judge_file

MEMORY = {"kind": "memory", "model": "llama-65b", "method": "qlora", "memory": "48GB"}


@pytest.fixture(scope="module")
def articles():
    return {each.text: each for each in judge_file()}


@pytest.mark.parametrize(
    ("begin", "verdict"),
    [
        ("LLaMA-65B, full fine-tuning: peak 780 GB", "consistent"),
        ("LLaMA-65B, LoRA: peak 48 GB", "impossible"),
        ("LLaMA-65B, QLoRA: peak 12 GB", "impossible"),
        ("LLaMA-65B, QLoRA: below 48 GB", "consistent"),
        ("30B: LoRA 0.8 steps/s, QLoRA 0.5", "implausible"),
        ("Llama-2-7B, r = 64 on all linears and the head, batch 4 x 512, A10G: LoRA 21.5 GB", "implausible"),
        ("Llama-2-7B, r = 64, batch 4 x 512, A10G: LoRA 120 s", "implausible"),
        ("QLoRA 65B on one A100", "consistent"),
        ("LoRA 65B requires multiple GPUs", "consistent"),
        ("LoRA 65B on four A100 80GB", "consistent"),
        ("QLoRA 65B on one card of 48 GB", "consistent"),
        ("SST-2", "not decided"),
    ],
)
def test_the_articles(articles, begin, verdict):
    [found] = [each for text, each in articles.items() if text.startswith(begin)]
    assert found.verdict == verdict, found.arithmetic


def test_every_judgement_shows_its_arithmetic(articles):
    assert len(articles) >= 20
    for each in articles.values():
        assert each.arithmetic
        assert each.source
        if each.verdict != "not decided":
            assert any(character.isdigit() for line in each.arithmetic for character in line)


def test_the_bound_of_impossible_is_named():
    found = judge_claim({**MEMORY, "memory": "12GB"})
    assert found.verdict == "impossible"
    assert "12.0 GB are 1.47 bits for each of 65.29e9 parameters" in found.arithmetic[0]
    assert "linears 33.4 GB at 4.127 bits" in found.arithmetic[1]


def test_what_does_not_fit_one_card_is_said_to_fit_several(articles):
    assert "it fits on 2 of them, each with a part (fsdp)" in articles["LoRA 65B requires multiple GPUs (A100 80GB)"].arithmetic
    full = {"kind": "fits", "model": "llama-65b", "method": "full", "gpu": "rtx-3060", "fits": True, "gpus": 2}
    found = judge_claim(full)
    assert found.verdict == "impossible"
    assert found.arithmetic[-1] == "nor on up to 16 of them"
    with pytest.raises(ConfigError, match=r"The 'gpus' of a claim must be an integer >= 1\. Got 0"):
        judge_claim({**full, "gpus": 0})


@pytest.mark.parametrize("memory", ["300MB", "900GB"])
def test_far_too_little_and_far_too_much(memory):
    assert judge_claim({**MEMORY, "model": "smollm2-1.7b", "memory": memory}).verdict != "consistent"


def test_faster_than_the_device_can_be():
    claim = {
        "kind": "time",
        "model": "llama-2-7b",
        "method": "lora",
        "gpu": "t4",
        "step_s": 0.1,
        "batch_size": 4,
        "max_length": 512,
    }
    found = judge_claim(claim)
    assert found.verdict == "impossible"
    assert "more operations than the device can do" in found.arithmetic


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({}, "The 'kind' of the claim must be one of memory, time"),
        ({"kind": "memory", "model": "demo"}, "The claim lacks memory, method"),
        ({**MEMORY, "colour": "red"}, "The claim has what is not known: colour"),
    ],
)
def test_statements_that_cannot_be_read(claim, message):
    with pytest.raises(ConfigError, match=message):
        judge_claim(claim)


def test_an_unknown_model():
    with pytest.raises(ModelError, match="There is no model"):
        judge_claim({**MEMORY, "model": "gpt"})


@pytest.mark.parametrize("text", ["", "claim = 1", "[other]\n", "[[claim]]\nkind = 'quality'\nmeasure = 'x'\n[more]\n"])
def test_files_without_statements(tmp_path, text):
    file = tmp_path / "claims.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"must hold tables \[\[claim\]\]"):
        judge_file(file)
