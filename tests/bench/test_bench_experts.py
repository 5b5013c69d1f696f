"""`lownibble bench experts`. Oracles: its own contenders on a tiny mixture, whose losses must agree; lines made up."""

import json

import pytest

from lownibble.bench import experts as bench
from lownibble.bench.subject import find_config
from lownibble.errors import ConfigError
from lownibble.models.skeleton import empty_model

TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96,
}  # fmt: skip


def config_of(folder, **options):
    path = folder / "config.json"
    path.write_text(json.dumps({**bench.MIXTURE, **options}))
    return str(path)


def test_the_mixture_has_a_billion_parameters_most_of_them_experts(tmp_path):
    import torch

    model = empty_model(find_config(config_of(tmp_path)), torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert 1.0e9 < sum(sizes.values()) < 1.1e9
    assert sum(n for name, n in sizes.items() if ".experts." in name) > 0.95 * sum(sizes.values())


def test_a_line_is_found_and_what_is_off_it():
    found = bench.line({k: 2.0 + 0.5 * k for k in bench.ACTIVE})
    assert found["constant_s"] == pytest.approx(2.0)
    assert found["per_active_s"] == pytest.approx(0.5)
    assert found["furthest"] == pytest.approx(0, abs=1e-9)
    assert bench.line({1: 1.0, 2: 2.0, 4: 4.0, 8: 20.0})["furthest"] > 0.1


@pytest.mark.slow
def test_contenders_do_the_same_work(peft, forked, tmp_path):
    found = bench.bench_experts(peers=True, repeats=1, batch_size=2, length=16, model=config_of(tmp_path, **TINY))
    assert found["failed"] == found["missing"] == {}
    losses = {name: each["losses"] for name, each in found["contenders"].items()}
    assert set(losses) == {*bench.OURS, *bench.EXPERTS}
    for name in losses:
        assert losses[name] == pytest.approx(losses["peft_float32"], rel=0.02), "the same model, packed or not"
    trained = {each["trainable_parameters"] for each in found["contenders"].values()}
    assert len(trained) == 1, "the same adapters"
    assert set(found["by_active"]["seconds"]) == {"1", "2", "4"}, "no more than there are experts"
    assert found["ratios"]["qlora_eager_vs_peft_float32"]["median"] > 0


def test_what_is_no_mixture_is_refused(tmp_path):
    dense = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
             "vocab_size": 96, "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(dense))
    with pytest.raises(ConfigError, match="no num_experts and num_experts_per_tok"):
        bench.bench_experts(model=str(tmp_path / "config.json"))
