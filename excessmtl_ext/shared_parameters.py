"""Which parameters tasks share: given, or found in a model from the graphs of the losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from excessmtl_ext.arguments import checked_parameters, shortened, trainable
from excessmtl_ext.passes.explain import allow_several_passes
from excessmtl_ext.passes.reach import TaskReach
from excessmtl_ext.saved_state import StateModule
from excessmtl_ext.shared_search import SharedSearch
from excessmtl_ext.state import ParamLayout
from excessmtl_ext.step import Engine, Features, Losses, Observer, WeightingRule
from excessmtl_ext.step_arguments import in_order, loss_roots

if TYPE_CHECKING:
    from excessmtl_ext.distributed.partition import Partition


class SharedParameters(StateModule):
    """Adds to a balancer the parameters that it shares out, and the search for them in a model."""

    num_tasks: int
    engine: Engine
    observers: list[Observer]

    shared_parameters: list[Tensor] | None = None
    """What all tasks share and trains; None where the balancer is only given gradients, or has not found them yet."""

    frozen_parameters: dict[int, Tensor]
    """Given parameters that did not require grad then, by position."""

    search: SharedSearch | None = None
    """The search, where a model was given instead of parameters."""

    @property
    def awaits_losses(self) -> bool:
        """Whether the shared parameters are still to be found."""
        return self.search is not None and self.shared_parameters is None

    def take_given(self, given: Iterable[Tensor] | nn.Module | None) -> Tensor | None:
        """Takes the constructor's argument; returns a parameter on the device of the state, if there is any."""
        self.frozen_parameters = {}
        if isinstance(given, nn.Module):
            self.search = SharedSearch(given, self.num_tasks)
            self.observers = [*self.observers, self.search]
            return self.search.candidates[0]
        if given is None:
            return None
        parameters = checked_parameters(given)
        self.frozen_parameters = {
            index: each for index, each in enumerate(parameters) if not each.requires_grad
        }
        self.shared_parameters = trainable(parameters)
        self.layout = ParamLayout([parameter.numel() for parameter in self.shared_parameters])
        allow_several_passes()
        return self.shared_parameters[0]

    def prepare(self, losses: Losses | None = None, *, features: Features | None = None) -> None:
        """Gives the state its final shape before the first step, and changes nothing else.

        For checkpoints, weight averages and the like that are made then. A balancer that was given parameters has its
        shape already, but for ``estimate_from="features"``.

        Args:
            losses: For a balancer that was given a model: losses of one forward pass, as for :meth:`backward`, from
                whose graphs the shared parameters are found. No pass runs. Where tasks come in batches of their own,
                call it once for each, with None for the others; ``print(balancer)`` says what is missing. Several
                ranks call it together.
            features: For ``estimate_from="features"`` and :meth:`split`: what the heads take from the encoder.

        Raises:
            ValueError: the losses share no parameter of the model, or those that they share are not known.
        """
        if losses is None and features is None:
            raise ValueError(
                "Expected `losses` or `features`, but got neither. Pass what a training step would: prepare(losses)."
            )
        if losses is not None and self.search is not None:
            self.find_shared(losses, waits=True)
        if features is not None:
            self.size_for(features)

    def size_for(self, features: Features) -> None:
        """Gives the state the shape that risks of these features need; nothing where they do not decide it."""

    def find_shared(self, losses: Losses, *, waits: bool = False) -> None:
        """Finds the shared parameters from the losses of a step, once; later only looks at thawed parameters.

        Args:
            losses: As for ``backward``.
            waits: Where the losses do not tell yet, wait for more instead of raising an error.

        Raises:
            ValueError: the losses do not tell which parameters are shared, or no parameter is.
        """
        search = self.search
        assert search is not None
        if self.shared_parameters is not None and not search.has_thawed():
            return
        has_ranks = self.engine.shards_state
        try:
            ordered = in_order(cast(WeightingRule, self), losses)
            reach = TaskReach(loss_roots(ordered, self.num_tasks))
            if self.shared_parameters is not None:
                search.check_thawed(reach)
                return
            search.take(reach, is_whole=has_ranks)
        except Exception as error:
            self.engine.refuse(cast(WeightingRule, self), error)
            raise
        if has_ranks:  # what is raised from here on is raised on all of them
            from excessmtl_ext.distributed.joint_reach import joined

            parallel = cast("Partition", self.engine)
            search.put_tasks(*joined(parallel, repr(self), search.described, search.tasks_of_all()))
        if waits and search.undecided():
            return
        self.bind_found(search.shared())
        search.conclude()

    def bind_found(self, shared: Sequence[Tensor]) -> None:
        """Makes ``shared`` the shared parameters, and gives the state its shape, unless one was loaded.

        Raises:
            ValueError: a state was loaded that belongs to other parameters.
        """
        layout = self.layout_for(shared)
        is_new = self.layout is None
        if self.layout is not None and layout is not None and layout.numels != self.layout.numels:
            raise ValueError(
                "Expected the shared parameters found from the losses to be those of the state, with the sizes "
                f"{shortened(self.layout.numels)}, but got {shortened(layout.numels)}. Load the state of the same "
                "model, or call reset() to give it up."
            )
        self.take_shared(shared)
        self.shared_parameters = list(shared)
        self.layout = self.layout or layout
        allow_several_passes()
        if is_new and layout is not None:
            self.set_state(self.initial_state(shared[0].device))

    def layout_for(self, shared: Sequence[Tensor]) -> ParamLayout | None:
        """Returns the sizes of the gradients that risks are estimated from; None where those are of no parameters."""
        return ParamLayout([parameter.numel() for parameter in shared])

    def take_shared(self, shared: Sequence[Tensor]) -> None:
        """Checks the options against the parameters that were found; for methods whose engine depends on them."""

    def require_found(self, what: str) -> None:
        """Raises ValueError where ``what`` is called before the shared parameters have been found."""
        if self.awaits_losses:
            raise ValueError(
                f"Expected prepare(losses) before {what}: this balancer was given a model, and finds the parameters "
                "that tasks share from the graphs of all losses. Call balancer.prepare(losses) once, or give it the "
                "parameters: model.encoder.parameters()."
            )

    def _obstacle(self) -> str | None:
        if self.awaits_losses and self.engine.shards_state:
            return (
                "Expected prepare(losses) before load_state_dict() with several ranks: each takes the part of the "
                "state that belongs to its part of the shared parameters, and those have not been found yet."
            )
        return super()._obstacle()

    def initial_state(self, device: Any) -> dict[str, Tensor]:
        """Returns every state tensor before the first step, by name."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Returns ``repr``, and what was found in the model that was given."""
        if self.search is None:
            return repr(self)
        return f"{self!r}\n{self.search.text(cast(WeightingRule, self).task_names)}"
