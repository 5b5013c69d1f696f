"""Sampling options. Oracle: transformers' own logits processors, in the order that vLLM applies them."""

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lownibble.serve.sampling import Sampler, Sampling

V = 40
LOGITS = 3 * torch.randn(V, generator=torch.Generator().manual_seed(2))
PROMPT = [3, 7, 7, 11]


def drawn(sampling, n=1500, prompt=PROMPT):
    """Share of each token among the first draws of `n` samplers."""
    tokens = [Sampler(sampling._replace(seed=seed), prompt)(LOGITS).token for seed in range(n)]
    return torch.bincount(torch.tensor(tokens), minlength=V) / n


def expected(*processors, prompt=PROMPT):
    return LogitsProcessorList(processors)(torch.tensor([prompt]), LOGITS.unsqueeze(0).clone())[0].softmax(0)


CASES = {
    "top_k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top_k beyond the vocabulary": ({"top_k": 10**9}, []),
    "no top_k": ({"top_k": -1}, []),
    "min_p": ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    "min_p of 1": ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    "repetition": ({"repetition_penalty": 3.0}, [RepetitionPenaltyLogitsProcessor(3.0)]),
    "repetition below 1": ({"repetition_penalty": 0.5}, [RepetitionPenaltyLogitsProcessor(0.5)]),
    "bias": ({"logit_bias": ((5, 4.0), (int(LOGITS.argmax()), -100.0))},
             [SequenceBiasLogitsProcessor([[[5], 4.0], [[int(LOGITS.argmax())], -100.0]])]),
    "all": (
        {"logit_bias": ((5, 4.0),), "repetition_penalty": 1.5, "temperature": 1.5, "min_p": 0.02, "top_k": 9, "top_p": 0.8},
        [SequenceBiasLogitsProcessor([[[5], 4.0]]), RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(1.5),
         MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_as_transformers_would(case):
    options, processors = CASES[case]
    found, wanted = drawn(Sampling(**{"temperature": 1.0, **options})), expected(*processors)
    assert set(found.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=0.045)  # 3.5 standard errors of a share of one half
    greedy = Sampler(Sampling(**{**options, "temperature": 0.0}), PROMPT)(LOGITS).token
    assert greedy == int(wanted.argmax())


def test_penalties_of_what_was_said():
    """OpenAI's formula: logit - frequency * count - presence * (count > 0), of the output's tokens alone."""
    sampler = Sampler(Sampling(frequency_penalty=0.7, presence_penalty=0.4), PROMPT)
    counts, said = torch.zeros(V), []
    for _ in range(30):
        wanted = int((LOGITS.double() - 0.7 * counts - 0.4 * (counts > 0)).argmax())
        said.append(sampler(LOGITS).token)
        assert said[-1] == wanted
        counts[wanted] += 1
    assert len(set(said)) > 3


def test_repetitions_of_the_output_count_too():
    sampler = Sampler(Sampling(repetition_penalty=4.0), [])
    tokens = []
    for _ in range(5):
        logits = RepetitionPenaltyLogitsProcessor(4.0)(torch.tensor([tokens], dtype=torch.int64), LOGITS.unsqueeze(0).clone())
        tokens.append(sampler(LOGITS).token)
        assert tokens[-1] == int(logits.argmax())


def test_log_probabilities_are_of_the_models_logits():
    best = int(LOGITS.argmax())
    how = Sampling(logit_bias=((best, -100.0),), repetition_penalty=2.0, logprobs=50)
    chosen = Sampler(how, PROMPT)(LOGITS)
    log = LOGITS.double().log_softmax(0)
    assert chosen.logprob == pytest.approx(float(log[chosen.token]))
    assert chosen.top[0] == (best, pytest.approx(float(log.max())))
    assert len(chosen.top) == V  # no more than there are
    assert chosen.rank == 1 + int((log > log[chosen.token]).sum()) > 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-4])
def test_temperatures_near_nothing_are_greedy(temperature):
    assert Sampler(Sampling(temperature))(1e4 * LOGITS).token == int(LOGITS.argmax())


def test_requests_with_options_do_not_change_those_without(engine, ask):
    """In one batch."""
    made = engine()
    _, alone = ask(made, PROMPT, 12)
    alone.wait()
    hows = [Sampling(), Sampling(repetition_penalty=5.0), Sampling(frequency_penalty=2.0, presence_penalty=2.0),
            Sampling(logit_bias=((50, 100.0),)), Sampling()]  # fmt: skip
    told = [ask(made, PROMPT, 12, sampling=how)[1] for how in hows]
    for one in told:
        one.wait()
    assert told[0].tokens == told[4].tokens == alone.tokens
    assert told[3].tokens == [50] * 12
    assert len(set(told[2].tokens)) == 12 > len(set(alone.tokens))
