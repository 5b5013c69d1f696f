"""Every figure in the README stands in a record. Oracle: the records, rendered again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_readme_is_what_the_records_say():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_figure_is_typed_outside_the_rendered_sections():
    text = re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    measured = re.findall(r"\d[\d.,]*\s*(?:tokens/s|GiB|MiB|GB/s|x faster|%)", text)
    assert not measured


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.name)
def test_records_say_what_was_run_and_where(path):
    record = json.loads(path.read_text())
    assert {"kind", "schema", "created", "command", "status", "environment"} <= record.keys()
    assert record["environment"]["versions"]["torch"]
