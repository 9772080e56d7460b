"""Imports point only to a lower layer; read from the source, so that a lazy import counts too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorabench"
LAYERS = [
    {"quote"},
    {
        "plugins",
        "durable",
        "linalg",
        "products",
        "terminal",
        "environment",
        "sequence",
        "sketch",
        "distributed",
    },
    {"decode", "steps", "nulls", "update", "live", "advice", "krylov", "typeset"},
    {"meter", "stored", "datafile", "tokens", "peak", "flops", "datanames"},
    {"values", "ranks", "weights", "tensorfile", "locate", "conflict", "perturbed"},
    {"weightfile"},
    {"method", "task", "analysis", "figure", "layer", "machine", "data", "targets", "tidy"},
    {"spec", "base", "forks", "claim"},
    {"record", "share", "cluster/slurm", "cluster/local", "cluster/profile", "cluster/packing"},
    {"settle", "cluster/queue", "cluster/verdict"},
    {"cluster/lookup", "cluster/enqueue"},
    {"cluster/standing", "logs"},
    {"cluster/cancel", "watch"},
    {"sweep", "endings"},
    {"model", "readers/*"},
    {"formats", "bases", "pairs", "results", "labels"},
    {"peftfile"},
    {"compression/truncation"},
    {"aggregate", "examine/convert"},
    {"notes", "drawing", "transfer", "longform", "columns"},
    {"tables", "page"},
    {"rows"},
    {"analyses/subspace", "analyses/spectrum"},  # whose directions and metrics other analyses take up
    {"methods/*", "tasks/*", "analyses/*", "figures/*"},
    {"methods/hybrid"},  # of methods
    {"examples", "intervention/directions", "jobs"},
    {"bundle", "batch", "trial", "remarks", "datacheck"},
    {"sharding"},
    {"training", "analyze", "api", "changes"},
    {"train", "account"},
    {"inference", "snapshots"},
    {"serving"},
    {"execute", "report", "examine/inspection", "examine/comparison"},
    {"examine/inspection_text", "examine/inspection_figures"},
    {"examine/inspection_page", "examine/comparison_text"},
    {"examine/comparison_figures"},
    {"examine/comparison_page"},
    {"merging/adapters", "merging/bodies", "status", "stamp", "plan"},
    {"merging/compose", "compression/compressible"},
    {"merging/interference", "compression/compressor"},
    {"compression/compress", "compression/compression_text"},
    {"worker", "preload", "intervention/intervene"},
    {"launch", "warm", "intervention/intervene_report"},
    {"team"},
    {"cluster/work"},
    {"cluster/job"},
    {"cluster/background"},
    {"cluster/submit"},
    {"cluster/submit_text"},
    {"commands/*"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Module name relative to the package -> file; without empty `__init__` files and the scripts of `builtin`."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" and "builtin" not in file.parts]
    return {str(file.relative_to(PACKAGE).with_suffix("")): file for file in files}


def level(name: str) -> int | None:
    return LEVEL.get(name, LEVEL.get(f"{name.partition('/')[0]}/*"))


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
    return names & set(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_from_lower_layers(name: str) -> None:
    own = level(name)
    assert own is not None, f"give {name} a place in LAYERS"
    for imported in imports(ast.parse(modules()[name].read_text("utf-8"))):
        below = level(imported)
        private = imported.rpartition("/")[2].startswith("_") and imported.partition("/")[0] == name.partition("/")[0]
        assert private or (below is not None and below < own), f"{name} imports {imported}, which is not below it"


def test_every_name_in_the_layers_exists() -> None:
    assert {name for name in LEVEL if not name.endswith("/*")} <= set(modules())


def test_the_reader_of_imports_sees_lazy_ones_and_leaves_type_checking_out() -> None:
    text = """
from lorabench import plugins
if TYPE_CHECKING:
    from lorabench.cli import main
def f():
    from lorabench.decode import InputError
    import lorabench.record
"""
    assert imports(ast.parse(text)) == {"plugins", "decode", "record"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_package_files_hold_no_logic(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    if file.parent == PACKAGE:  # what a notebook calls, `lorabench.load`, is imported there; its module is light
        *_, load = tree.body
        assert ast.unparse(load) == "from lorabench.api import load as load"
        tree.body.remove(load)
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body)
