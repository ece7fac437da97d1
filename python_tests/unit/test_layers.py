"""Files import from their own layer or from layers below, for annotations too, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import excessmtl_ext

PACKAGE = Path(excessmtl_ext.__file__).parent

LAYERS = (
    {"arguments", "_build_facts", "_extension", "_ctrl_c"},
    {"state", "stochastic_rounding", "dense_order"},
    {"gradient_sizes", "bounded_moves", "reference_rows", "reference"},
    {"op_calls", "gpu_support", "composed_ops", "functional", "op_arguments"},
    {"step", "step_arguments", "unfit_parameters", "skips", "self_test"},
    {
        "passes",
        "given_gradients",
        "saved_state",
        "extra_state",
        "gradient_statistics",
        "history_writers",
    },
    {
        "engines",
        "distributed",
        "history",
        "report",
        "memory",
        "collapse",
        "insight",
        "open_step",
        "weighting",
    },
    {"split", "shared_search", "shared_parameters"},
    {"batch_trees", "cuda_graphs"},
    {"balancer"},
    {"compiled_step"},
    {
        "excess_mtl_options",
        "excess_mtl_state",
        "excess_mtl_rule",
        "excess_mtl",
        "sized_sum",
        "baselines",
    },
    {"graphed_step"},
    {"__init__"},
    {"domains"},
    {"integrations", "doctor"},
    {"data", "models"},
    {"training"},
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
BALANCER_LAYER = LAYER_OF["balancer"]


def name_of(file: Path) -> str:
    """The dotted name below the package; of a folder's ``__init__.py`` the folder's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {
    name_of(file): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if "csrc" not in file.relative_to(PACKAGE).parts
}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names below the package that a file imports anywhere, under TYPE_CHECKING and in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            given = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            given = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in given:
            root, _, rest = name.partition(".")
            if root == "excessmtl_ext":
                parent = rest.rpartition(".")[0]
                yield next((each for each in (rest, parent) if each in FILES), "__init__")


GRAPH = {
    name: set(imports_of(ast.parse(file.read_text()))) - {name} for name, file in FILES.items()
}


def layer_of(name: str) -> int:
    """The number of a file's layer."""
    return LAYER_OF[name.partition(".")[0]]


def test_every_file_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in FILES} == set(LAYER_OF)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_no_layer_above_it(name: str) -> None:
    assert not {each for each in GRAPH[name] if layer_of(each) > layer_of(name)}


def test_no_files_import_each_other_in_a_circle() -> None:
    left = dict(GRAPH)
    while leaves := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", [name for name in FILES if layer_of(name) < BALANCER_LAYER])
def test_nothing_below_the_balancer_names_a_balancer(name: str) -> None:
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(ast.parse(FILES[name].read_text()))
        if isinstance(node, (ast.Name, ast.Attribute))
    }
    assert not used & {"Balancer", "ExcessMTL"}


def test_the_constructor_of_the_base_class_calls_nothing_that_a_subclass_overrides() -> None:
    tree = ast.parse(FILES["balancer"].read_text())
    (base,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Balancer"]
    (init,) = [n for n in base.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    called = {
        node.func.attr
        for node in ast.walk(init)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }
    assert called, "set_state at least"
    overridden = {
        name for method in every_subclass(excessmtl_ext.Balancer) for name in vars(method)
    }
    assert not called & overridden


def every_subclass(kind: type) -> set[type]:
    """The classes of the package that inherit from ``kind``."""
    found = {each for each in kind.__subclasses__() if each.__module__.startswith("excessmtl_ext")}
    return found.union(*map(every_subclass, found))
