"""What tests of decoders share: tiny models whose outputs depend on their contexts, and generation step by step."""

import sys
from pathlib import Path

import torch

from lownibble.kernels.decoder import Adapter, LowRank, Segment

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from architectures import build, config_of, quiet

__all__ = ["NEW", "adapter_of", "alone", "build", "config_of", "decoded", "louder", "quiet", "rows"]

NEW = 6


def louder(model):
    """Weights large enough that what precedes a token decides what follows it."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name and "conv" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    return model


def rows():
    """Prompts of unlike lengths, one of them longer than the windows of the tiny models."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (5, 2, 9, 40)]


def alone(model, prompt):
    with quiet():
        ids = torch.tensor([prompt], device=model.device)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                               eos_token_id=None)  # fmt: skip
    return found[0, len(prompt) :].tolist()


def decoded(decoder, prompts, adapters):
    """Greedy tokens: prompts in parts of up to 4 tokens, with what others have in the same step, then a token of each a step."""
    cache = decoder.cache(len(prompts), 64)
    known, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    while any(len(tokens) < len(prompt) + NEW for tokens, prompt in zip(known, prompts, strict=True)):
        tokens, slots, positions, segments, last = [], [], [], [], {}
        for slot, prompt in enumerate(prompts):
            if len(known[slot]) == len(prompt) + NEW:
                continue
            part = known[slot][done[slot] : done[slot] + 4]
            if adapters[slot]:
                segments.append(Segment(len(tokens), len(tokens) + len(part), adapters[slot]))
            tokens += part
            slots += [slot] * len(part)
            positions += range(done[slot], done[slot] + len(part))
            done[slot] += len(part)
            if done[slot] == len(known[slot]):
                last[slot] = len(tokens) - 1
        with torch.inference_mode():
            logits = decoder.step(torch.tensor(tokens), torch.tensor(slots), torch.tensor(positions), cache, segments=segments,
                                  wanted=torch.tensor(list(last.values()), dtype=torch.int64))  # fmt: skip
        for slot, row in zip(last, logits, strict=True):
            known[slot].append(int(row.argmax()))
    return [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)]


def adapter_of(model, decoder, name):
    """The branches of an adapter that the model carries, as a step takes them."""
    found = []
    for path in decoder.paths[0]:
        module = model.get_submodule(path)
        low = module.adapters[name] if hasattr(module, "adapters") and name in module.adapters else None
        found.append(low and LowRank(low.lora_A.detach(), low.lora_B.detach(), low.scale))
    return Adapter([found])
