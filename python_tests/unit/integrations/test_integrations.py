"""Adapters are imported on use only, and say what to install when their project is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from excessmtl_ext import Uniform
from excessmtl_ext.integrations import weight_log

ADAPTERS = {
    "torchjd": "torchjd",
    "libmtl": "LibMTL",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "transformers": "transformers",
}


def test_importing_the_package_imports_no_other_project():
    code = (
        "import sys, excessmtl_ext, excessmtl_ext.integrations\n"
        f"loaded = set({sorted(ADAPTERS.values())}) & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("adapter", "package"), ADAPTERS.items(), ids=list(ADAPTERS))
def test_a_missing_package_is_named_with_the_way_to_install_it(adapter, package, monkeypatch):
    name = f"excessmtl_ext.integrations.{adapter}"
    for module in [name, *(m for m in sys.modules if m.split(".")[0] == package)]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Hide(package), *sys.meta_path])
    with pytest.raises(ImportError, match=f"Expected {package} to be installed.*pip install"):
        importlib.import_module(name)


class _Hide:
    """Answers as an environment without ``package`` would."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_named_task_weights_are_copies_that_the_next_step_leaves_alone():
    balancer = Uniform(num_tasks=2)
    named = weight_log.named_task_weights(balancer, ["left", "right"])
    balancer.task_weights.zero_()
    assert {name: value.item() for name, value in named.items()} == {
        "task_weight/left": 0.5,
        "task_weight/right": 0.5,
        "effective_num_tasks": 2.0,
    }


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_names_that_do_not_fit_the_tasks_are_refused(names):
    with pytest.raises(ValueError, match="2 different names"):
        weight_log.named_task_weights(Uniform(num_tasks=2), names)
