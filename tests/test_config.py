"""Options: each leaf arrives through Python, TOML and flags; bad ones are named. Oracle: the definitions in config/."""

import argparse
import re

import pytest

from lownibble.config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    LoraConfig,
    MergeConfig,
    PlanConfig,
    PushConfig,
    QuantConfig,
    QuantizeConfig,
    RowsConfig,
    RunConfig,
    ServeConfig,
    StudioConfig,
    TrainConfig,
)
from lownibble.errors import ConfigError
from lownibble.flags import add_flags, read
from lownibble.leaves import build, flag_name, leaves
from lownibble.options import n_bytes, read_toml
from lownibble.registry import OBJECTIVES

OBJECTIVES.add("another", object())

VALUES = {
    "model": "some/model", "revision": "v1", "dtype": "bfloat16", "device": "cpu", "method": "lora", "methods": ["full", "lora"],
    "path": "x.jsonl", "eval_path": "y.jsonl", "split": "a", "eval_split": "b", "eval_fraction": 0.3, "prompt_template": "{q}",
    "completion_template": "{a}", "use_chat_template": True, "mask_prompt": False, "trained_turns": "last",
    "overlength": "drop",
    "max_rows": 7, "max_eval_rows": 8, "rows": 5, "calibration_tokens": 4096,
    "quant_type": "fp4", "block_size": 128, "double_quant": False, "compute": "exact", "skip_modules": ["lm_head", "o_proj"],
    "pattern": {"down_proj": {"quant_type": "int8"}}, "objective": "another",
    "beta": 0.3, "loss_type": "hinge", "label_smoothing": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5,
    "precompute_ref_log_probs": True,
    "r": 3, "lora_alpha": 5.0, "lora_dropout": 0.25, "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.down_proj"], "target_experts": False, "bias": "all", "use_rslora": True,
    "use_dora": True, "alora_invocation_tokens": [7, 8],
    "init_lora_weights": "gaussian", "modules_to_save": ["lm_head"], "layers_to_transform": [0, 2],
    "exclude_modules": ["k_proj", "o_proj"], "layers_pattern": "layers", "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 9.0}, "learning_rate": 0.5, "max_steps": 11, "num_train_epochs": 2.5, "batch_size": 3,
    "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "max_grad_norm": 0.3,
    "weight_decay": 0.1, "router_aux_loss_coef": 0.01, "loraplus_lr_ratio": 16.0,
    "optim": "paged_adamw", "optim_page_budget": "64MB", "memory_budget": "12GB",
    "max_length": 99, "group_by_length": True, "packing": True,
    "gradient_checkpointing": True, "torch_compile": True, "cuda_graphs": True, "deterministic": True, "seed": 4, "eval_steps": 5,
    "save_steps": 6, "output_dir": "out", "report_to": ["tensorboard", "wandb"], "resume": True,
    "parallel": "ddp", "fsdp_cpu_offload": True,
    "adapter": "some/adapter", "task": "nli", "harness": ["hellaswag", "arc_easy"], "harness_path": "tasks", "limit": 12,
    "num_fewshot": 3, "quantized": True, "any_base": True, "output": "merged", "onto": "nf4", "base": "some/base",
    "merge_aware": True, "preload": True,
    "adapters": "some/folder", "host": "0.0.0.0", "port": 8123, "api_key": "k", "admin_key": "a", "max_batch": 3,
    "max_context": 99, "max_queue": 5, "max_body": "2MB", "max_requests": 7, "max_prompt": 8, "max_output": 9,
    "max_adapter": "2MB", "max_rank": 9, "adapter_dtype": "float32", "adapter_budget": "3MB", "cache_budget": "4MB",
    "drain_seconds": 2.5,
    "trained_on": "dense", "force": True, "measure_tokens": 77, "source": "some/model", "format": "bnb-4bit", "rounding": "rtn",
    "calibration": "x.jsonl", "bits": 3.5, "gpu": "cpu", "tokens": 12, "records": "some/records", "price": 2.5,
    "repo": "some/repo", "public": True, "dry_run": True, "folder": "some/runs",
    "gpus": [2, 4], "gpus_per_node": 4, "link_gb_per_s": 20.0,
    "seeds": 3,
}  # fmt: skip

