"""`lownibble schema`. Oracles: JSON Schema's own metaschema; the configuration classes, on what loads and what does not."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from test_config import OWN, REQUIRED, VALUES

from lownibble.cli.main import main
from lownibble.cli.schema import CONFIGS, schema
from lownibble.config import RunConfig
from lownibble.errors import ConfigError
from lownibble.leaves import build, leaves

ROOT = Path(__file__).parent.parent.parent


def _refused(command, values):
    return [error.message for error in Draft202012Validator(schema(command)).iter_errors(values)]


def test_it_is_json_schema_and_has_every_command(capsys):
    Draft202012Validator.check_schema(whole := schema())
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == whole
    for command in CONFIGS:
        Draft202012Validator.check_schema(schema(command))
        assert Draft202012Validator(whole).is_valid({command: {"no_such_option": 1}}) is False
    assert main(["schema", "doctor"]) == 2
    assert "Give one of train, compare, study" in capsys.readouterr().err
    assert main(["schema", "train", "--json"]) == 0
    train = json.loads(capsys.readouterr().out)
    assert train["$defs"]["TrainConfig"]["properties"]["output_dir"]["flag"] == "output"
    assert set(train["$defs"]["QuantConfig"]["properties"]["quant_type"]["enum"]) >= {"nf4", "int8", "mxfp4"}


@pytest.mark.parametrize("command", [name for name in CONFIGS if name != "study"])
def test_every_option_is_in_it_with_values_that_load(command):
    config, all_at_once = CONFIGS[command], dict(REQUIRED.get(CONFIGS[command], {}))
    for path, _ in leaves(config):
        value = OWN.get((config, path[-1]), VALUES[path[-1]])
        at = all_at_once if len(path) == 1 else all_at_once.setdefault(path[0], {})
        at[path[-1]] = value
    assert _refused(command, all_at_once) == []


def test_files_that_load_are_valid():
    for file in sorted((ROOT / "studies").glob("*.toml")):
        assert _refused("study", tomllib.loads(file.read_text())) == [], file
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "train.md").read_text(), re.DOTALL)
    loaded = 0
    for block in map(tomllib.loads, blocks):
        try:
            build(RunConfig, block)
        except ConfigError:
            continue
        assert _refused("train", block) == []
        loaded += 1
    assert loaded
    assert _refused("train", {"data": "rows.jsonl", "train": {"report_to": "wandb", "gradient_checkpointing": "offload"}}) == []


@pytest.mark.parametrize(
    "values",
    [
        {"modle": "demo"}, {"lora": {"r": 0}}, {"lora": {"rank": 8}}, {"quant": {"quant_type": "nf5"}}, {"train": {"seed": -1}},
        {"quant": {"block_size": 60}}, {"train": {"memory_budget": "12"}}, {"train": {"report_to": ["wandb", "wb"]}},
        {"train": {"optim": "sgdd"}}, {"lora": {"init_lora_weights": "pisssa"}}, {"method": "qlorra"},
        {"data": {"eval_fraction": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_files_that_do_not_load_are_not(values):
    with pytest.raises(ConfigError):
        build(RunConfig, values)
    assert _refused("train", values)
