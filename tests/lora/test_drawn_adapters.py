"""Adapters drawn from PEFT's configuration space: PEFT's logits, or refused by name. Oracle: PEFT."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import lownibble as ln
from lownibble.errors import InputError

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True)
PATTERNS = st.dictionaries(st.sampled_from(["q_proj", r"layers\.0\..*up_proj", "nothing"]), st.integers(1, 6), max_size=2)
OPTIONS = st.fixed_dictionaries(
    {"r": st.integers(1, 5), "target_modules": st.one_of(NAMES, st.sampled_from(["all-linear", r".*\.(q|v)_proj"]))},
    optional={
        "lora_alpha": st.integers(1, 9), "use_rslora": st.booleans(), "bias": st.sampled_from(["none", "all", "lora_only"]),
        "rank_pattern": PATTERNS, "alpha_pattern": PATTERNS,
        "exclude_modules": st.one_of(NAMES, st.just(r".*\.1\..*")), "layers_to_transform": st.sampled_from([0, [1], [0, 1]]),
        "layers_pattern": st.sampled_from(["layers", "h"]),
        "modules_to_save": st.sampled_from([["lm_head"], ["norm"], ["embed_tokens"]]),
        "use_dora": st.booleans(), "lora_bias": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "olora"]),
        "trainable_token_indices": st.sampled_from([None, [1, 2]]), "lora_dropout": st.sampled_from([0.0, 0.1]),
    },
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(options=OPTIONS)
def test_a_drawn_adapter_gives_pefts_logits_or_is_refused(tiny, clone, batch, peft, tmp_path, options):
    base = tiny(attention_bias=True)
    ids, mask, _ = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = peft.get_peft_model(clone(base), peft.LoraConfig(**options))
            with torch.no_grad():
                for name, parameter in theirs.named_parameters():
                    if parameter.requires_grad and "lora_A" not in name:
                        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            theirs.save_pretrained(tmp_path)
            theirs = peft.PeftModel.from_pretrained(clone(base), tmp_path).eval()
        except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError, AttributeError):
            event("PEFT takes no such configuration")
            return
        try:
            ours = ln.load_adapter(clone(base), tmp_path)
        except InputError:
            event("refused by name")
            return
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=mask).logits
            found = ours.eval()(input_ids=ids, attention_mask=mask).logits
    event("compared")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
