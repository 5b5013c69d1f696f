"""`lownibble bench gptq`. Oracles: our GPTQ where both are the same optimisation; made-up runs; transformers' loss."""

import pytest
import torch
from tiny_folders import write_model

import lownibble as ln
from lownibble.bench import gptq as bench
from lownibble.calibration import Moments
from lownibble.calibration.gptq import round_again
from lownibble.config import QuantConfig
from lownibble.errors import ConfigError
from lownibble.quant import quantize


def inputs(n, k):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return Moments(x.T @ x / n, n)


@pytest.mark.parametrize("bits", [4, 3])
def test_the_transcription_and_ours_agree_where_a_row_is_a_group(bits):
    """One group: static or not, its scale is the weight's own. Moments at another scale change nothing."""
    weight = torch.randn(8, 192, generator=torch.Generator().manual_seed(2))
    moments = inputs(1500, 192)
    nearest = quantize(weight, QuantConfig(quant_type=f"int{bits}", block_size="row", double_quant=False))
    ours = round_again(weight, moments, nearest).dequantize(torch.float32)
    theirs = bench.published(weight, 2 * moments.matrix, bits, 192, act_order=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    in_order = bench.published(weight, moments.matrix, bits, 192, act_order=False)
    assert (in_order - theirs).abs().max() > 0.1, "the order matters"


def test_scales_are_found_when_a_groups_first_column_is_reached():
    """The second group is not on the grid of its own weights; columns in another block of 128 have moved by then."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    found = bench.published(weight, inputs(1500, 256).matrix, 3, 128, act_order=False)
    for group, is_own in ((slice(0, 128), True), (slice(128, 256), False)):
        scale, zero = bench._find_params(weight[:, group], 7)
        codes = found[:, group] / scale[:, None] + zero[:, None]
        assert bool(((codes - codes.round()).abs() < 1e-3).all()) == is_own


def test_figures(monkeypatch):
    perplexities = {"dense": 10.0, "rtn": 20.0, "gptq": 15.0, "published": 16.0, "published, act-order": 12.0}
    asked = []

    def run(case, way):
        asked.append((case, way))
        return {"perplexity": perplexities[way], "seconds": 1.0, "peak_bytes": 1}

    monkeypatch.setattr(bench, "_run", run)
    found = bench.bench_gptq()
    assert found["perplexity_ratios"]["int3 gptq / published"] == 15 / 16
    assert found["headlines"]["int4 gptq / published, act-order"] == 15 / 12
    assert ("nf4", "gptq") in asked
    assert ("nf4", "published") not in asked, "it has no zero points to round"


@pytest.mark.parametrize("options", [{"peers": True}, {"repeats": 2}])
def test_what_it_cannot_do_is_refused(options):
    with pytest.raises(ConfigError, match="GPTQModel is not run"):
        bench.bench_gptq(**options)


def test_perplexity(tmp_path):
    """Oracle: transformers' own loss."""
    model, _ = ln.load(str(write_model(tmp_path / "model")))
    rows = torch.randint(3, 20, (4, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    assert bench.perplexity(model, rows) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