OWN = {(PlanConfig, "adapter_dtype"): "bfloat16"}
"""Values of options that another configuration has by the same name, with other values."""

REQUIRED = {
    MergeConfig: {"adapter": "a", "output": "b"}, ExportConfig: {"source": "a", "output": "b"}, QuantizeConfig: {"output": "b"},
    PlanConfig: {"method": "qlora"}, PushConfig: {"source": "a", "repo": "b/c"},
}  # fmt: skip
"""Options without a default, or that others need."""


NEEDS = {
    **{name: {"objective": "dpo"} for name in ("beta", "loss_type", "precompute_ref_log_probs")},
    **{name: {"objective": "kto"} for name in ("desirable_weight", "undesirable_weight")},
    "label_smoothing": {"objective": "dpo", "loss_type": "robust"},
    "fsdp_cpu_offload": {"parallel": "fsdp"},
}
"""Options of [train] that need others -> those."""


CONFIGS = (
    RunConfig,
    CompareConfig,
    EvalConfig,
    RowsConfig,
    MergeConfig,
    ExportConfig,
    QuantizeConfig,
    ServeConfig,
    PlanConfig,
    PushConfig,
    StudioConfig,
)


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return str(value)


def _get(config, path):
    for name in path:
        config = getattr(config, name)
    return config


def _leaves(config):
    return [pytest.param(config, path, field, id=f"{config.__name__}-{'.'.join(path)}") for path, field in leaves(config)]


ALL = _leaves(RunConfig) + [p for p in _leaves(CompareConfig) if p.values[1] in (("methods",), ("seeds",))]
ALL += _leaves(EvalConfig) + _leaves(RowsConfig) + _leaves(MergeConfig) + _leaves(ExportConfig) + _leaves(ServeConfig)
ALL += _leaves(QuantizeConfig) + _leaves(PlanConfig) + _leaves(PushConfig) + _leaves(StudioConfig)


