"""Imports point down, between wings and inside them; read from the source, so that a lazy import counts too."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorabench"
FLOORS = [
    {"config", "linalg", "terminal"},
    {"processes", "data"},
    {"updates"},
    {"models"},
    {"spec"},
    {"store"},
    {"methods", "tasks"},
    {"training"},
    {"launch", "analysis"},
    {"analyses"},
    {"report"},
    {"cluster"},
    {"status"},
    {"adapters"},
    {"api"},
    {"commands"},
]
"""Wings, from the ground up: one imports from those on lower floors, and from itself."""
FRONT = {"__init__", "__main__", "cli"}
"""What stands at the top beside the wings: it may import all of them."""
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings} | dict.fromkeys(FRONT, len(FLOORS))


def modules() -> dict[str, Path]:
    """Module name relative to the package -> file; without empty `__init__` files and the scripts of `builtin`."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" and "builtin" not in file.parts]
    return {str(file.relative_to(PACKAGE).with_suffix("")): file for file in files}


def imports(tree: ast.AST) -> set[str]:
    """The package's modules that a file imports, `if TYPE_CHECKING:` apart."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    names = {name.removeprefix("lorabench.").replace(".", "/") for name in found if name.startswith("lorabench.")}
    return names & MODULES.keys()


@cache
def graph() -> dict[str, set[str]]:
    """Module -> those that it imports; read by the worker that runs these tests, not by each that collects them."""
    return {name: imports(ast.parse(file.read_text("utf-8"))) for name, file in MODULES.items()}


def wing(name: str) -> str:
    return name.partition("/")[0]


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_wings_below(name: str) -> None:
    for imported in graph()[name]:
        own, other = wing(name), wing(imported)
        is_own_face = own in FRONT and other in FRONT
        assert own == other or is_own_face or FLOOR[other] < FLOOR[own], f"{name} imports {imported}: not below it"


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_wings_are_all_that_stands_at_the_top() -> None:
    top = {file.stem for file in PACKAGE.iterdir() if file.name != "__pycache__"}
    assert top == set(FLOOR) and len(top) <= 24
    assert all((PACKAGE / name / "__init__.py").exists() for name in set(FLOOR) - FRONT)


def test_the_reader_of_imports_sees_lazy_ones_and_leaves_type_checking_out() -> None:
    text = """
from lorabench.config import plugins
if TYPE_CHECKING:
    from lorabench.cli import main
def f():
    from lorabench.config.decode import InputError
    import lorabench.store.record
"""
    assert imports(ast.parse(text)) == {"config/plugins", "config/decode", "store/record"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_package_files_hold_no_logic(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    if file.parent == PACKAGE:  # what a notebook calls, `lorabench.load`, is imported there; its modules are light
        face = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert all(node.module and node.module.startswith(("lorabench.api.", "lorabench.config.")) for node in face)
        tree.body = [node for node in tree.body if node not in face]
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body)
