"""Every causal architecture of transformers, as docs/models.md says. Oracles: `from_pretrained`, PEFT."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from sweep import PAGE, examine, model_types, page, read_page
from tiny_folders import write_data, write_model

ROWS = read_page()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, data = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("data")
    write_model(base)
    return base, Path(write_data(data))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(f"transformers {transformers.__version__}," not in PAGE.read_text(), reason="the page is of another version")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", model_types())
def test_an_architecture_is_as_the_page_says(folders, tmp_path, model_type):
    assert examine(model_type, tmp_path, *folders) == ROWS[model_type]


def test_the_page_is_what_its_rows_give():
    assert page(ROWS).splitlines()[2:] == PAGE.read_text().splitlines()[2:]
