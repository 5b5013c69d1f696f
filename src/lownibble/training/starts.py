"""`init_lora_weights='auto'`: the start of adapters that held up in studies/starts, and the learning rate that suits it.

On a packed base that is `qera`: over three seeds its loss was below plain NF4's on both tasks, each start at its own best rate. A
start that corrects moves further in a step than one from B = 0, where changes of A have no effect yet, so it wants a lower rate:
at LoRA's best one it was worse than the plain start. On a dense base nothing is lost, and LoRA's own start is taken; so it is
where the dense weights are not to be had, or calibration knows no such model.

Rates were measured at a width of `WIDTH` and are scaled by 1 / width, as changes of a layer's output by Adam grow with its inputs
(tensor programs V, Yang et al. 2022; not measured here). A rate that is given stands.

What else of a configuration needs the model's folder is decided here, too: a text for `alora_invocation_tokens` becomes tokens.
"""

from __future__ import annotations

import torch

from lownibble.config import RunConfig
from lownibble.data.template import TokenCoder
from lownibble.errors import ConfigError, DataError, ModelError
from lownibble.models import ModelSource, resolve, skeleton
from lownibble.models.dense_origin import has_dense
from lownibble.models.load import load_tokenizer

WIDTH = 576
RATES = {"qera": 5e-4, True: 2e-3}
"""Start -> the best of 5e-4, 1e-3 and 2e-3, at `WIDTH` inputs (LoRA's on code: 1e-3, by 0.001)."""


def decide(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with 'auto' decided and a text for `alora_invocation_tokens` as tokens, and what was decided in words; as
    it is, and no words, where nothing is to decide.

    Raises:
        ModelError: as `skeleton`. ConfigError: the tokenizer gives the text no tokens.
    """
    if config.method == "full":
        return config, ""
    config, invocation = _with_tokens(config)
    if config.lora.init_lora_weights != "auto":
        return config, invocation
    source = resolve(config.model, config.revision)
    model = skeleton(source, torch.float32)
    text = model.config.get_text_config(decoder=True)
    start, why = _start(config, source, only_text=text is model.config, encoder=model.config.is_encoder_decoder)
    changes = {"lora": config.lora.with_options(init_lora_weights=start)}
    width = getattr(text, "hidden_size", None)
    if width is not None and "learning_rate" not in config.train.model_fields_set:
        rate = float(f"{RATES[start] * WIDTH / width:.2g}")
        changes["train"] = config.train.with_options(learning_rate=rate)
    decided: RunConfig = config.with_options(**changes)
    start_in_words = f"adapters start as {start!r}: {why}; learning rate {decided.train.learning_rate:g}"
    return decided, "; ".join(filter(None, (invocation, start_in_words)))


def _with_tokens(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with the invocation of an activated adapter as the model's tokens, and that in words."""
    text = config.lora.alora_invocation_tokens
    if not isinstance(text, str):
        return config, ""
    tokens = _in_a_prompt(text, TokenCoder(load_tokenizer(resolve(config.model, config.revision))), config.data.prompt_template)
    if not tokens:
        raise ConfigError(f"The alora_invocation_tokens {text!r} are no token of '{config.model}'. Give another text.")
    changed: RunConfig = config.with_options(lora=config.lora.with_options(alora_invocation_tokens=tokens))
    return changed, f"the adapter is active from the tokens {tokens} on ({text!r})"


def _in_a_prompt(text: str, coder: TokenCoder, template: str | None) -> list[int]:
    """The text's tokens where it ends a prompt: a tokenizer that puts a space before a text gives others to the text alone, and
    may hold the space that the prompt has before it in the first of them."""
    if not coder.opens:
        return coder.batch([text])[0]
    try:
        asked = coder.chat.text([{"role": "user", "content": "a"}], generation=True)
    except (DataError, ModelError):
        asked = ""
    before = next((prompt.rpartition(text)[0] for prompt in (template or "", asked) if text in prompt), "")
    [(ids, ends)] = coder.with_ends([before + text])
    if not before or ends is None:
        return coder.after(["\n"], [text])[0]
    return [token for token, (_, end) in zip(ids, ends, strict=True) if end > len(before)]


def _start(config: RunConfig, source: ModelSource, *, only_text: bool, encoder: bool) -> tuple[str | bool, str]:
    if config.method == "lora":
        return True, "a dense base has nothing to correct"
    if config.merge_aware:
        return True, "merge-aware training packs anew at every step"
    if config.lora.alora_invocation_tokens:
        return True, "an activated adapter starts at the base"
    if encoder or not only_text:
        return True, "calibration is for models with a text decoder alone"
    if not has_dense(source):
        return True, "the checkpoint is packed, and its dense weights are not to be had"
    return "qera", "it makes up for what packing lost"
