"""The choice of what to give up for a memory budget, against made-up memories whose truth is known."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lownibble.errors import ConfigError
from lownibble.memory.budget import AIM, MARGIN, SETTINGS, Fit, Needs, Setting, choose
from lownibble.training.events import Fitted
from lownibble.training.sinks import _fit

PLAIN, PAGED, CHECKPOINTED, BOTH, OFFLOADED, ALL = SETTINGS
ON_CPU = SETTINGS[:4]


class Memory:
    """A model's memory: bytes = held + chunk (up to a size) + tokens x bytes of a token, by setting; notes what was tried."""

    def __init__(self, held=1000, chunk=0, per_token=10, checkpointed=2, step=1, ends=None, unit=1, offloaded=1):
        self.held, self.chunk, self.step, self.ends = held, chunk, step, ends
        self.rates = {False: per_token, True: checkpointed, "offload": offloaded}
        self.unit = unit
        self.tried = []

    def true(self, setting, tokens):
        return self.held + min(self.chunk, 3 * self.unit * tokens) + tokens * self.rates[setting.gradient_checkpointing]

    def at_most(self, setting, tokens):
        return self.held + MARGIN[setting.gradient_checkpointing] * (self.true(setting, tokens) - self.held)

    def resident(self, setting):
        self.setting = setting
        return self.held

    def size(self, tokens):
        return tokens // self.step * self.step if tokens >= self.step else tokens

    def peak(self, tokens):
        self.tried.append((self.setting, tokens))
        if self.ends is not None and tokens > self.ends:
            return None
        return self.true(self.setting, tokens)


def needs(longest=100, whole=1600, enough=100, states=0, paged=0, open_to=ON_CPU):
    return Needs(longest, whole, enough, {setting: paged if setting.paged else states for setting in open_to})


def test_nothing_is_given_up_where_all_fits():
    fit = choose(10**6, needs(), Memory())
    assert (fit.max_tokens, fit.paged, fit.gradient_checkpointing, fit.peak_bytes) == (None, False, False, 17000)


def test_the_pass_becomes_as_large_as_fits():
    memory = Memory()
    fit = choose(10000, needs(), memory)
    assert fit.max_tokens == pytest.approx((AIM * 10000 - 1000) / 10 / MARGIN[False], rel=0.04)
    assert (fit.paged, fit.gradient_checkpointing) == (False, False)
    assert fit.peak_bytes == pytest.approx(memory.true(PLAIN, fit.max_tokens), abs=2)
    assert fit.probes[-1].tokens == fit.max_tokens


def test_states_count():
    fit = choose(10000, needs(states=2000), Memory())
    assert fit.max_tokens == pytest.approx((AIM * 10000 - 3000) / 10 / MARGIN[False], rel=0.04)
    assert fit.peak_bytes <= AIM * 10000


@pytest.mark.parametrize(
    ("states", "paged", "expected"),
    [(0, 0, PLAIN), (8000, 800, PAGED), (5000, 5000, CHECKPOINTED), (20000, 7800, BOTH)],
)
def test_the_cheapest_setting_with_enough_tokens(states, paged, expected):
    fit = choose(10000, needs(longest=50, enough=400, states=states, paged=paged), Memory())
    assert Setting(fit.paged, fit.gradient_checkpointing) == expected


@pytest.mark.parametrize(("states", "paged", "expected"), [(8000, 8000, OFFLOADED), (20000, 8000, ALL), (0, 0, PLAIN)])
def test_checkpoints_are_offloaded_where_the_rest_is_not_enough(states, paged, expected):
    fit = choose(10000, needs(50, enough=400, states=states, paged=paged, open_to=SETTINGS), Memory())
    assert Setting(fit.paged, fit.gradient_checkpointing) == expected
    assert Fit.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit


def test_with_enough_nowhere_the_most_tokens_count():
    fit = choose(3000, needs(longest=50, enough=1600), Memory())
    assert fit.gradient_checkpointing
    assert fit.max_tokens == pytest.approx((AIM * 3000 - 1000) / 2 / MARGIN[True], rel=0.04)


def test_a_longest_row_that_fits_with_checkpointing_only():
    fit = choose(2500, needs(longest=400, enough=128), Memory())
    assert fit.gradient_checkpointing
    assert fit.max_tokens >= 400


def test_what_does_not_fit_is_told_with_a_budget_that_would():
    memory = Memory(held=10**9, per_token=10**7, checkpointed=2 * 10**6)
    with pytest.raises(ConfigError, match=r"one row of 100 tokens with paged .* takes about 1\.39 GB, 284 MB more") as e:
        choose(11 * 10**8, needs(whole=400), memory)
    assert "memory_budget='1.39 GB'" in str(e.value)
    fit = choose(139 * 10**7, needs(whole=400), memory)
    assert fit.gradient_checkpointing


def test_a_budget_below_the_model_is_told_as_such():
    with pytest.raises(ConfigError, match=r"the model with its gradients and optimiser states with .* takes about 3\.06 GB"):
        choose(2 * 10**9, needs(), Memory(held=285 * 10**7, per_token=10**6))


