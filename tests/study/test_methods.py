"""Methods by name, and bases that are packed first. Oracles: the options written out, `lownibble quantize` itself."""

import json
import shutil
from pathlib import Path

import pytest

from lownibble import stored
from lownibble.config import CompareConfig, DataConfig, LoraConfig, MethodSpec, QuantConfig, RunConfig, TrainConfig, method_named
from lownibble.errors import ConfigError, OutputError
from lownibble.exporting.convert import export
from lownibble.registry import CODECS, INITS
from lownibble.study import bases, cell, jobs
from lownibble.study import compare as comparing
from lownibble.study.compare import compare
from lownibble.study.contents import look
from lownibble.study.paired import paired_speed
from lownibble.study.runner import run_study
from lownibble.study.spec import cells, read_study


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {"method": "full"}),
        ("lora+dora", {"method": "lora", "lora": {"use_dora": True}}),
        ("lora+rslora+pissa", {"method": "lora", "lora": {"use_rslora": True, "init_lora_weights": "pissa"}}),
        ("qlora+lora-plus", {"method": "qlora", "train": {"loraplus_lr_ratio": 16.0}}),
        ("qlora+merge-aware+int4", {"method": "qlora", "merge_aware": True, "quant": {"quant_type": "int4"}}),
        (
            "qlora+nf3+gptq+qera",
            {
                "method": "qlora", "quant": {"quant_type": "nf3"}, "quantize": {"rounding": "gptq"},
                "lora": {"init_lora_weights": "qera"},
            },
        ),
        ("qlora+3.5bits", {"method": "qlora", "quantize": {"bits": 3.5, "rounding": "rtn"}}),
        ("qlora+gptq+3.5bits", {"method": "qlora", "quantize": {"bits": 3.5, "rounding": "gptq"}}),
    ],
)  # fmt: skip
def test_a_name_stands_for_options(name, options):
    assert method_named(name) == MethodSpec(**options)


def test_every_codec_and_start_is_a_part_of_its_own():
    for codec in CODECS:
        assert method_named(f"qlora+{codec}").quant == {"quant_type": codec}
    for start in INITS:
        assert method_named(f"lora+{start}").lora == {"init_lora_weights": start}
    assert not set(CODECS) & set(INITS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lara", "Did you mean 'lora'"),
        ("", "must begin with one of full, lora, qlora"),
        ("qlora+", "unknown part ''"),
        ("qlora+gtpq", "Did you mean 'gptq'"),
        ("lora+int4", "'int4' of the method 'lora.int4' is for qlora"),
        ("lora+gptq", "is for qlora"),
        ("lora+merge-aware", "is for qlora"),
        ("full+dora", "is for lora and qlora"),
        ("full+lora-plus", "is for lora and qlora"),
        ("qlora+int4+nf3", "'nf3' of .* again"),
        ("qlora+qera+loftq", "'loftq' of .* again"),
        ("qlora+merge-aware+merge-aware", "again"),
        ("qlora+3bits+3.5bits", "again"),
    ],
)
def test_a_bad_name_is_refused_with_what_to_do(name, words):
    with pytest.raises(ConfigError, match=words):
        method_named(name)
    with pytest.raises(ConfigError, match=words):
        CompareConfig(methods=[name])


STUDY = """
name = "packed"
seeds = [0, 1]
[models]
small = "{model}"
[methods]
plain = "qlora"
gptq = {{ method = "qlora", quant = {{ quant_type = "nf3" }}, quantize = {{ rounding = "gptq", calibration_tokens = 400 }} }}
[tasks.reviews]
kind = "completion"
data = {{ path = "{data}", prompt_template = "{{text}} :", completion_template = " {{label}}" }}
[quant]
block_size = 32
skip_modules = ["down_proj"]
[train]
max_steps = 2
batch_size = 4
max_length = 32
"""


@pytest.fixture
def study(tiny_model, tiny_data, tmp_path):
    file = tmp_path / "study.toml"
    file.write_text(STUDY.format(model=tiny_model, data=tiny_data))
    return file


def test_a_studys_quant_options_are_every_cells_and_the_methods_win(study):
    found = {cell.method: cell.config.quant for cell in cells(read_study(study))}
    assert found == {
        "plain": QuantConfig(block_size=32, skip_modules=["down_proj"]),
        "gptq": QuantConfig(block_size=32, skip_modules=["down_proj"], quant_type="nf3"),
    }


def test_a_packed_base_is_named_by_what_determines_it(study):
    def of(**replaced):
        text = study.read_text()
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        other = study.with_name("other.toml")
        other.write_text(text)
        found = list(cells(read_study(other)))
        return {cell.base for cell in found if cell.method == "gptq"}, [cell.digest for cell in found]

    [first], digests = of()
    assert {cell.base for cell in cells(read_study(study)) if cell.method == "plain"} == {None}
    for same in ({"[0, 1]": "[2]"}, {"max_steps = 2": "max_steps = 3"}, {'name = "packed"': 'name = "other"'}):
        assert of(**same)[0] == {first}, same
    for new in ({"nf3": "nf2"}, {"= 400": "= 500"}, {"max_length = 32": "max_length = 24"}, {"{text} :": "{text}"}):
        names, changed = of(**new)
        assert names != {first}, new
        assert changed != digests


