"""Adapters on tiny models that were really saved and read again."""

import pytest
import torch

import lownibble as ln


@pytest.fixture
def adapt(tmp_path):
    """`adapt(folder, quant, **lora)`: (live model with a random adapter, the adapter's folder)."""

    def _adapt(folder, quant="nf4", name="adapter", size=1.0, **lora):
        model, _ = ln.load(str(folder), quant=quant)
        ln.add_lora(model, ln.LoraConfig(**{"r": 4, "init_lora_weights": False, **lora}), seed=3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in key:
                    parameter += size * 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
        ln.save_adapter(model, tmp_path / name)
        return model.eval(), tmp_path / name

    return _adapt


@pytest.fixture
def rows(tmp_path):
    """A file of text rows in the words of the tokenizer of `write`."""
    path = tmp_path / "rows.jsonl"
    words = [" ".join(f"w{(7 * i * i + 3 * j) % 92}" for j in range(9 + i % 4)) for i in range(24)]
    path.write_text("".join(f'{{"prompt": "{text}", "completion": " w{i} w{i + 3} w{2 * i}"}}\n' for i, text in enumerate(words)))
    return str(path)
