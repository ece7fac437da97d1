"""Any gradient-based balancer as a ``Weighting`` or an ``Aggregator`` of torchjd (0.18)."""

from __future__ import annotations

from torch import Tensor

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.integrations import missing_package

try:
    from torchjd import Stateful
    from torchjd.aggregation import WeightedAggregator, Weighting
    from torchjd.linalg import Matrix
except ModuleNotFoundError as error:
    raise missing_package("torchjd", error) from error


class BalancerWeighting(Weighting[Matrix], Stateful):
    """Weights the rows of a Jacobian as ``balancer`` does; one call is one step.

    The balancer is a submodule: ``state_dict``, ``load_state_dict`` and ``to`` reach its state.

    Args:
        balancer: Made without parameters, as ``ExcessMTL(num_tasks=3)``, since it receives Jacobians
            only; torchjd computes the gradients of the heads.

    Shape:
        matrix [T, P], one row per task. Returns [T] of its dtype, on its device.

    Raises:
        TypeError: ``balancer`` is not a Balancer.
        ValueError: its weights depend on losses, which torchjd does not pass to a Weighting, or it
            weights heads, which are not in the matrix.

    After a non-finite row all weights are NaN, and so is the combined gradient, as after
    ``Balancer.backward``. The state is as before the step, which is counted in
    ``num_skipped_steps``.
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        if not isinstance(balancer, Balancer):
            raise TypeError(
                f"Expected `balancer` to be an excessmtl_ext.Balancer, but got {type(balancer).__name__}."
            )
        needed = balancer.requires - {"task_grads"}
        if needed:
            raise ValueError(
                f"Expected a balancer that works from task gradients, but {type(balancer).__name__} needs "
                f"{', '.join(sorted(needed))}, and torchjd hands over Jacobians only. Use its backward(losses)."
            )
        if balancer.head_weighting != "none":
            raise ValueError(
                f"Expected `head_weighting` 'none', but got {balancer.head_weighting!r}: mtl_backward writes the "
                "heads' gradients before any weight is known. Use balancer.backward(losses), or override it: "
                "head_weighting='none'."
            )
        self.balancer = balancer

    def forward(self, stat: Tensor, /) -> Tensor:
        """Runs one step and returns the factors [T] of the rows: the weights, times what brings rows to one size."""
        balancer = self.balancer
        if balancer.task_weights.device != stat.device:
            balancer.to(stat.device)  # torchjd's own state follows the matrix too
        balancer.update_weights(stat.detach())
        weights = balancer.pass_weights().clone()
        nan = weights.new_full((), float("nan"))
        return weights.where(~balancer.found_nonfinite.any(), nan).to(stat.dtype)

    def reset(self) -> None:
        """Resets the balancer: the next call is a first step, with a matrix of any size."""
        self.balancer.reset()


class BalancerAggregator(WeightedAggregator, Stateful):
    """Combines the rows of a Jacobian with the weights of ``balancer``: for ``jac_to_grad``.

    Args:
        balancer: As for :class:`BalancerWeighting`.

    Shape:
        matrix [T, P]. Returns [P].

    Example:
        >>> import torch
        >>> from excessmtl_ext import ExcessMTL
        >>> aggregator = BalancerAggregator(ExcessMTL(num_tasks=2))
        >>> # Equal weights in the first step; rows are brought to the size of the larger one.
        >>> [round(each, 5) for each in aggregator(torch.tensor([[2.0, 0.0], [0.0, 4.0]])).tolist()]
        [2.0, 2.0]
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__(BalancerWeighting(balancer))

    @property
    def balancer(self) -> Balancer:
        """The balancer that computes the weights."""
        assert isinstance(self.weighting, BalancerWeighting)
        return self.weighting.balancer

    def reset(self) -> None:
        """Resets the balancer: the next call is a first step, with a matrix of any size."""
        self.balancer.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.balancer!r})"