def base_of(study, *replaced):
    text = study.read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    other = study.with_name("other.toml")
    other.write_text(text)
    spec = read_study(other)
    [base] = {cell.base for cell in cells(spec, contents=look(cells(spec))) if cell.method == "gptq"}
    return base


def test_a_packed_base_is_named_by_the_rows_that_are_encoded_and_not_by_what_training_does_with_it(study):
    first = base_of(study)
    compute = ("[quant]", '[quant]\ncompute = "exact"')
    moments = ("data = {", "data = { calibration_tokens = 512,")
    longer = ("max_length = 32", "max_length = 48"), ("= 400", "= 400, max_length = 32")  # of training; packed over the same rows
    for same in ([compute], [moments], longer):
        assert base_of(study, *same) == first, same
    drop = ("data = {", 'data = { overlength = "drop",')
    dropped = base_of(study, drop, ("= 400", "= 400, max_length = 32"))
    assert dropped not in (first, base_of(study, drop, *longer))  # rows that are longer than the run's are left out


def test_a_base_that_is_rounded_to_nearest_reads_no_rows(study, tmp_path):
    """Oracle: `lownibble quantize` refuses options of the calibration with it."""
    to_nearest = {"rounding": "rtn", "format": "bnb-4bit"}
    spec = next(cells(read_study(study)))
    how = bases.packing(spec.config, to_nearest, tmp_path / "base")
    assert how.model_fields_set.isdisjoint({"calibration_tokens", "max_length"})
    with pytest.raises(ConfigError, match="calibration_tokens"):
        bases.packing(spec.config, {**to_nearest, "calibration_tokens": 400}, "")
    other = spec.config.with_options(data=DataConfig(path="elsewhere"))
    assert bases.name(spec.config, to_nearest, "m", "a") == bases.name(other, to_nearest, "m", "b")
    found = bases.pack(bases.job(spec.config, to_nearest, tmp_path / "base"))
    assert found["format"] == "bnb-4bit"
    assert bases.is_packed(tmp_path / "base")


def test_a_base_is_packed_over_rows_no_longer_than_the_models_positions(study, tiny_model, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(tiny_model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    [first, *_] = [each for each in cells(read_study(study)) if each.method == "gptq"]
    with pytest.warns(UserWarning, match="of 24 tokens instead of 32"):
        found = bases.pack(bases.job(first.config.with_options(model=str(short)), first.quantize, tmp_path / "base"))
    assert found["calibration"]["row_tokens"] <= 24
    assert found["config"]["calibration"] == first.config.data.path


def test_a_studys_quant_options_are_refused_where_no_method_is_qlora(study):
    text = study.read_text().replace('plain = "qlora"', 'plain = "lora"')
    study.write_text("\n".join(line for line in text.splitlines() if not line.startswith("gptq")))
    with pytest.raises(ConfigError, match=r"\[quant\] of a study is for qlora"):
        read_study(study)


def test_a_codec_whose_blocks_are_fixed_goes_with_a_studys_block_size(study):
    study.write_text(study.read_text().replace("block_size = 32", "block_size = 128").replace('"qlora"\n', '"qlora+mxfp4"\n'))
    [found] = {cell.config.quant.block_size for cell in cells(read_study(study)) if cell.method == "plain"}
    assert found == 32


@pytest.mark.parametrize("options", [{"method": "full", "lora": {"r": 4}}, {"method": "lora", "quant": {"block_size": 32}}])
def test_options_of_a_method_that_does_not_have_them_are_refused(options):
    with pytest.raises(ConfigError, match=r"cannot be used with method '(full|lora)': it is for"):
        MethodSpec(**options)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("calibration_tokens", "tokens", "unknown options: tokens. It has rounding, bits"),
        ("calibration_tokens = 400", "output = 'x'", "unknown options: output"),
        ('"gptq", calibration', '"gtpq", calibration', "rounding"),
        ('{ method = "qlora", quant', '{ merge_aware = true, method = "qlora", quant', "int8 until the merge"),
        ('{ method = "qlora", quant', '{ method = "lora", quant', "cannot be used with method 'lora'"),
        ('"qlora"\n', '"qlora+gtpq"\n', "Did you mean 'gptq'"),
    ],
)  # fmt: skip
def test_bad_packing_in_a_study_is_refused_before_it_runs(study, old, new, words):
    text = study.read_text()
    assert old in text
    study.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        read_study(study)


