"""The house's shape: imports point down, no cycles, and the light rooms stay light. Oracle: the imports in the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "lownibble"
LAYERS = {
    "errors": 0, "waiting": 0, "launch": 0, "lazy": 0, "transfers": 0, "registry": 1, "matching": 1, "options": 2,
    "config": 3, "leaves": 4, "stored": 4, "flags": 5, "listening": 4,
    "embedded": 1, "arch": 1, "tensorfile": 1,
    "kernels": 4, "quant": 5, "models": 6, "calibration": 7, "lora": 8, "optim": 8, "data": 8, "record": 8, "planning": 9,
    "memory": 10, "training": 11, "decoding": 11, "integrations": 11,
    "rehearsal": 12, "measuring": 12, "exporting": 12, "serve": 12,
    "hub": 13, "study": 13,
    "bench": 14, "studio": 14,
    "cli": 15,
    "__main__": 16,
}  # fmt: skip


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports() -> list[tuple[str, str, str]]:
    """(file, importing room, imported room) of every import of a Lownibble module, also inside functions."""
    found = []
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "__init__.py":
            continue  # the front door points everywhere
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                front_door = node.module == "lownibble"
                modules = [f"lownibble.{alias.name}" for alias in node.names] if front_door else [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level > 0:
                pytest.fail(f"{path}: relative import; write lownibble...")
            for module in modules:
                parts = module.split(".")
                if parts[0] == "lownibble" and len(parts) > 1 and parts[1] != "__version__":
                    found.append((str(path.relative_to(SOURCE)), _room(path), parts[1]))
    return found


def test_every_room_has_a_layer():
    rooms = {_room(p) for p in SOURCE.rglob("*.py")} - {"__init__"}
    assert rooms == set(LAYERS)


def test_imports_point_down():
    wrong = [
        f"{file}: {importer} imports {imported}"
        for file, importer, imported in _imports()
        if importer != imported
        and LAYERS[imported] >= LAYERS[importer]
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_modules():
    graph: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        name = "lownibble." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = set()
    for path in SOURCE.rglob("*.py"):
        name = ("lownibble." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:  # top level only: an import inside a function cannot tie a knot
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lownibble"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    graph[name].add(full if full in graph else node.module)

    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for imported in graph.get(module, ()):
            visit(imported, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", ["lownibble", "lownibble.config", "lownibble.errors", "lownibble.embedded", "lownibble.data"])
def test_light_rooms_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_does_not_import_torch():
    code = "import sys; from lownibble.cli.main import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
