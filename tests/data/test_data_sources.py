"""Sources. Oracles: the writers of json, csv, pyarrow and datasets; the properties that a split promises."""

import bz2
import csv
import gzip
import json
import subprocess
import sys
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lownibble.config import DataConfig
from lownibble.data import Dataset, Row, load
from lownibble.data.files import read_file
from lownibble.errors import ConfigError, DataError

ROWS = [{"text": f"film number {n}", "label": ("bad", "good")[n >= 50]} for n in range(100)]
quick = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
words = st.text(st.characters(exclude_categories=["Cs"]))


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fields(dataset) -> list[dict]:
    return [row.fields for row in dataset.rows]


@quick
@given(st.lists(st.dictionaries(words, st.none() | st.integers() | words | st.lists(words)), min_size=1), st.booleans())
def test_jsonl_round_trip(tmp_path, rows, escaped):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode())
    got = read_file(path)
    assert [row.fields for row in got] == rows
    assert [row.origin for row in got] == [f"rows.jsonl:{n}" for n in range(1, len(rows) + 1)]


@quick
@given(st.lists(st.lists(words, min_size=2, max_size=2), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip(tmp_path, rows, end):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([["a", "b"], *rows])
    assert [list(row.fields.values()) for row in read_file(path)] == rows


def test_csv_lines_count_line_breaks_in_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",x\n\nplain,y\nshort\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.csv:6: 1 cells where the header has 2"):
        read_file(path)
    path.write_text('text,label\n"two\nlines",x\n\nplain,y\n', encoding="utf-8")
    assert [row.origin for row in read_file(path)] == ["rows.csv:2", "rows.csv:5"]


def test_very_long_csv_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 200_000, encoding="utf-8")
    limit = csv.field_size_limit()
    assert len(read_file(path)[0].fields["text"]) == 200_000
    assert csv.field_size_limit() == limit


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [(row.fields, row.origin) for row in read_file(path)] == [
        (rows[0], "rows.parquet:1"),
        (rows[1], "rows.parquet:2"),
    ]


