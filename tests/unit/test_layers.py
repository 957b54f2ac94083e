"""The import direction of the rooms, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "strop"

BELOW_EVALS = {
    *("types", "native", "objectives", "distributed", "tokenizer", "models", "optim", "runs"),
    *("data", "generation", "rewards", "environments", "rollouts"),
}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "native": set(),
    "objectives": {"native"},
    "distributed": set(),
    "tokenizer": {"types"},
    "models": {"types", "objectives", "native"},
    "optim": {"distributed", "native"},
    "runs": {"types"},
    "data": {"types", "tokenizer"},
    "generation": {"types", "models", "tokenizer", "native"},
    "rewards": {"types", "models", "tokenizer"},
    "environments": {"types"},
    "rollouts": {"types", "generation", "rewards", "environments", "tokenizer", "models", "runs"},
    "evals": BELOW_EVALS,
    # Model and tokenizer in one file, opened again by another runtime: neither of the two rooms may know the other.
    "export": {"types", "models", "tokenizer", "generation", "runs"},
    "stages": BELOW_EVALS | {"evals"},
    "serving": BELOW_EVALS | {"evals", "ranking"},  # one guard for both pages; its button writes to a store
    "ranking": BELOW_EVALS | {"evals"},
    "cli": set(),
}
"""Room -> the rooms that it may import besides itself. cli may import any, but only inside a function or for types."""

FORBIDDEN_AT_IMPORT = ("torch", "transformers", "datasets", "numpy", "rich", "tyro")
"""What `strop --help` must not load."""


def imports(source: str, module: str, *, is_package: bool = False) -> list[tuple[int, str, bool]]:
    """Every import of a strop module in a source: (line, dotted name, whether it runs when the module is imported).

    `from strop import runs` counts as strop.runs, and relative imports are resolved against `module`.
    """
    tree = ast.parse(source)
    lazy = {id(inner) for outer in ast.walk(tree) if is_lazy(outer) for inner in ast.walk(outer)}
    found: list[tuple[int, str, bool]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        found.extend((node.lineno, name, id(node) not in lazy) for name in names if name.split(".")[0] == "strop")
    return found


def is_lazy(node: ast.AST) -> bool:
    """Whether what is inside does not run on import: a function, or `if TYPE_CHECKING:`."""
    is_typing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return is_typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def room(module: str) -> str:
    """strop.models.decoder -> models; strop itself and the names in its __init__ -> ""."""
    parts = module.split(".")
    is_room = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file())
    return parts[1] if is_room or (len(parts) > 1 and parts[1] in ALLOWED) else ""


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of one module that the table does not allow, as "line N: ..." messages."""
    own = room(module)
    problems: list[str] = []
    for line, name, is_eager in imports(source, module, is_package=is_package):
        target = room(name)
        allowed = target in ("", own) or target in ALLOWED[own] or (own == "cli" and not is_eager)
        if not allowed:
            problems.append(f"line {line}: {own} may not import {name}")
        if target == "stages" == own and stage_of(name) not in ("", stage_of(module)) and stage_of(module) != "ttrl":
            problems.append(f"line {line}: a stage may not import another ({name})")
    return problems


def stage_of(module: str) -> str:
    """The stage that a module of strop.stages is, or "" for other code: a stage has a train()."""
    path = PACKAGE / "stages" / f"{'.'.join(module.split('.')[2:3])}.py"
    if not path.is_file():
        return ""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return path.stem if any(isinstance(node, ast.FunctionDef) and node.name == "train" for node in tree.body) else ""


def modules() -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["strop", *path.relative_to(PACKAGE).with_suffix("").parts]
        found.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def test_every_module_imports_only_what_its_room_may():
    problems = [
        f"{path.relative_to(PACKAGE.parent)}:{problem}"
        for path, module in modules()
        if room(module)
        for problem in violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    ]
    assert not problems, "\n".join(problems)


def test_every_room_is_in_the_table():
    rooms = {room(module) for _, module in modules()} - {""}
    assert rooms - ALLOWED.keys() == set(), "a new room needs a row in the design's table and in ALLOWED"


def test_the_table_has_no_cycle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [name for name, below in ALLOWED.items() if name not in order and below <= set(order)]
        assert ready, f"a cycle among {sorted(ALLOWED.keys() - set(order))}"
        order.extend(ready)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("strop.objectives.kl", "from strop.models.decoder import Decoder"),
        ("strop.objectives.kl", "import strop.types"),
        ("strop.models.decoder", "def f():\n    from strop.tokenizer import Tokenizer"),
        ("strop.models.decoder", "if TYPE_CHECKING:\n    import strop.generation.engine as engine"),
        ("strop.generation.engine", "from strop import rewards"),
        ("strop.generation.engine", "from ..rewards import math"),
        ("strop.evals.tasks", "from strop.stages.grpo import Config"),
        ("strop.cli.main", "from strop.runs import resolve"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("strop.models.decoder", "from strop.types import PackedBatch\nfrom strop.models.cache import KVCache"),
        ("strop.models.decoder", "from .cache import KVCache\nimport torch"),
        ("strop.cli.main", "def f():\n    from strop.stages import grpo\n    from strop.runs import resolve"),
        ("strop.cli.main", "if TYPE_CHECKING:\n    from strop.generation import Engine"),
        ("strop.cli.main", "from strop import __version__\nfrom strop.cli.config import to_toml"),
        ("strop.stages.grpo", "from strop.evals.tasks import evaluate_tasks"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str):
    assert violations(source, module) == []


def test_a_relative_import_in_a_package_is_resolved_against_the_package_itself():
    source = "from .cache import KVCache\nfrom ..rewards import math"
    names = [name for _, name, _ in imports(source, "strop.models", is_package=True)]
    assert names == ["strop.models.cache.KVCache", "strop.rewards.math"]


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from strop.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        f"print('LOADED', [name for name in {FORBIDDEN_AT_IMPORT!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("strop: trains a language model")
    assert done.stdout.splitlines()[-1] == "LOADED []"
