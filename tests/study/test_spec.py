"""Study files. Oracle: the cells worked out by hand, and what must and must not change a cell's name."""

import hashlib
import json

import pytest

from lownibble.config import DataConfig, RunConfig
from lownibble.data.rows import Dataset, Row
from lownibble.errors import ConfigError, DataError
from lownibble.study import spec as spec_module
from lownibble.study.digests import of_model
from lownibble.study.spec import Contents, cells, read_study, tuning_cells
from lownibble.study.tasks import KINDS, check_columns, with_templates

STUDY = """
name = "first"
seeds = [3, 1]
[models]
small = "demo"
[methods]
full = { method = "full", train = { weight_decay = 0.5 } }
qlora-r4 = { method = "qlora", lora = { r = 4 }, quant = { block_size = 128 } }
[tasks]
sentiment = { kind = "classification", data = "demo" }
inference = { kind = "nli", data = "rows", train = { max_length = 128 } }
[train]
max_steps = 40
max_length = 256
[tuning]
learning_rates = [1e-4, 1e-3]
train = { max_steps = 10 }
"""


@pytest.fixture
def study(tmp_path):
    def write(text=STUDY, **replaced):
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "study.toml").write_text(text)
        return tmp_path / "study.toml"

    return write


def test_the_cells_are_all_combinations(study):
    found = list(cells(read_study(study())))
    assert [(c.method, c.task, c.seed) for c in found] == [
        (method, task, seed) for seed in (3, 1) for task in ("sentiment", "inference") for method in ("full", "qlora-r4")
    ]
    assert len({cell.digest for cell in found}) == len(found)


def test_settings_of_a_method_win_over_a_task_over_all(study):
    by_name = {(c.method, c.task): c.config for c in cells(read_study(study()))}
    assert by_name["full", "sentiment"].train.weight_decay == 0.5
    assert by_name["full", "sentiment"].train.max_length == 256
    assert by_name["full", "inference"].train.max_length == 128
    assert by_name["full", "inference"].train.max_steps == 40
    assert by_name["qlora-r4", "inference"].lora.r == 4
    assert by_name["qlora-r4", "inference"].quant.block_size == 128
    assert by_name["qlora-r4", "inference"].method == "qlora"
    assert by_name["qlora-r4", "inference"].data.prompt_template == KINDS["nli"].prompt_template
    assert by_name["qlora-r4", "sentiment"].data.prompt_template is None  # the demo brings its own


def test_the_grid_is_run_at_a_seed_of_its_own_and_what_it_found_wins(study):
    spec = read_study(study())
    grid = list(tuning_cells(spec))
    assert [(c.method, c.task, c.config.train.learning_rate) for c in grid[:2]] == [
        ("full", "sentiment", 1e-4), ("full", "sentiment", 1e-3)
    ]  # fmt: skip
    assert {c.seed for c in grid} == {1000}
    assert {c.config.train.max_steps for c in grid} == {10}
    assert len(grid) == 8
    rates = {(c.model, c.method, c.task): 0.25 for c in grid}
    assert {c.config.train.learning_rate for c in cells(spec, rates)} == {0.25}


def test_the_grid_may_be_evaluated_on_fewer_rows(study):
    contents = Contents({"small": "m"}, {"sentiment": ("a", "b"), "inference": ("c", "d")})
    given = {"train = { max_steps = 10 }": "train = { max_steps = 10 }\nmax_eval_rows = 50"}
    for known in (None, contents):
        before, spec = read_study(study()), read_study(study(**given))
        assert {c.config.data.max_eval_rows for c in tuning_cells(spec, known)} == {50}
        assert {c.config.data.max_eval_rows for c in cells(spec, None, known)} == {before.tasks["inference"].data.max_eval_rows}
        assert [c.digest for c in cells(spec, None, known)] == [c.digest for c in cells(before, None, known)]
        assert not {c.digest for c in tuning_cells(spec, known)} & {c.digest for c in tuning_cells(before, known)}


def test_a_cell_is_named_by_what_decides_its_result(study):
    def digests(**replaced):
        return [cell.digest for cell in cells(read_study(study(**replaced)))]

    before = digests()
    assert digests(first="second", small="tiny") == before  # names of things
    assert digests(**{"max_steps = 40": "max_steps = 40\nsave_steps = 7"}) == before
    assert digests(**{"max_steps = 40": 'max_steps = 40\nparallel = "ddp"'}) == before
    assert digests(**{"max_steps = 40": 'max_steps = 40\nparallel = "fsdp"\nfsdp_cpu_offload = true'}) == before
    for replaced in (
        {"max_steps = 40": "max_steps = 41"}, {"r = 4": "r = 8"}, {'data = "rows"': 'data = "other"'}, {"[3, 1]": "[4, 2]"},
    ):  # fmt: skip
        assert set(digests(**replaced)) != set(before), replaced
    assert sorted(digests(**{"[3, 1]": "[1, 3]"})) == sorted(before)