@pytest.mark.parametrize(("config", "path", "field"), ALL)
def test_each_leaf_arrives_by_python_toml_and_flag(config, path, field, tmp_path):
    value, required = OWN.get((config, path[-1]), VALUES[path[-1]]), dict(REQUIRED.get(config, {}))
    if needs := NEEDS.get(path[-1]):
        required["train"] = needs
    assert _get(config(**required), path) != value, "the test must change something"

    nested = value
    for name in reversed(path):
        nested = {name: nested}
    assert _get(build(config, required, nested), path) == value

    file = tmp_path / "run.toml"
    table = f"[{path[0]}]\n" if len(path) > 1 else ""
    file.write_text(f"{table}{path[-1]} = {_toml(value)}\n")
    assert _get(build(config, required, read_toml(file)), path) == value

    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    flag = "--" + flag_name(path, field)
    if field.annotation is bool:
        given = [flag if value else flag.replace("--", "--no-", 1)]
    elif path == ("methods",):
        given = [flag, *value]
    elif isinstance(value, list):
        given = [flag, ",".join(map(str, value))]
    else:
        given = [flag, _toml(value) if isinstance(value, (dict, bool)) else str(value)]
    flat = {name: text for name, text in required.items() if isinstance(text, str)} | (needs or {})
    flags = [word for name, text in flat.items() if path != (name,) for word in (f"--{name.replace('_', '-')}", text)]
    assert _get(read(parser.parse_args([*flags, *given]), config), path) == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--target-modules", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["--target-modules", "q_proj,v_proj", "--target-modules", "o_proj"], ["q_proj", "v_proj", "o_proj"]),
        (["--target-modules", "q_proj"], ["q_proj"]),
        (["--target-modules", "model.layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (["--target-modules", ".*q_proj"], ".*q_proj"),
        (["--target-modules", "all-linear"], "all-linear"),
        (["--target-modules", '["q_proj", "v_proj"]'], ["q_proj", "v_proj"]),
        (["--target-modules", r"model\.layers\.\d{1,2}\.self_attn\.q_proj"], r"model\.layers\.\d{1,2}\.self_attn\.q_proj"),
        (["--target-modules", "[qk]_proj|x"], "[qk]_proj|x"),
        (["--target-modules", r".*\d{1,2}\.q_proj", "v_proj,o_proj"], [r".*\d{1,2}\.q_proj", "v_proj", "o_proj"]),
    ],
)
def test_lists_take_several_words_and_one_word_is_a_name(given, expected):
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    assert read(parser.parse_args(given), RunConfig).lora.target_modules == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--gradient-checkpointing"], True), (["--gradient-checkpointing", "--seed", "4"], True),
        (["--gradient-checkpointing", "true"], True), (["--gradient-checkpointing", "offload"], "offload"),
        (["--no-gradient-checkpointing"], False), (["--gradient-checkpointing=false"], False),
    ],
    ids=str,
)  # fmt: skip
def test_a_switch_with_a_word_is_a_switch_without_it(given, expected, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f"[train]\ngradient_checkpointing = {_toml('offload' if expected is not True else False)}\n")
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    assert read(parser.parse_args(given), RunConfig, str(file)).train.gradient_checkpointing is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["7", "8"], [7, 8]), (["7,8"], [7, 8]), (["7,8", "9"], [7, 8, 9]), (["Hello, world"], "Hello, world"),
        (["[INST] now"], "[INST] now"), (["Hello,", "you"], "Hello, you"),
        ([r"<|im_start|>assistant\n"], "<|im_start|>assistant\n"), (["[1, 2]"], [1, 2]),
    ],
    ids=str,
)  # fmt: skip
def test_invocation_tokens_are_ids_or_the_text_as_it_is(given, expected):
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    found = read(parser.parse_args(["--alora-invocation-tokens", *given]), RunConfig)
    assert found.lora.alora_invocation_tokens == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [(r"Q: {q}\nA:", "Q: {q}\nA:"), (r"a\tb\\nc", "a\tb\\nc"), (r"\frac{q}\\", "\\frac{q}\\"), ("a\nb", "a\nb")],
)
def test_a_template_has_new_lines_as_a_toml_file_has_them(given, expected, tmp_path):
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    assert read(parser.parse_args(["--prompt-template", given]), RunConfig).data.prompt_template == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": True}, "'max_steps' of TrainConfig must be an integer >= 1 or none. Got True"),
        ({"learning_rate": True}, "must be a number > 0. Got True"), ({"packing": "yes"}, "must be true or false. Got 'yes'"),
        ({"max_length": "8"}, "must be an integer >= 2. Got '8'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_looks_like_another_type_is_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig(**values)


def test_a_file_can_say_none():
    assert TrainConfig(max_grad_norm="none").max_grad_norm is None
    with pytest.raises(ConfigError, match=r"must be an integer >= 1. Got 'none'"):
        TrainConfig(batch_size="none")


def test_a_group_that_is_no_table_is_told():
    for value in (5, [{"r": 3}]):
        with pytest.raises(ConfigError, match="'lora' of RunConfig must be"):
            build(RunConfig, {"lora": value}, {"lora": {"r": 4}})


def test_another_word_is_refused(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    with pytest.raises(ConfigError, match=r"'gradient_checkpointing' of TrainConfig must be .*'offload'"):
        read(parser.parse_args(["--gradient-checkpointing", "offlaod"]), RunConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-gradient-checkpointing", "true"])
    assert "--no-gradient-checkpointing takes no value" in capsys.readouterr().err


def test_a_list_flag_twice_is_one_list():
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    found = read(parser.parse_args(["--modules-to-save", "a", "--modules-to-save", "b", "c"]), RunConfig)
    assert found.lora.modules_to_save == ["a", "b", "c"]


def test_values_cover_exactly_the_leaves():
    names = {path[-1] for config in CONFIGS for path, _ in leaves(config)}
    assert names == set(VALUES)


@pytest.mark.parametrize("config", CONFIGS)
def test_leaf_names_and_flags_are_unique(config):
    flags = [flag_name(path, field) for path, field in leaves(config)]
    assert len(flags) == len(set(flags))
    assert len(flags) <= 80  # 74, and 6 of the objectives over preferences, which TRL has as options of each of its trainers


def test_flags_win_over_toml_and_both_over_defaults(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[train]\nmax_steps = 3\nbatch_size = 5\n")
    parser = argparse.ArgumentParser()
    add_flags(parser, CompareConfig)
    config = read(parser.parse_args(["--max-steps", "9"]), CompareConfig, str(file))
    assert (config.train.max_steps, config.train.batch_size) == (9, 5)
    assert config.train.group_by_length, "what neither sets keeps compare's own default"


def test_none_can_be_given_by_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    assert read(parser.parse_args(["--max-grad-norm", "none"]), RunConfig).train.max_grad_norm is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoraConfig(r=0), ["The 'r' of LoraConfig must be an integer >= 1. Got 0."]),
        (lambda: LoraConfig(ranks=8, r=8), ["LoraConfig has no option 'ranks'"]),
        (lambda: LoraConfig(lora_alfa=8), ["Did you mean 'lora_alpha'?"]),
        (lambda: LoraConfig(r=0, lora_dropout=1.0), ["'r' of LoraConfig", "'lora_dropout' of LoraConfig"]),
        (
            lambda: QuantConfig(quant_type="nf5"),
            ["must be one of 'nf4', 'fp4', 'int8', 'int4', 'int3', 'int2', 'fp8', 'nf3', 'nf2', 'mxfp4', ", "Got 'nf5'."],
        ),
        (lambda: QuantConfig(block_size=60), ["'block_size'", "Got 60"]),
        (lambda: TrainConfig(learning_rate=float("nan")), ["'learning_rate'"]),
        (lambda: RunConfig(train={"max_stepz": 1}), ["TrainConfig has no option 'max_stepz'. Did you mean 'max_steps'?"]),
        (lambda: CompareConfig(methods=["lora", "lora"]), ["distinct"]),
        (
            lambda: TrainConfig(packing=True, group_by_length=True),
            ["'group_by_length' of TrainConfig must be false", "--no-group"],
        ),
        (lambda: RunConfig(train={"packing": True, "group_by_length": True}), ["'group_by_length' of TrainConfig must be false"]),
        (lambda: CompareConfig(methods=[]), ["'methods' of CompareConfig"]),
        (lambda: TrainConfig(optim_page_budget="64"), ["'optim_page_budget' of TrainConfig", "'64MB'", "Got '64'"]),
    ],
)
def test_bad_values_are_named_with_what_they_must_be(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("size", "expected"), [("64MB", 64_000_000), ("64 MiB", 64 << 20), ("1.5gib", 3 << 29), ("4096B", 4096), ("2kB", 2000)]
)
def test_sizes(size, expected):
    assert n_bytes(size) == expected


def test_bad_toml_names_the_file(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("r = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(file)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_toml(tmp_path / "absent.toml")


def test_a_resolved_configuration_survives_json():
    config = RunConfig(lora=LoraConfig(rank_pattern={"q_proj": 2}), data="rows.jsonl")
    assert RunConfig(**config.to_dict()) == config


def test_the_output_folder_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert TrainConfig(output_dir="~/runs/first").output_dir == "/home/me/runs/first"
    assert TrainConfig(output_dir="runs/~first").output_dir == "runs/~first"
