"""Why no gradients can be written to a balancer's shared parameters, and the way out."""

from __future__ import annotations

from typing import NoReturn

from excessmtl_ext.arguments import refuse_fake
from excessmtl_ext.step import WeightingRule


def raise_unfit(rule: WeightingRule) -> NoReturn:
    """Raises ValueError with what is wrong with the shared parameters of ``rule``."""
    shared = rule.shared_parameters
    if shared is None:
        raise ValueError(
            "Expected `shared_parameters`: this balancer was made without them and cannot write gradients. Make "
            f"it as {type(rule).__name__}(model.encoder.parameters(), num_tasks={rule.num_tasks}), or use "
            "update_weights()."
        )
    refuse_fake(shared[0])
    if shared[0].is_meta:
        raise ValueError(
            "Expected shared parameters with data, but they are on the meta device: the model got its memory after the "
            "balancer was made, and with it other parameters. Make the balancer after from_pretrained() or to_empty(), "
            "or give it the new ones: balancer.shared_parameters = list(model.encoder.parameters()). load_state_dict() "
            "then takes its saved state."
        )
    if not any(parameter.requires_grad for parameter in shared):
        raise ValueError(
            f"Expected some shared parameter to require grad, but all {len(shared)} are frozen. While only heads "
            "train, call sum(losses).backward()."
        )
    index = next(i for i, frozen in rule.frozen_parameters.items() if frozen.requires_grad)
    raise ValueError(
        f"Expected shared parameter {index}, of shape {list(rule.frozen_parameters[index].shape)}, to stay frozen as "
        "it was when the balancer was made, but it requires grad now, and there is no state for it. Make a new "
        "balancer; or make it while everything that will ever train requires grad, and freeze afterwards."
    )