@pytest.mark.slow
def test_a_study_packs_a_base_once_for_the_runs_that_share_it(study, tmp_path, forked, monkeypatch):
    """Bases are packed in processes; cells are worked on here, and methods take turns on bases in the comparison's test."""
    monkeypatch.setitem(jobs.JOBS, "cell", cell.work)
    monkeypatch.setitem(jobs.JOBS, "speed", lambda job: {"status": "ok", "skipped": "left out by the test"})
    out = tmp_path / "out"
    run_study(study, out)
    [base] = (out / "bases").iterdir()
    assert bases.is_packed(base)
    packed = json.loads((base / "merge.json").read_text())
    assert packed["config"]["rounding"] == "gptq"
    assert packed["calibration"]["tokens"] <= 400
    told = [json.loads(file.read_text()) for file in (out / "cells").iterdir()]
    by_method = {name: [t for t in told if t["cell"]["method"] == name] for name in ("plain", "gptq")}
    assert [t["status"] for t in told] == ["ok"] * 4
    before = {name: {t["result"]["scores_before"]["loss"] for t in of} for name, of in by_method.items()}
    assert before["plain"] != before["gptq"]
    assert all(t["cell"]["quantize"]["rounding"] == "gptq" for t in by_method["gptq"])
    # a base that cannot be packed is a recorded failure of its runs; the others go on
    study.write_text(study.read_text().replace('quant_type = "nf3" }', 'quant_type = "mxfp4", block_size = 32 }').replace(
        "calibration_tokens = 400", "bits = 0.5"
    ))  # fmt: skip
    run_study(study, out)
    told = [json.loads(file.read_text()) for file in (out / "cells").iterdir()]
    failed = [t for t in told if t["status"] == "failed"]
    assert len(failed) == 2
    assert all(t["error"].startswith("Its base could not be packed: ") for t in failed)
    assert {t["kind"] for t in told} == {"study-cell"}


@pytest.mark.slow
def test_compare_packs_a_base_once_for_the_methods_that_share_it_and_trains_on_it(
    tiny_model, tiny_data, tmp_path, forked, monkeypatch
):
    data = DataConfig(path=str(tiny_data), prompt_template="review : {text} sentiment :", completion_template=" {label}")
    train = TrainConfig(max_steps=2, batch_size=8, max_length=32, output_dir=str(tmp_path / "cmp"))
    names = ["qlora+nf3+gptq", "qlora+dora+gptq+nf3"]
    config = CompareConfig(
        model=str(tiny_model), data=data, lora=LoraConfig(r=2), train=train,
        quant=QuantConfig(block_size=32, skip_modules=["down_proj"]), methods=["qlora+merge-aware", *names],
    )  # fmt: skip
    measured = {}

    def paired(configs, peaks):
        measured.update(configs)
        return paired_speed(configs, peaks)

    monkeypatch.setattr(comparing, "paired_speed", paired)
    result = compare(config)
    assert [(s["method"], s["status"]) for s in result["methods"]] == [(name, "ok") for name in config.methods]
    assert f"{names[1]}_vs_{names[0]}" in result["paired_speed"]["ratios"]
    [base] = (tmp_path / "cmp" / "bases").iterdir()
    assert stored.of_folder(base)
    for name in names:
        run = json.loads((tmp_path / "cmp" / name / "record.json").read_text())
        assert run["config"]["model"] == measured[name].model == str(base.resolve())
    again = compare(config.with_options(train=train.with_options(resume=True)))
    assert again["methods"] == result["methods"]
    assert names[0] in (tmp_path / "cmp" / "report.html").read_text()
    for changed, words in (
        ({"train": train.with_options(resume=True, max_steps=3)}, r"'qlora\+merge-aware' .* \(train.max_steps: 2 -> 3\)"),
        ({"methods": names[:1], "quant": QuantConfig(block_size=64, skip_modules=["down_proj"])}, r"gptq' .* \(model: "),
    ):
        resumed = {"train": train.with_options(resume=True)} | changed
        with pytest.raises(OutputError, match=f"{words}.*Resume with the same ones"):
            compare(config.with_options(**resumed))


def test_methods_that_pack_dense_weights_are_left_out_on_packed_ones(tiny_model, tiny_data, study, tmp_path):
    four_bits = tmp_path / "four-bits"
    export(str(tiny_model), str(four_bits), format="bnb-4bit", quant=QuantConfig(block_size=32))
    data = DataConfig(path=str(tiny_data), prompt_template="{text} :", completion_template=" {label}")
    with pytest.raises(ConfigError, match=r"cannot be trained with qlora\+gptq or qlora\+merge-aware: .* packs dense ones"):
        compare(CompareConfig(model=str(four_bits), data=data, methods=["qlora+gptq", "qlora+merge-aware"]))
    study.write_text(study.read_text().replace(str(tiny_model), str(four_bits)))
    with pytest.raises(ConfigError, match="packs dense ones"):
        look(cells(read_study(study)))


def test_a_run_on_its_base_keeps_how_it_computes():
    config = RunConfig(quant=QuantConfig(quant_type="int3", compute="exact"))
    assert bases.on_base(config, Path("folder")).quant == QuantConfig(compute="exact")
