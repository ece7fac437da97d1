"""Any balancer as a weighting that LibMTL's Trainer accepts by name.

Supports LibMTL from GitHub and the copy in the ExcessMTL authors' repository. The package on
PyPI (1.1.5) is older and does not import with torchvision 0.13 or later. LibMTL's Trainer always
uses the device ``cuda:0``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.integrations import missing_package

try:
    import LibMTL.weighting as libmtl_weightings  # pyright: ignore[reportMissingImports]
    from LibMTL.weighting import AbsWeighting  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise missing_package(
        "LibMTL",
        error,
        "pip install git+https://github.com/median-research-group/LibMTL, "
        "with torch_geometric, cvxpy, qpsolvers and scipy, which it does not list",
    ) from error

_NAME = "excessmtl_ext:{}"


class BalancerWeighting(AbsWeighting):  # pyright: ignore[reportUntypedBaseClass]
    """Base of the classes that :func:`weighting` registers; LibMTL makes it a base class of its model.

    The balancer is a submodule of LibMTL's model: it moves with the model, and the Trainer saves
    (``save_path``) and loads (``load_path``) its state.
    """

    make_balancer: Callable[..., Balancer]

    # Set by LibMTL's architectures.
    rep_grad: bool
    task_num: int

    def init_param(self) -> None:
        """Makes the balancer; called by LibMTL when the model exists.

        Raises:
            ValueError: ``rep_grad`` is True.
        """
        if self.rep_grad:
            raise ValueError(
                "Expected `rep_grad=False`, but got True: the risk is estimated from gradients of the shared "
                "parameters. Set rep_grad=False and, if that is too slow, update_every > 1."
            )
        self.balancer = self.make_balancer(self.get_share_params(), num_tasks=self.task_num)

    def backward(self, losses: Tensor, **weight_args: Any) -> npt.NDArray[np.float64]:
        """Runs one balanced step.

        Args:
            losses: [T], as the Trainer computes them.
            **weight_args: The Trainer's ``weight_args``. An option of the balancer that is repeated
                here, as LibMTL's ``prepare_args`` does, must have the balancer's value.

        Returns:
            The weights [T] on the CPU, which the Trainer records.

        Raises:
            ValueError: ``weight_args`` contradicts the balancer.
        """
        for name, value in weight_args.items():
            if getattr(self.balancer, name, None) != value:
                raise ValueError(
                    f"Expected `weight_args` without options that the balancer does not have, but got "
                    f"{name}={value!r} for {self.balancer!r}. Give options to the balancer: "
                    f"weighting(functools.partial({type(self.balancer).__name__}, {name}={value!r}))."
                )
        self.balancer.backward(losses)
        return self.balancer.task_weights.cpu().numpy()


def weighting(make_balancer: Callable[..., Balancer]) -> str:
    """Registers a balancing method with LibMTL and returns its name for ``Trainer(weighting=...)``.

    Args:
        make_balancer: A class such as ``ExcessMTL``, or ``functools.partial(ExcessMTL.from_preset,
            "official")``; called as ``make_balancer(shared_parameters, num_tasks=T)`` once per Trainer.

    Returns:
        A unique name.

    Raises:
        TypeError: ``make_balancer`` is a balancer, or cannot be called.
    """
    if isinstance(make_balancer, Balancer) or not callable(make_balancer):
        raise TypeError(
            f"Expected `make_balancer` to make a balancer for LibMTL's encoder, but got a "
            f"{type(make_balancer).__name__}. Pass the class, or functools.partial of it with options."
        )
    number = sum(name.startswith(_NAME.format("")) for name in dir(libmtl_weightings))
    name = _NAME.format(number)
    method = type(
        "RegisteredWeighting", (BalancerWeighting,), {"make_balancer": staticmethod(make_balancer)}
    )
    setattr(libmtl_weightings, name, method)  # the Trainer looks names up here
    return name
