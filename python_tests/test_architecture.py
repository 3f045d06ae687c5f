"""The house has floors: imports go down only, and no file grows too long to be read at once.

Every import counts, also inside functions and under ``TYPE_CHECKING``: to name a type of another
module is to depend on it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "oss_ext"

# From the ground up. A module may import from floors below its own, not from its neighbours.
FLOORS = (
    ("version", "arguments", "cpu", "files", "scratch", "events", "words"),
    ("arrays", "progress", "noise", "ops", "statistics", "amplitude"),
    ("schedule", "metrics", "solvers", "hosts", "machine"),
    ("models", "export", "presets"),
    ("trajectory",),
    ("teacher", "sampling", "checkpoint", "sharing"),
    ("dp", "calibrate"),
    ("refine", "evaluate", "coarse", "beam", "verify"),
    ("baselines", "plan"),
    ("estimate", "result"),
    ("search",),
    ("runs", "groups"),
    ("contest",),
    ("report",),
    ("__init__",),  # the public face
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# A family is a folder: its __init__ is the registry and knows every member, a member knows the
# family's base (these files) and its own helpers, whose names begin with its own and "_".
BASES = {
    "cli": {"base", "log", "resume"},
    "dp": {"table", "few"},
    "ops": {"schema", "checks", "backend"},
    "report": {"base", "chart", "markup"},
}
DEFAULT_BASE = {"base"}

FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
MAX_LINES = 400
SOURCES = sorted(
    path
    for folder in ("bench", "csrc", "examples", PACKAGE, "python_tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
)


def module_name(path: Path) -> str:
    """``oss_ext/ops/native.py`` -> ``ops.native``; ``oss_ext/ops/__init__.py`` -> ``ops``."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in (ROOT / PACKAGE).rglob("*.py")}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Not resolved but refused, as ruff does (TID252).
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == PACKAGE:
                # `from oss_ext.ops import dp_step` imports a name of the module, not a module.
                while module and module not in MODULES:
                    module = module.rpartition(".")[0]
                yield node.lineno, module or "__init__"


def objection(importer: str, imported: str) -> str | None:
    """What the rules of the house have against this import, None if nothing."""
    home, _, member = importer.partition(".")
    other_home, _, other = imported.partition(".")
    if home != other_home:
        if FLOOR[other_home] < FLOOR[home]:
            return None
        return f"{other_home} is not on a floor below {home}"
    if not member:
        return None  # the registry
    if other in BASES.get(home, DEFAULT_BASE) or other.startswith(f"{member}_"):
        return None
    return f"a file of {home} may know only the family's base"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module: str) -> None:
    home = module.partition(".")[0]
    assert home in FLOOR, f"{home} has no floor yet: give it one in {Path(__file__).name}"
    broken = [
        f"{MODULES[module]}:{line}: imports {imported}: {reason}"
        for line, imported in imports_of(MODULES[module])
        if (reason := objection(module, imported))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("search", "ops.native", True),
        ("ops.native", "search", False),
        ("teacher", "sampling", False),
        ("models.digits", "export.base", False),
        ("models", "models.digits", True),
        ("models.digits", "models.base", True),
        ("models.digits", "models.digits_net", True),
        ("models.digits", "models.analytic", False),
        ("models.digits", "models", False),
        ("search", "__init__", False),
        ("cli", "__init__", True),
    ],
)
def test_the_rules_are_those_of_the_house(importer: str, imported: str, allowed: bool) -> None:
    assert (objection(importer, imported) is None) == allowed


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"cpu"}))
def test_tensors_are_made_on_a_device_that_is_named(module: str) -> None:
    """``oss_ext.cpu`` makes those of the host: torch's own go where the process has its default."""
    path = MODULES[module]
    broken = [
        f"{path}:{node.lineno}: {ast.unparse(node.func)} without a device"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_at_once(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; more than {MAX_LINES} want to be two files"
