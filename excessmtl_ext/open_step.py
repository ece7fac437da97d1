"""Steps that are open for longer than a call: a streamed one, and those for which the weights are held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from excessmtl_ext.engines.streaming import Stream
from excessmtl_ext.saved_state import StateModule


class OpenStep(StateModule):
    """Adds :meth:`hold_weights` to a balancer, and refuses what would spoil a streamed step."""

    holds_weights = False
    """Whether steps only apply the weights for the time being."""

    stream: Stream | None
    """The step that ``accumulate`` has begun, or None."""

    @contextmanager
    def hold_weights(self) -> Iterator[None]:
        """Steps in the ``with`` block apply the weights, and neither move nor count them.

        For the closures of L-BFGS and the second evaluation of SAM. Every verb works; with several
        ranks all of them hold::

            balancer.backward(losses)  # moves the weights
            with balancer.hold_weights():
                optimizer.step(closure)  # the closure calls balancer.backward(losses)

        Raises:
            RuntimeError: ``accumulate`` has begun a step.
        """
        self.refuse_open_step("hold_weights()")
        before, self.holds_weights = self.holds_weights, True
        try:
            yield
        finally:
            self.holds_weights = before

    def refuse_open_step(self, what: str) -> None:
        """Raises RuntimeError where ``accumulate`` has begun a step; ``what`` has to wait for its end."""
        if self.stream is not None:
            raise RuntimeError(
                f"Expected finish() before {what}: accumulate() has begun one. Call finish(), or reset() to give the "
                "state up."
            )

    def _obstacle(self) -> str | None:
        if self.stream is not None:
            return (
                "Expected finish() before load_state_dict(): accumulate() has begun a step. Call finish(), or reset() "
                "to give the state up."
            )
        return super()._obstacle()
