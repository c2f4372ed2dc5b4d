"""The directions of the imports between the rooms, and the size of the files, read from the code itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("library", "networks", "finetune", "tools", "examples", "benchmarks", "tests")
MAY_BE_LONG = {"library/training/trainer.py", "networks/lora.py"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes", "xformers", "tensorboard"}

WITH_TENSORS = {f"library.data.{name}" for name in ("batch", "dataset", "caching.cache", "caching.text_cache")}

_ABOVE = ("library.lora", "library.generation", "library.preprocessing", "library.training", "networks")
# A room, and the rooms that nothing in it may import.
CLOSED = {
    "library.options": ("library.data", "library.models", *_ABOVE),
    "library.data": ("library.models", *_ABOVE),
    "library.models": ("library.data", *_ABOVE),
    "library.lora": ("library.data", "library.generation", "library.preprocessing", "library.training"),
    "library.generation": ("library.lora", "library.data", "library.preprocessing", "library.training", "networks"),
    "library.preprocessing": ("library.models", "library.lora", "library.generation", "library.training", "networks"),
    "networks.lora": ("library",),
    "library": ("examples", "benchmarks", "tests", "tools", "finetune"),
}


def sources() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *(path for place in PLACES for path in sorted((ROOT / place).rglob("*.py")))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources()}


def imports(code: str, module: str, is_package: bool, *, at_import_time: bool = False) -> set[str]:
    """The dotted names that `code` imports, relative ones resolved; both `a` and `a.b` for `from a import b`.

    With `at_import_time`, only what runs when the module is imported: not the bodies of functions, nor what only type
    checkers read.
    """
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    pending: list[ast.AST] = [ast.parse(code)]
    while pending:
        node = pending.pop()
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        pending.extend(ast.iter_child_nodes(node))
    return found


def imports_of(module: str, *, at_import_time: bool = False) -> set[str]:
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", at_import_time=at_import_time)


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def reached(module: str) -> dict[str, str]:
    """Everything that importing `module` imports in turn, each with the module of ours that asks for it."""
    found: dict[str, str] = {}
    pending = [(module, module)]
    while pending:
        name, by = pending.pop()
        packages = [name.rsplit(".", level)[0] for level in range(name.count(".") + 1)]  # importing a.b runs a too
        for part in packages:
            if part not in found:
                found[part] = by
                if part in MODULES:
                    pending.extend((imported, part) for imported in imports_of(part, at_import_time=True))
    return found


def light_modules() -> list[str]:
    """Those that must not import torch, nor anything as heavy: options, command line, and data up to the batches."""
    data = [name for name in MODULES if inside(name, "library.data")]
    rest = [name for name in MODULES if name == "library.cli" or inside(name, "library.options")]
    return rest + [name for name in data if name not in WITH_TENSORS]


def test_imports_are_found():
    code = """
import os.path
from . import near
from ..far import thing
if TYPE_CHECKING:
    import types_only
else:
    import at_run_time
def later():
    import torch
"""
    always = {"os.path", "a.b", "a.b.near", "a.far", "a.far.thing", "at_run_time"}
    assert imports(code, "a.b.c", False, at_import_time=True) == always
    assert imports(code, "a.b.c", False) == always | {"types_only", "torch"}
    assert "a.b.c.near" in imports(code, "a.b.c", True)


@pytest.mark.parametrize("room", CLOSED)
def test_rooms_import_only_in_their_direction(room):
    members = [name for name in MODULES if inside(name, room)]
    assert members
    wrong = {
        f"{name} imports {imported}"
        for name in members
        for imported in imports_of(name)
        if any(inside(imported, closed) for closed in CLOSED[room])
    }
    assert not wrong


@pytest.mark.parametrize("module", light_modules())
def test_what_parses_and_plans_imports_no_torch(module):
    heavy = {f"{name} (by {by})" for name, by in reached(module).items() if name in HEAVY}
    assert not heavy


def test_the_command_line_imports_no_numpy():
    assert "numpy" not in reached("library.cli")


def test_the_lora_module_stands_alone():
    foreign = {name.partition(".")[0] for name in imports_of("networks.lora")} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "safetensors"}


@pytest.mark.parametrize("module", ["library.environment", "tests.run", "tools.quickstart"])
def test_the_setup_needs_only_the_standard_library(module):
    foreign = {name.partition(".")[0] for name in reached(module)} - set(sys.stdlib_module_names)
    assert foreign <= {"library", "tests", "tools"}


def test_files_stay_small():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 420 and name not in MAY_BE_LONG}
