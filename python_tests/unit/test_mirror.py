"""Every file of the package has a test file of its own, or is named here with the one that tests it."""

from __future__ import annotations

from pathlib import Path

import excessmtl_ext

UNIT = Path(__file__).parent
PACKAGE = Path(excessmtl_ext.__file__).parent
MIRRORED = ("", "baselines", "engines", "passes")

TESTED_IN = {
    "_ctrl_c": "contract/test_interruptions",
    "batch_trees": "contract/test_graphed_step",
    "compiled_step": "contract/test_compiled_step",
    "composed_ops": "contract/test_commit_step",
    "cuda_graphs": "contract/test_graphed_step",
    "excess_mtl_options": "unit/test_excess_mtl",
    "excess_mtl_rule": "unit/test_excess_mtl",
    "excess_mtl_state": "contract/test_resume",
    "extra_state": "contract/test_checkpoint_portability",
    "gradient_statistics": "unit/test_history",
    "graphed_step": "contract/test_graphed_step",
    "history_writers": "unit/test_history",
    "insight": "unit/test_report",
    "op_arguments": "contract/test_op_registration",
    "op_calls": "contract/test_op_registration",
    "reference_rows": "unit/test_reference",
    "saved_state": "contract/test_saved_states",
    "self_test": "unit/test_doctor",
    "stochastic_rounding": "contract/test_state_dtype",
    "baselines/gradient_norms": "unit/baselines/test_inverse_norm",
    "baselines/loss_based": "unit/baselines/test_uncertainty_weights",
    "engines/from_features": "unit/engines/test_cheaper",
    "engines/graph_node": "unit/test_split",
    "engines/node_exchange": "unit/test_split",
    "passes/adapters": "unit/test_split",
    "passes/reused_memory": "contract/test_reused_memory",
}
"""Files without a test file of their own."""


def files() -> list[str]:
    """The files of the mirrored folders, without their suffix."""
    found = [
        str(file.relative_to(PACKAGE).with_suffix(""))
        for folder in MIRRORED
        for file in (PACKAGE / folder).glob("*.py")
        if file.name != "__init__.py"
    ]
    assert len(found) > 40
    return sorted(found)


def own_test(name: str) -> str:
    """Where the tests of a file are expected."""
    path = Path(name)
    return str(Path("unit") / path.parent / f"test_{path.name.lstrip('_')}")


def test_every_file_has_tests() -> None:
    missing = [
        name
        for name in files()
        if not (UNIT.parent / f"{TESTED_IN.get(name, own_test(name))}.py").is_file()
    ]
    assert missing == []


def test_nothing_is_listed_that_has_tests_of_its_own() -> None:
    assert TESTED_IN.keys() <= set(files())
    assert [name for name, tests in TESTED_IN.items() if tests == own_test(name)] == []
