"""What autograd says about graphs that were freed or compiled, in terms of the balancer's arguments."""

from __future__ import annotations


def raise_explained(error: RuntimeError) -> None:
    """Raises ``error`` again with the way out, where there is one; returns otherwise."""
    text = str(error)
    if "donated buffers" in text:
        raise RuntimeError(
            "Expected graphs that allow several backward passes, but torch.compile has compiled one for a single pass "
            "(with donated buffers). A balancer turns that off when it is made: leave "
            "torch._functorch.config.donated_buffer = False, make the balancer before the forward pass of the compiled "
            "model, and call torch.compiler.reset() once if the graph is older."
        ) from error
    if "mark a variable ready only once" in text or "marked as ready twice" in text:
        raise RuntimeError(
            "Expected DistributedDataParallel to see one backward pass, but it saw one per task: the shared parameters "
            "belong to a model that it wraps. Give the balancer the wrapper, as in ExcessMTL(parameters, num_tasks=T, "
            "model=ddp)."
        ) from error
    if "a second time" in text:
        raise RuntimeError(
            "Expected graphs that no backward pass has freed, but an earlier one ran through them and this would be "
            "a second time. Give the earlier call retain_graph=True: balancer.backward(losses, retain_graph=True), "
            "balancer.accumulate(task, loss, retain_graph=True), or loss.backward(retain_graph=True)."
        ) from error


def allow_several_passes() -> None:
    """Makes graphs that torch.compile compiles from now on allow more than one backward pass.

    By default such a graph writes its gradients over what it kept for them, and a second pass is an
    error, also where ``retain_graph`` was asked for.
    """
    import torch._functorch.config as config

    config.donated_buffer = False
