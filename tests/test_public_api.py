"""The front door: exactly these names, all of them real, and none hidden by a module of the same name."""

import importlib
import inspect

import pytest

import lownibble as ln

PUBLIC = {
    "Codec", "CompareConfig", "DataConfig", "LoraConfig", "Objective", "OptimizerSpec", "PackedWeight", "PlanConfig",
    "QuantConfig", "QuantLinear", "QuantizedTensor", "RunConfig",
    "TrainConfig", "TrainResult", "__version__", "add_lora", "compare", "decode", "dequantize", "drop_cache", "export", "load",
    "load_adapter", "merge", "plan", "push", "quantize", "quantize_model", "run", "save_adapter", "set_adapter", "train",
    "trainable_summary", "use_backend",
}  # fmt: skip


def test_all_is_the_public_interface():
    assert set(ln.__all__) == PUBLIC
    assert set(dir(ln)) == PUBLIC


def test_every_name_resolves_to_a_documented_object():
    for name in PUBLIC - {"__version__"}:
        value = getattr(ln, name)
        assert callable(value), name
        assert inspect.getdoc(value), name


def test_names_stay_functions_after_their_modules_are_imported():
    for module in ("lownibble.training.run", "lownibble.models.load", "lownibble.study.compare", "lownibble.planning.plan"):
        importlib.import_module(module)
    assert all(inspect.isfunction(getattr(ln, name)) for name in ("train", "load", "compare", "run", "plan"))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        ln.no_such_thing  # noqa: B018


def test_version_is_the_package_metadata():
    from importlib.metadata import version

    assert ln.__version__ == version("lownibble")