def test_rows_and_models_count_by_content(study):
    def digests(contents, **replaced):
        return [cell.digest for cell in cells(read_study(study(**replaced)), None, contents)]

    contents = Contents({"small": "m"}, {"sentiment": ("a", "b"), "inference": ("c", "d")})
    before = digests(contents)
    assert digests(contents, **{'data = "rows"': 'data = { path = "other", max_rows = 5 }'}) == before
    changed = digests(contents._replace(data={"sentiment": ("a", "b"), "inference": ("c", "e")}))
    assert [new == old for new, old in zip(changed, before, strict=True)] == [True, True, False, False] * 2
    assert not set(digests(contents._replace(models={"small": "n"}))) & set(before)


def test_defaults_are_those_that_the_schema_was_made_with():
    """Options at their default are no part of a cell's name, nor is what a kind says of answers. So a change of those makes old
    records say something else: then raise `spec.SCHEMA` and this digest; for a new option or kind, this digest alone."""
    kinds = {name: [kind.max_new_tokens, kind.stop] for name, kind in KINDS.items() if kind.max_new_tokens}
    text = json.dumps([RunConfig().to_dict(), kinds], sort_keys=True)
    known = {1: "f00a024995067962"}
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == known[spec_module.SCHEMA]


def test_paths_are_beside_the_file(study, tmp_path):
    (tmp_path / "rows").mkdir()
    found = {c.task: c.config.data.path for c in cells(read_study(study()))}
    assert found == {"sentiment": "demo", "inference": str(tmp_path / "rows")}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [3, 1]", "seed = [3, 1]", "Did you mean 'seeds'"),
        ("seeds = [3, 1]", "seeds = [3, 3]", "distinct"),
        ("seeds = [3, 1]", "seeds = []", "seeds"),
        ("weight_decay = 0.5", "learning_rate = 5e-5", "method 'full' would not count"),
        ("max_steps = 40", "max_steps = 40\nseed = 3", "Give 'seeds'"),
        ("max_steps = 10 }", 'output_dir = "x" }', "set by the study"),
        ("seeds = [3, 1]", "seeds = [1000]", "1000 of .tuning."),
        ('"classification"', '"clasification"', "Did you mean 'classification'"),
        ('method = "full"', 'method = "lara"', "method"),
        ("lora = { r = 4 }", "lora = { rank = 4 }", "small x qlora-r4"),
        ("max_steps = 40", "max_stpes = 40", "max_stpes"),
        ("block_size = 128", "block_size = 100", "block_size"),
        ('[models]\nsmall = "demo"', "[models]", "models"),
        ("learning_rates = [1e-4, 1e-3]", "learning_rates = [1e-4, 1e-4]", "distinct"),
        ("learning_rates = [1e-4, 1e-3]", "", "would not count without 'learning_rates'"),
        ("train = { max_steps = 10 }", "train = { max_stpes = 10 }", "max_stpes"),
        ("[train]", "[trian]", "Did you mean 'train'"),
        ("name = ", "name == ", "TOML"),
    ],
)
def test_bad_files_are_refused_with_what_to_do(study, old, new, words):
    with pytest.raises(ConfigError, match=words):
        read_study(study(**{old: new}))


def test_missing_columns_say_what_was_found_and_what_is_expected():
    rows = [Row({"context": "c", "question": "q", "reply": "a"}, "rows.jsonl:1")]
    words = (
        r"rows.jsonl:1: the task 'qa' \(question-answering\) lacks answer. Expected: context, question, answer. Found: context, "
    )
    with pytest.raises(DataError, match=words):
        check_columns("qa", "question-answering", Dataset("rows", rows))


@pytest.mark.parametrize("kind", KINDS)
def test_templates_use_the_columns_that_are_checked(kind):
    found = KINDS[kind]
    data = with_templates(kind, DataConfig(path="rows.jsonl"))
    assert data.prompt_template == found.prompt_template
    own = DataConfig(path="rows.jsonl", prompt_template="{x}", completion_template="{y}")
    assert with_templates(kind, own) == own
    if found.prompt_template is not None:
        row = dict.fromkeys(found.columns, "value")
        assert "{" not in found.prompt_template.format(**row) + found.completion_template.format(**row)


def test_a_gguf_file_is_known_by_its_bytes(tmp_path):
    """Its conversion names the version of transformers: another version would run a study's cells again."""
    file, folder = tmp_path / "model.gguf", tmp_path / "converted"
    file.write_bytes(b"GGUF and weights")
    folder.mkdir()
    found = []
    for version in ("5.17", "5.24"):
        (folder / "config.json").write_text(f'{{"transformers_version": "{version}"}}')
        found.append((of_model(str(file), folder), of_model(str(folder), folder)))
    assert found[0][0] == found[1][0] == hashlib.sha256(b"GGUF and weights").hexdigest()
    assert found[0][1] != found[1][1]
