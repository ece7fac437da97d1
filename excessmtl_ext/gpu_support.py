"""Whether the compiled CUDA ops run on a GPU: none may be compiled for its architecture, or its driver may be too old.

Only the driver can tell, so the smallest op is launched once per device. Other errors of that
launch are no answer and go to the caller.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from excessmtl_ext import _extension
from excessmtl_ext import op_calls as ops
from excessmtl_ext.state import ParamLayout, StepOptions, init_state

_RUNS_ON: dict[torch.device, bool] = {}

OBSTACLES = (
    "no kernel image",
    "invalid device function",
    "driver version is insufficient",
    "not supported in the installed CUDA driver",
    "unsupported toolchain",
    "PTX JIT",
    "forward compatibility",
)
"""What ``cudaGetErrorString`` says where code for the GPU is missing or its driver is older than the ops."""


def runs_on(device: torch.device) -> bool:
    """Returns whether the compiled ops run on ``device``, a GPU; warns once where they do not."""
    if "cuda" not in ops.COMPILED_FOR:
        _extension.warn_of_missing_cuda_ops()
        return False
    if device in _RUNS_ON or torch.compiler.is_compiling():
        return _RUNS_ON.get(device, True)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True  # a launch now would be recorded
    try:
        _launch_smallest(device)
    except RuntimeError as error:
        obstacle = str(error).splitlines()[0]
        if not any(each in obstacle for each in OBSTACLES):
            raise
        info = _extension.build_info
        built_for = "" if info is None else f", which are for {info.cuda_architectures or 'no GPU'}"
        warnings.warn(
            f"The compiled ops{built_for}, do not run on {device} ({obstacle}). Steps there use "
            "excessmtl_ext.reference, which is slower. Reinstall where the GPU is, or update its driver: "
            "`pip install --force-reinstall --no-deps .`",
            RuntimeWarning,
            stacklevel=2,
        )
        _RUNS_ON[device] = False
    else:
        _RUNS_ON[device] = True
    return _RUNS_ON[device]


def _launch_smallest(device: torch.device) -> None:
    """Moves the weight of one task; the launch itself reports what :data:`OBSTACLES` lists."""
    name, options = "update_task_weights_", StepOptions()
    plan = ops.plan_arguments(name, frozenset(["tasks"]))
    state = init_state(1, ParamLayout([]), device=device)
    sources: tuple[Any, ...] = {"tasks": [0]}, state, options, (), (options.fisher == "sqrt",)
    positional = [sources[source][key] for source, key in plan.positional]
    keywords = {name: sources[source][key] for name, source, key in plan.keywords}
    ops.find_op(name)(*positional, **keywords)
