"""What `lownibble data` says of rows. Oracles: the encoded rows, counted by hand."""

import copy
import json

import pytest
from tiny_folders import write_model

from lownibble.cli.main import main
from lownibble.config import DataConfig, RowsConfig, TrainConfig
from lownibble.data import Dataset, Row, encode
from lownibble.data.inspect import histogram, inspect, pieces, suggested_epochs, warnings_of


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path):
    """Training rows of which one is twice there and one is long; of the evaluation rows one is a training row."""
    train = [{"prompt": f"film {word}", "completion": " good"} for word in ("plot", "actor", "plot")]
    train.append({"prompt": "good film " * 20, "completion": " bad"})
    test = [{"prompt": "film plot", "completion": " good"}, {"prompt": "film bad", "completion": " bad"}]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_sides_rows_and_warnings(tiny_model, files):
    found = inspect(RowsConfig(model=str(tiny_model), data=DataConfig(path=str(files)), train=TrainConfig(max_length=16), rows=2))
    training, evaluation = found["training"], found["evaluation"]
    assert (training["rows"], training["tokens"], training["label_tokens"], training["cut"]) == (4, 3 * 4 + 16, 8, 1)
    assert training["lengths"] == {"shortest": 4, "median": 4, "95%": 4, "longest": 16}
    assert sum(count for _, count in training["histogram"]) == 4
    assert (training["repeated"], training["without_an_end"], evaluation["rows"]) == (1, 0, 2)
    shown = [[("film plot", False), ("good <eos>", True)], [("film actor", False), ("good <eos>", True)]]
    assert [row["pieces"] for row in found["rows"]] == shown
    assert found["warnings"] == [
        "1 of 4 training rows are longer than max_length 16 and are cut",
        "1 of 4 training rows repeat another one",
        "1 of 2 evaluation rows are training rows, too",
    ]


@pytest.mark.parametrize(
    ("rows", "options", "epochs"),
    [
        (180, {}, 5), (180, {"gradient_accumulation_steps": 4}, 10), (799, {}, 2), (800, {}, None), (3, {}, 10),
        (180, {"num_train_epochs": 1}, None), (180, {"max_steps": 5}, None),
    ],
)  # fmt: skip
def test_a_short_run_is_told_unless_its_length_was_chosen(rows, options, epochs):
    assert suggested_epochs(rows, TrainConfig(**options)) == epochs


def test_a_turn_without_an_end_is_told(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = Dataset("rows", [Row({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "r:1")])
    encoded = encode(rows, tokenizer, DataConfig(), 64)
    assert warnings_of([encoded, encoded], tokenizer, 64)[0] == (
        "1 of 1 training rows train no token that ends a turn (r:1): the model may not learn to stop"
    )
    assert [text for text, trained in pieces(encoded.examples[0], tokenizer) if trained]


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 100], list(range(1, 200))])
def test_every_length_is_in_one_bar(lengths):
    bars = histogram(lengths)
    assert len(bars) <= 13
    assert sum(count for _, count in bars) == len(lengths)
    edges = [upto for upto, _ in bars]
    assert edges == sorted(edges)
    assert edges[-1] >= max(lengths)


def test_the_command_prints_one_json_document(tiny_model, files, capsys):
    assert main(["data", str(files), "--model", str(tiny_model), "--max-length", "16", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["training"]["rows"] == 4
    assert "trained is marked" in err
    assert "warning: 1 of 4 training rows are longer" in err
    assert "one epoch of 4 training rows is a short run, which teaches little: try --num-train-epochs 10" in err


def test_bad_rows_are_one_error(tiny_model, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert main(["data", str(path), "--model", str(tiny_model)]) == 2
    assert "bad.jsonl:1: " in capsys.readouterr().err


def test_preferences_are_shown_with_both_answers_and_uneven_labels_are_told(tiny_model, tmp_path):
    pairs = [{"prompt": f"film {word}", "chosen": " good", "rejected": " very bad"} for word in ("plot", "actor")]
    labelled = [
        {"prompt": "film plot", "completion": f" {word}", "label": word == "good"} for word in ("good", "bad", "awful", "fine")
    ]
    for rows, objective in ((pairs, "dpo"), (labelled, "kto")):
        folder = tmp_path / objective
        folder.mkdir()
        for side in ("train", "test"):
            (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = TrainConfig(objective=objective, max_length=16)
        found = inspect(RowsConfig(model=str(tiny_model), data=DataConfig(path=str(folder)), train=train, rows=1))
        if objective == "dpo":
            assert found["rows"][0]["pieces"] == [
                ("film plot", False), ("good <eos>", True), ("film plot", False), ("very bad <eos>", True)
            ]  # fmt: skip
            assert (found["rows"][0]["rejected_from"], found["training"]["tokens"]) == (2, 2 * (4 + 5))
            assert found["training"]["lengths"]["longest"] == 5
            short = inspect(
                RowsConfig(model=str(tiny_model), data=DataConfig(path=str(folder)), train=train.with_options(max_length=4))
            )
            where = "prompts on the left down to half of it, then answers at the end (in 2 rows)"
            assert f"2 of 2 training rows are longer than max_length 4 and are cut: {where}" in short["warnings"]
            assert (short["training"]["cut"], short["training"]["answers_cut"]) == (2, 2)
        else:
            assert found["rows"][0]["label"] is True
            assert "of 4 training rows 1 are good answers and 3 bad: a desirable_weight of 3 evens them out" in found["warnings"]
