"""Any balancer as a weighting that LibMTL's Trainer accepts by name.

For LibMTL as it is on GitHub and the copy in the ExcessMTL authors' repository. The package on
PyPI (1.1.5) is older and does not import with a torchvision from 0.13 on.
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
        "with torch_geometric, cvxpy and qpsolvers beside it",
    ) from error

_NAME = "excessmtl_ext:{}"


class BalancerWeighting(AbsWeighting):  # pyright: ignore[reportUntypedBaseClass]
    """What :func:`weighting` makes a subclass of: LibMTL mixes it into its model, whose decoders and encoder it sees.

    The balancer is a submodule of LibMTL's model: it moves with the model, and its state is in what
    the Trainer saves (``save_path``) and loads (``load_path``).
    """

    make_balancer: Callable[..., Balancer]

    # Set by LibMTL's architectures.
    rep_grad: bool
    task_num: int

    def init_param(self) -> None:
        """Called by LibMTL once the model is there: makes the balancer.

        Raises:
            ValueError: ``rep_grad`` is set.
        """
        if self.rep_grad:
            raise ValueError(
                "Expected `rep_grad=False`, but got True: the risk is estimated from gradients of the shared "
                "parameters. Take rep_grad=False and, where that costs too much, update_every > 1."
            )
        self.balancer = self.make_balancer(self.get_share_params(), num_tasks=self.task_num)

    def backward(self, losses: Tensor, **weight_args: Any) -> npt.NDArray[np.float64]:
        """One balanced step.

        Args:
            losses: [T], as the Trainer computes them.
            **weight_args: The Trainer's ``weight_args``. Options belong to the balancer; one that
                is repeated here, as LibMTL's ``prepare_args`` does, must have the same value.

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
    """Registers a balancing method with LibMTL and returns its name, for ``Trainer(weighting=...)``.

    Args:
        make_balancer: Called as ``make_balancer(shared_parameters, num_tasks=T)`` once per Trainer: a
            class as ``ExcessMTL``, or ``functools.partial(ExcessMTL.from_preset, "official")``.

    Returns:
        A name that no other weighting has.

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
    setattr(libmtl_weightings, name, method)  # where the Trainer looks a name up
    return name