def written(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_bytes_of_parquet_are_text_where_they_are(tmp_path):
    """As writers leave strings that do not mark them as such."""
    rows = read_file(written(tmp_path / "a.parquet", text=[b"caf\xc3\xa9", None], label=pa.array([b"\xff", b"a"])))
    assert [row.fields for row in rows] == [{"text": "caf\u00e9", "label": b"\xff"}, {"text": None, "label": b"a"}]
    path = written(tmp_path / "b.parquet", text=["a", "b"], label=pa.array([b"\xff", b"a"]))
    with pytest.raises(DataError, match=r"b.parquet:1: the field 'label' must be text, a number or a date, not bytes"):
        load(DataConfig(path=str(path)))


@pytest.mark.parametrize("values", [pa.array([2**50], pa.timestamp("s")), pa.array([2**30], pa.date32()), "not utf-8"])
def test_a_parquet_column_that_cannot_be_read_is_named(tmp_path, values):
    if values == "not utf-8":
        values = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    path = written(tmp_path / "a.parquet", text=["a"], when=values)
    with pytest.raises(DataError, match=r"The column 'when' of '.*a.parquet' cannot be read: .* leave it out"):
        read_file(path)


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has columns of one name"):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_and_byte_order_mark(tmp_path, suffix, pack):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}'
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(content))
    assert [row.fields["text"] for row in read_file(path)] == ["a", "b"]
    path.write_bytes(pack(content)[:-9])
    with pytest.raises(DataError, match="Cannot read"):
        read_file(path)
    path = tmp_path / f"rows.csv{suffix}"
    path.write_bytes(pack(b"\xef\xbb\xbftext\na\n"))
    assert read_file(path)[0].fields == {"text": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: invalid JSON: Expecting value at column"),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', "a.jsonl:2: the line holds an array, not a JSON object"),
        ("a.jsonl", b"null\n", "a.jsonl:1: the line holds null"),
        ("a.jsonl", b"3\n", "a.jsonl:1: the line holds a bare value"),
        ("a.jsonl", b'{"text": "a", "label": NaN}', "a.jsonl:1: NaN is not a usable value"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: byte 0xff is not valid UTF-8"),
        ("a.jsonl", b'{"a":' * 100_000, "a.jsonl:1: JSON nested too deeply"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b'[\n{"text": "a"},\n3]', r"a\.json\[2\]: it is no JSON object"),
        ("a.json", b'[\n{"text": "a"},\n', "a.json:3: invalid JSON: Expecting value at column 1"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.csv", b"text,text\na,b\n", "a.csv:1: the header has empty or repeated names"),
        ("a.csv", b"text\na,b\n", "a.csv:2: 2 cells where the header has 1"),
        ("a.csv", b'text\nb\n"a\n', "a.csv:3: invalid CSV from here on: unexpected end of data"),
        ("a.csv", b"text\nb\n\xe9t\xe9\n", "a.csv:3: byte 0xe9 is not valid UTF-8"),
        ("a.parquet", b"PAR1 nonsense", "as Parquet"),
        ("a.txt", b"text", "Cannot tell the format"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(DataConfig(path=str(path)))


def test_bad_rows_are_reported_together_up_to_five(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"nonsense\n" * 7)
    with pytest.raises(DataError) as caught:
        read_file(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"a.jsonl:{n}" for n in range(2, 7)]
    assert lines[5:] == [f"and 2 more bad rows in {path}"]


def test_rows_are_checked_when_they_are_loaded(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:2: the field 'label' is missing"):
        load(DataConfig(path=jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}, {"text": "c"}])))


def test_folder_with_train_and_test(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS[:5])
    jsonl(tmp_path / "validation.jsonl", ROWS[5:7])
    folder = str(tmp_path)
    assert [fields(side) for side in load(DataConfig(path=folder))] == [ROWS[:5], ROWS[5:7]]
    (tmp_path / "test.csv").write_text("text,label\na,b\n", encoding="utf-8")
    train, evaluation = load(DataConfig(path=folder))
    assert (fields(train), fields(evaluation)) == (ROWS[:5], [{"text": "a", "label": "b"}])
    _, evaluation = load(DataConfig(path=folder, eval_split="validation"))
    assert fields(evaluation) == ROWS[5:7]
    train, _ = load(DataConfig(path=folder, split="validation"))
    assert fields(train) == ROWS[5:7]
    for options, named in (({"eval_split": "dev"}, "dev"), ({"split": "dev"}, "dev")):
        with pytest.raises(DataError, match=f"has no '{named}' side"):
            load(DataConfig(path=folder, **options))
    jsonl(tmp_path / "train.json", ROWS)
    with pytest.raises(DataError, match=r"holds both train.json and train.jsonl"):
        load(DataConfig(path=folder))


@pytest.mark.parametrize("name", ["val", "valid", "dev", "eval", "Test", "VALIDATION"])
@pytest.mark.parametrize("train_name", ["train", "Train"])
def test_a_folders_evaluation_side_by_other_names(tmp_path, name, train_name):
    jsonl(tmp_path / f"{train_name}.jsonl", ROWS[:5])
    jsonl(tmp_path / f"{name}.jsonl", ROWS[5:7])
    assert [fields(side) for side in load(DataConfig(path=str(tmp_path)))] == [ROWS[:5], ROWS[5:7]]
    train, _ = load(DataConfig(path=str(tmp_path), split=train_name))
    assert fields(train) == ROWS[:5]


def test_a_damaged_file_that_nobody_asks_for_does_not_matter(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS[:5])
    (folder / "test.jsonl").write_text("{damaged")
    path = jsonl(tmp_path / "a.jsonl", ROWS[5:7])
    assert [fields(side) for side in load(DataConfig(path=str(folder), eval_path=path))] == [ROWS[:5], ROWS[5:7]]
    with pytest.raises(DataError, match=r"test.jsonl:1: invalid JSON"):
        load(DataConfig(path=str(folder)))


def test_folder_without_a_test_side_is_split(tmp_path):
    jsonl(tmp_path / "train.jsonl")
    train, evaluation = load(DataConfig(path=str(tmp_path)))
    assert len(train.rows) + len(evaluation.rows) == 100
    assert 2 <= len(evaluation.rows) <= 25


def test_eval_path(tmp_path):
    train_path = jsonl(tmp_path / "a.jsonl", ROWS[:9])
    other = tmp_path / "other"
    other.mkdir()
    jsonl(other / "train.jsonl", ROWS[:50])
    jsonl(other / "test.jsonl", ROWS[50:53])
    for eval_path in (str(other), jsonl(tmp_path / "b.jsonl", ROWS[50:53])):
        train, evaluation = load(DataConfig(path=train_path, eval_path=eval_path))
        assert (fields(train), fields(evaluation)) == (ROWS[:9], ROWS[50:53])
    with pytest.raises(DataError, match="training rows are text-label and the evaluation rows text"):
        load(DataConfig(path=train_path, eval_path=jsonl(tmp_path / "c.jsonl", [{"text": "a"}])))


def test_splits_do_not_apply_to_a_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    for name in ("split", "eval_split"):
        with pytest.raises(ConfigError, match=f"The '{name}' of DataConfig does not apply"):
            load(DataConfig(path=path, **{name: "dev"}))
    with pytest.raises(ConfigError, match="The 'eval_split' of DataConfig does not apply"):
        load(DataConfig(path=path, eval_path=path, eval_split="dev"))


def test_each_side_has_its_own_splits(tmp_path):
    """`split` is of the training data, `eval_split` of the evaluation data, whichever of them is a file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train_sft.jsonl", ROWS[:5])
    jsonl(folder / "test_sft.jsonl", ROWS[5:7])
    path = jsonl(tmp_path / "a.jsonl", ROWS[:9])
    sides = load(DataConfig(path=str(folder), split="train_sft", eval_path=path))
    assert [fields(side) for side in sides] == [ROWS[:5], ROWS[:9]]
    sides = load(DataConfig(path=path, eval_path=str(folder), eval_split="test_sft"))
    assert [fields(side) for side in sides] == [ROWS[:9], ROWS[5:7]]
    sides = load(DataConfig(path=str(folder), split="train_sft", eval_path=str(folder), eval_split="test_sft"))
    assert [fields(side) for side in sides] == [ROWS[:5], ROWS[5:7]]


@quick
@given(st.lists(st.integers(0, 30), min_size=2).filter(lambda n: len(set(n)) > 1), st.sampled_from([0.01, 0.3, 0.99]))
def test_held_out_rows_are_never_on_both_sides(tmp_path, numbers, fraction):
    rows = [{"text": f"t{n}", "label": position % 2, "id": position} for position, n in enumerate(numbers)]
    train, evaluation = load(DataConfig(path=jsonl(tmp_path / "a.jsonl", rows), eval_fraction=fraction))
    sides = [{row["text"] for row in fields(side)} for side in (train, evaluation)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert sorted([row["id"] for side in (train, evaluation) for row in fields(side)]) == list(range(len(rows)))


def test_held_out_rows_stay_when_rows_are_added(tmp_path):
    _, before = load(DataConfig(path=jsonl(tmp_path / "a.jsonl", ROWS[:60])))
    _, after = load(DataConfig(path=jsonl(tmp_path / "a.jsonl", ROWS[30:] + ROWS[:30])))
    assert {row["text"] for row in fields(before)} <= {row["text"] for row in fields(after)}
    _, templated = load(DataConfig(path=jsonl(tmp_path / "a.jsonl", ROWS[:60]), prompt_template="{text}?"))
    assert fields(templated) == fields(before)


def said(*turns):
    return [{"role": {"s": "system", "u": "user", "a": "assistant"}[turn[0]], "content": turn[1:]} for turn in turns]


def test_ids_and_what_comes_before_the_question_do_not_part_conversations(tmp_path):
    """Rows of one question stay on one side; a system message and a greeting ask nothing."""
    for number, start in enumerate((["uhi {}"], ["sbe brief", "ahello", "uhi {}"], ["ahello", "uhi {}"])):
        rows = [
            {"messages": [{**turn, "id": f"{n}-{k}"} for k, turn in enumerate(said(*(t.format(n % 10) for t in start), f"a{n}"))]}
            for n in range(40)
        ]
        sides = load(DataConfig(path=jsonl(tmp_path / f"{number}.jsonl", rows), eval_fraction=0.3))
        asked = [{row["messages"][-2]["content"] for row in fields(side)} for side in sides]
        assert all(asked)
        assert not asked[0] & asked[1]


@pytest.mark.parametrize("row", [{"text": "a"}, {"messages": [{"role": "assistant", "content": "a"}]}])
def test_one_row_cannot_be_split(tmp_path, row):
    with pytest.raises(DataError, match="no two different rows"):
        load(DataConfig(path=jsonl(tmp_path / "a.jsonl", [row, row])))


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"title": f"t{n}"} for n in range(20)], {"prompt_template": "Poem:", "completion_template": "{title}"}),
        ([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(20)], {}),
    ],
)
def test_different_rows_of_one_prompt_cannot_be_split(tmp_path, rows, options):
    with pytest.raises(DataError, match=r"has one prompt only, and rows of one prompt stay on one side: .* eval_path"):
        load(DataConfig(path=jsonl(tmp_path / "a.jsonl", rows), **options))


def test_limits_take_a_nested_sample_in_file_order(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    _, small = load(DataConfig(path=path, eval_path=path, max_eval_rows=20))
    train, large = load(DataConfig(path=path, eval_path=path, max_rows=1000, max_eval_rows=40))
    assert fields(train) == ROWS
    small_rows, large_rows = fields(small), fields(large)
    assert (len(small_rows), len(large_rows)) == (20, 40)
    assert [row for row in ROWS if row in large_rows] == large_rows
    assert all(row in large_rows for row in small_rows)
    assert min(Counter(row["label"] for row in small_rows).values()) >= 5  # the file is sorted by label


def test_digest_is_of_the_content():
    rows = [Row({"a": 1, "b": [2, "é"]}, "x:1"), Row({"a": 2}, "x:2")]
    first = Dataset("x", rows)
    assert first.digest == Dataset("y", [Row({"b": [2, "é"], "a": 1}, "z:9"), Row({"a": 2}, "z:3")]).digest
    assert first.digest != Dataset("x", rows[::-1]).digest
    assert len(first.digest) == 64


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    folder = tmp_path / "reviews"
    (folder / "data").mkdir(parents=True)
    for split, labels in (("train", [0, 1, 0]), ("test", [1])):
        table = datasets.Dataset.from_dict({"text": [f"{split} {n}" for n in labels], "label": labels}, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_hub_layout_with_class_names(hub_folder):
    train, evaluation = load(DataConfig(path=str(hub_folder)))
    assert [row["label"] for row in fields(train)] == ["neg", "pos", "neg"]
    assert evaluation.rows == [Row({"text": "test 1", "label": "pos"}, f"{hub_folder}/test:1")]
    with pytest.raises(DataError, match="has no 'validation' side; it has train, test"):
        load(DataConfig(path=str(hub_folder), eval_split="validation"))


def test_hub_layout_in_the_home_folder(hub_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(hub_folder.parent))
    assert [fields(side) for side in load(DataConfig(path="~/reviews"))] == [
        fields(side) for side in load(DataConfig(path=str(hub_folder)))
    ]


CELLS = 'text,label\nNA,1\n"007",0\nnull,1\n'
READ = [{"text": "NA", "label": "1"}, {"text": "007", "label": "0"}, {"text": "null", "label": "1"}]


@pytest.mark.parametrize("name", ["reviews.csv", "data/train-00000-of-00001.csv", "train/a.csv", "data/train.csv.gz"])
def test_cells_of_a_folder_in_hub_layout_stay_text(hub_folder, monkeypatch, name):
    folder = hub_folder.parent / "cells"
    (path := folder / name).parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(CELLS.encode()) if name.endswith("gz") else CELLS.encode())
    (folder / "README.md").write_text("Reviews.")
    (hub_folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(hub_folder.parent)
    for asked in (str(folder), "cells", "link"):
        train, evaluation = load(DataConfig(path=asked))
        found = sorted(train.rows + evaluation.rows, key=lambda row: row.origin)
        assert [row.fields for row in found] == READ
        assert [row.origin for row in found] == [f"{name}:{line}" for line in (2, 3, 4)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4 does not close the file of a table
def test_a_folder_in_hub_layout_may_say_how_it_is_read(hub_folder):
    features = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n      class_label:\n"
    features += '        names:\n          "0": neg\n          "1": pos\n'
    separator = "configs:\n- config_name: default\n  sep: ;\n  data_files: reviews.csv\n"
    for number, (card, sep) in enumerate([(features, ","), (separator, ";")]):
        folder = hub_folder.parent / str(number)
        folder.mkdir()
        (folder / "reviews.csv").write_text(f"text{sep}label\na{sep}1\nb{sep}0\n")
        (folder / "README.md").write_text(f"---\n{card}---\n")
        train, evaluation = load(DataConfig(path=str(folder)))
        found = sorted(fields(train) + fields(evaluation), key=lambda row: row["text"])
        assert [row["text"] for row in found] == ["a", "b"]
        assert [row["label"] for row in found] == (["pos", "neg"] if card == features else [1, 0])


def test_hub_id_with_configuration_and_hidden_labels(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
        return datasets.DatasetDict({"train": table, "test": table.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="owner/set:sst2/train:2: the field 'label' is null"):
        load(DataConfig(path="owner/set:sst2"))
    assert asked == [("owner/set", "sst2")]


def test_nothing_is_there(tmp_path, monkeypatch):
    def unreachable(name, configuration):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for path in (str(tmp_path / "none"), "./none", "none.jsonl", "a/b/c"):
        with pytest.raises(DataError, match=f"There is no data file or folder '{path}'"):
            load(DataConfig(path=path))
    with pytest.raises(
        DataError, match=r"There is no file or folder 'no/set' in '.*', and .* cannot load 'no/set': Couldn't reach"
    ):
        load(DataConfig(path="no/set"))
    with pytest.raises(DataError, match=r"holds no train.\* file"):
        load(DataConfig(path=str(tmp_path)))


def test_importing_sources_is_light():
    heavy = "('torch', 'transformers', 'datasets', 'pyarrow')"
    code = f"import sys, lownibble.data.sources; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_one_json_array_is_read_like_lines(tmp_path, name):
    path = tmp_path / name
    path.write_text('[\n  {"text": "a"},\n  {"text": "b"}\n]\n')
    train, _ = load(DataConfig(path=str(path), eval_path=str(path)))
    assert [(row.fields, row.origin) for row in train.rows] == [({"text": t}, f"{name}[{n}]") for n, t in ((1, "a"), (2, "b"))]
