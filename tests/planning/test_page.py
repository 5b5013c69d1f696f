"""The page with sliders. Oracle: the plans themselves."""

import json
import re

import pytest

from lownibble.errors import OutputError
from lownibble.planning.page import write_page
from lownibble.planning.plan import plan


@pytest.fixture(scope="module")
def planned():
    return plan("demo", gpu="t4", batch_size=2, max_length=192)


@pytest.mark.slow
def test_the_page_holds_the_plans(planned, tmp_path):
    text = write_page(planned, tmp_path / "new" / "plan.html").read_text()
    data = json.loads(re.search(r'type="application/json" id="data">(.*)</script>', text)[1])
    for row in planned.rows:
        grid = data["grid"][row.verdict.method]
        cell = grid[0][data["batch"].index(2)][data["length"].index(192)]
        assert cell["device"] == list(row.verdict.memory.device)
        assert sum(cell["kinds"].values()) == row.verdict.memory.allocated.likely
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.slow
def test_a_page_that_cannot_be_written(planned, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Give another --html"):
        write_page(planned, tmp_path / "file" / "plan.html")