def test_the_estimate_of_what_is_missing_leaves_out_what_a_pass_has_at_any_size(monkeypatch):
    monkeypatch.setattr("lownibble.memory.budget.NOISE_BYTES", 0)
    memory = Memory(held=10**9, chunk=30, per_token=10**5, checkpointed=10**5)
    memory.true = lambda setting, tokens: 10**9 + 4 * 10**8 * (tokens > 0) + tokens * 10**5
    with pytest.raises(ConfigError, match=r"one row of 100 tokens with .* takes about 1\.69 GB"):
        choose(14 * 10**8, needs(), memory)


def test_an_estimate_far_beyond_what_was_tried_allows_for_what_measurements_may_be_off():
    memory = Memory(held=10**9, per_token=10**6, checkpointed=10**6)
    memory.true = lambda setting, tokens: 10**9 + tokens * 10**6 - (3 << 20) * (tokens == 16)
    with pytest.raises(ConfigError, match=r"one row of 1000 tokens") as e:
        choose(1025 * 10**6, needs(longest=1000, whole=1000), memory)
    named = float(re.search(r"memory_budget='([\d.]+) GB'", str(e.value))[1]) * 1e9
    assert named > (10**9 + MARGIN[False] * 10**9) / AIM


def test_where_memory_runs_out_before_the_budget_the_last_pass_counts():
    fit = choose(10**6, needs(longest=30), Memory(ends=70))
    assert fit.max_tokens == 64


@pytest.mark.parametrize(("ends", "remedy"), [(70, r"64 tokens took .*Set max_length=64 "), (0, "Take a smaller model")])
def test_a_device_smaller_than_the_budget_is_told_as_such(ends, remedy):
    """A larger budget would not help."""
    with pytest.raises(ConfigError, match=rf"memory ran out below the memory budget of 1\.00 GB.* {remedy}") as e:
        choose(10**9, needs(longest=100), Memory(ends=ends))
    assert not re.search(r"-\d| more|memory_budget", str(e.value))


def test_a_setting_that_was_asked_for_is_kept():
    fit = choose(10**6, needs(open_to=(BOTH,)), Memory())
    assert (fit.paged, fit.gradient_checkpointing) == (True, True)


def test_a_fit_comes_back_from_json():
    fit = choose(10000, needs(), Memory())
    assert Fit.from_dict(fit.to_dict()) == fit


def test_the_longest_row_is_tried_where_it_is_just_above_the_last_pass():
    """Passes of 32 and 64 tokens, and a row of 65 that fits."""
    fit = choose(219_000, needs(65, 130, 1), Memory(0, 0, 3000, 2000, 65, unit=1000))
    assert fit.max_tokens == 65


@example(
    held=0, chunk=39, rate=3, saved=1, step=4, longest=20, factor=2, budget=108, states=0, paged=0, enough=1
)  # fmt: skip
@settings(max_examples=300)
@given(
    held=st.integers(0, 5000), chunk=st.integers(0, 3000), rate=st.integers(3, 50), saved=st.integers(1, 50),
    step=st.integers(1, 90), longest=st.integers(20, 300), factor=st.integers(1, 40), budget=st.integers(1, 60000),
    states=st.integers(0, 3000), paged=st.integers(0, 3000), enough=st.integers(1, 500),
)  # fmt: skip
def test_no_pass_exceeds_the_budget_and_the_choice_uses_it(
    held, chunk, rate, saved, step, longest, factor, budget, states, paged, enough
):
    step = min(step, longest)
    longest = longest // step * step
    held, chunk, rate, saved, budget, states, paged = (1000 * n for n in (held, chunk, rate, saved, budget, states, paged))
    offloaded = max(1000, min(rate, saved) // 2)  # a token takes no less than what is measured
    memory = Memory(held, chunk, rate, min(rate, saved), step, unit=1000, offloaded=offloaded)
    asked = needs(longest, longest * factor, enough, states, min(states, paged), SETTINGS)
    try:
        fit = choose(budget, asked, memory)
    except ConfigError:
        assert all(memory.at_most(s, longest) + asked.state_bytes[s] > 0.85 * AIM * budget for s in SETTINGS)
        return
    taken = Setting(fit.paged, fit.gradient_checkpointing)
    tokens = fit.max_tokens or asked.whole
    limit = AIM * budget
    assert longest <= tokens <= asked.whole
    assert memory.at_most(taken, tokens) + asked.state_bytes[taken] <= limit + 2
    first = dict.fromkeys(SETTINGS, 0)
    for setting, tried in memory.tried:
        over = memory.at_most(setting, tried) - 2 + asked.state_bytes[setting] > limit
        assert not over or not first[setting] or tried <= first[setting], "only the first pass is made without knowing"
        first[setting] = first[setting] or tried
    if tokens < asked.whole:
        more = memory.size(int(tokens * 1.1) + 4 * step + 1)  # steps end the search while a buffer still steepens its line
        over = memory.at_most(taken, more) + asked.state_bytes[taken] > limit
        assert over or more >= asked.whole, "a tenth more would not fit"


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_setting_can_be_told(setting):
    told = _fit(Fitted(2 * 10**9, 10**9, None, 64, setting.paged, setting.gradient_checkpointing, 1.0))
    assert ("paged" in told, "gradient checkpointing" in told) == (setting.paged, bool(setting.gradient_checkpointing))
    assert ("offloaded" in told) == (setting.gradient_checkpointing == "offload")
    assert (Setting(*setting).words == "") == (setting == Setting(False, False))
