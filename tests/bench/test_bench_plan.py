"""`bench plan` on a CUDA device: which layers its settings compile."""

from lownibble.bench.plan import SETTINGS, _on_a_card, _tokens
from lownibble.planning import hardware
from lownibble.planning.memory import compiles
from lownibble.planning.models import find_shape


def test_a_card_compares_compiled_plans_and_one_that_is_not():
    card = hardware.device("h100")
    settings = _on_a_card((4, 1024))
    assert [setting.method for setting in settings] == ["qlora", "lora", "qlora"]
    for model in ("llama-3-8b", "smollm2-135m"):
        found = [compiles(find_shape(model), card, each.train, tokens=_tokens(each.train)) for each in settings]
        assert found == [True, True, False]


def test_settings_of_a_cpu_are_not_compiled():
    assert {setting.train.torch_compile for setting in SETTINGS} == {False}
