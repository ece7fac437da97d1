"""ExcessMTL: weights tasks by their estimated excess risk (He et al., ICML 2024)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from excessmtl_ext.arguments import checked_parameters, trainable
from excessmtl_ext.collapse import CollapseGuard
from excessmtl_ext.compiled_step import CompiledStep, LossFunction
from excessmtl_ext.engines.cheaper import checked_subset
from excessmtl_ext.engines.rotation import RotationEngine
from excessmtl_ext.excess_mtl_options import (
    EstimateFrom,
    Preset,
    candidates_in,
    check_options,
    choose_engine,
    preset_options,
)
from excessmtl_ext.excess_mtl_rule import ExcessMTLRule
from excessmtl_ext.extra_state import Fields, waiting_tasks
from excessmtl_ext.gradient_sizes import Combination
from excessmtl_ext.passes.adapters import Adapter
from excessmtl_ext.split import size_for_features, split
from excessmtl_ext.state import SMALLEST_EPS, Fisher, ParamLayout
from excessmtl_ext.step import (
    Batched,
    Engine,
    Features,
    HeadWeighting,
    NonFinite,
    WeightScale,
)

if TYPE_CHECKING:
    import torch.distributed as dist

    from excessmtl_ext.distributed import DataParallel, Reduce


class ExcessMTL(ExcessMTLRule):
    r"""Weights tasks by their estimated excess risk (He et al., ICML 2024, https://proceedings.mlr.press/v235/he24n.html).

    ``.grad`` of the shared parameters becomes :math:`\sum_i f_i g_i` (Algorithm 1), where

    .. math:: S_i \leftarrow S_i + g_i^2, \qquad m_i \leftarrow b\, m_i + (1 - b)\, g_i, \qquad
              E_i = \textstyle\sum_j \hat m_{ij}^2 / h(S_{ij})

    (Eqs. 6 and 7). The defaults depart from the paper in four choices, each with an option that
    restores the paper's: E is of the running mean m, as the square of one batch's gradient counts
    its variance as risk (``gradient_momentum=0``); the weights follow the share of signal in the
    gradients and stay within bounds, :mod:`excessmtl_ext.bounded_moves`, instead of adding up
    forever (``robust_step_size=0.01``, Eq. 9); task gradients are brought to one size per tensor
    before they are summed, :mod:`excessmtl_ext.gradient_sizes` (``combine="sum"``); and eps is no
    more than what keeps 0 / 0 away (``eps=1e-7``). So no unit of a loss decides anything.

    Args:
        shared_parameters: What all tasks share, usually ``model.encoder.parameters()``. Or the whole
            model, in which the parameters that at least two tasks reach are found in the first step,
            or by :meth:`prepare`; ``print(balancer)`` tells which. None for a balancer that is only
            given gradients.
        num_tasks: T, between 1 and 512.
        robust_step_size: None: bounded moves. A number > 0: :math:`\eta_\alpha` of Eq. 9,
            :math:`\alpha_i \leftarrow \alpha_i \exp(\eta_\alpha E_i / B_i) / Z`. Larger moves the
            weights faster. Bounded moves need ``fisher="linear"``, ``relative=True`` and momentum.
        max_log_ratio: :math:`\kappa \ge 0` of bounded moves: the most that the logarithms of two
            weights differ by, besides the priorities. 0.2: by a factor of 1.2. 0: equal weights.
        combine: ``"per_tensor"``: gradients are brought to one size in each tensor. ``"sum"``: they
            are summed as they are. None: the former. Steps of one pass for all tasks (``update_every``,
            ``estimate_from``, ``tasks_per_step``) bring them to one size by one number per task.
        priorities: T positive numbers. The weights of tasks that are alike are proportional to
            them. None: equal ones.
        fisher: ``"linear"``: h(S) = S + eps (Eq. 7 as printed); ``"sqrt"``: h(S) = sqrt(S + eps)
            (the official code).
        eps: Added to S, at least 1.2e-38. With ``"sqrt"``, 1e-7 floors each coordinate of h at
            3e-4.
        num_warmup_steps: Steps with the weights of the priorities; their mean risk is the baseline B
            of Eq. 9. 1 is the official code's behaviour; the paper's Appendix C.1 uses 3 epochs. A
            task without a gradient until then gets its baseline at its first one.
        weight_scale: What the weights sum to: ``"simplex"``: 1 (the paper), ``"num_tasks"``: T (the
            official code).
        head_weighting: ``"none"``: heads get the gradient of their own loss (the paper);
            ``"task_weights"``: times the task's weight (the official code).
        gradient_momentum: b in [0, 1). 0: E uses this step's gradient (the paper). Above 0: E uses
            the bias-corrected running mean of the gradients, m / (1 - b^t), so that gradient
            variance does not pass for excess risk. Needs a second state of T * P elements.
        relative: For Eq. 9: divide the risk by its baseline (the official code; the paper where loss
            types differ). False: use E, for the linear Fisher E / P.
        update_every: Weights move on calls 1, k + 1, 2k + 1, ...; S, m and everything that counts
            steps know of these only. The others are one ordinary weighted backward pass, which
            looks at no gradient: a NaN there is for the loop to find.
        estimate_from: What risks are estimated from. ``"parameters"``: the gradients of all shared parameters.
            Some of these parameters, such as the encoder's last layer: E, S and m are those of the
            subset, and the full gradient comes from one pass of the weighted loss. A step then
            costs T passes that end where the subset begins, and one whole pass; the state is as
            small as the subset. ``"features"``: the gradients of what the encoder returned, to be
            given as ``backward(losses, features=z)``: E, S and m are those of a linear adapter
            z -> A z behind the encoder at A = I, :math:`g_i = \sum_b \partial \ell_i / \partial z_b \, z_b^\top`,
            C * C elements for C channels. A step costs one pass.
        feature_dim: The dimension of the features that holds the channels: 1 for [B, C] and
            [B, C, H, W], -1 for tokens [B, L, C]. All others count samples.
        feature_adapter: The layer behind the encoder whose gradient the risks of the features are estimated from, see
            :mod:`excessmtl_ext.passes.adapters`. ``"auto"``: ``"full"`` up to 32 channels, ``"low_rank"`` above.
        tasks_per_step: Tasks whose risk a step estimates, in rotation; None for all T. When each had
            its turn, a round, the weights move once, with the latest risks; S and m of a task, its
            share of ``num_warmup_steps`` and the momentum count its own turns. A step costs as many
            passes and one more, whatever T is; a task's first one another, which measures its size.
        min_weight: Floor f of every weight, mixed in as (1 - T f) a + f; at most 1 / T. Or T floors,
            which sum to at most 1.
        state_dtype: None: S and m in float32 (float64 for float64 gradients). ``torch.bfloat16``:
            half of that memory. Arithmetic stays float32, and what is stored is rounded
            stochastically, so that sums do not stall: :func:`excessmtl_ext.stochastic_rounding.stochastically_rounded`.
            Not for float64 gradients, nor with ``process_group``.
        rounding_seed: With ``state_dtype=torch.bfloat16``: together with the number of the step, the
            task and the position in the parameters it gives every random bit, so that a run
            repeats itself, also from a checkpoint.
        nonfinite: See :class:`excessmtl_ext.Balancer`.
        batched: See :class:`excessmtl_ext.Balancer`.
        copy_gradients: See :class:`excessmtl_ext.Balancer`.
        process_group: Ranks that train together, each with a batch of its own, such as
            ``torch.distributed.group.WORLD``. See :mod:`excessmtl_ext.distributed`.
        reduce: ``"grads"``: weights and gradients are those of one process with the joined batch;
            each rank keeps 1 / W of the state. ``"risks"``: each rank estimates risks from its own
            gradients and T numbers are averaged: cheaper, and noisier.
        model: With several ranks, the whole model, so that the gradients of its heads are averaged
            too; the model that parameters are found in, unless another is given. If it is a
            DistributedDataParallel, that does all averaging, and ``process_group`` may be left out; so
            it may with ``fully_shard`` parameters.

    Shape:
        task_grads T * L tensors of P elements in all, float16, bfloat16, float32 or float64.
        task_weights [T], float64, sum 1 (or T). State is float32, float64 for float64 gradients, or
        ``state_dtype``.

    Raises:
        ValueError: an argument is out of range, or the gradients change shape between steps.
        TypeError: an argument has the wrong type.

    Warns:
        TaskCollapseWarning: once, when at 4 of 8 looks, one on every 50th step, there were under 1.1
            effective tasks (``effective_num_tasks``) though another task's relative excess risk was
            on average at least half of the heaviest one's. A look does not wait for the device and
            changes no number.

    Memory: T * P state elements (twice that with momentum), each parameter padded to a multiple of
    32, for those that require grad; held from construction on, and all of it in ``state_dict``.

    Example, one task with one parameter, so that every number can be checked by hand (g = 3, then g
    = 4):

        >>> import torch
        >>> balancer = ExcessMTL(num_tasks=2, robust_step_size=1.0, gradient_momentum=0.0)
        >>> # E = 9 / 9 and 1 / 1: the baselines
        >>> balancer.update_weights([[torch.tensor([3.0])], [torch.tensor([1.0])]]).tolist()
        [0.5, 0.5]
        >>> balancer.update_weights([[torch.tensor([4.0])], [torch.tensor([1.0])]]).tolist()  # doctest: +ELLIPSIS
        [0.534..., 0.465...]
        >>> balancer.relative_excess_risk.tolist()  # 16/25 and 1/2
        [0.639..., 0.5]
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        robust_step_size: float | None = None,
        max_log_ratio: float = 0.2,
        combine: Combination | None = None,
        priorities: Sequence[float] | None = None,
        fisher: Fisher = "linear",
        eps: float = SMALLEST_EPS,
        num_warmup_steps: int = 1,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        gradient_momentum: float = 0.98,
        relative: bool = True,
        update_every: int = 1,
        estimate_from: EstimateFrom = "parameters",
        feature_dim: int = 1,
        feature_adapter: Adapter = "auto",
        tasks_per_step: int | None = None,
        min_weight: float | Sequence[float] = 0.0,
        state_dtype: torch.dtype | None = None,
        rounding_seed: int = 0,
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        copy_gradients: bool = False,
        process_group: dist.ProcessGroup | None = None,
        reduce: Reduce = "grads",
        model: nn.Module | None = None,
    ) -> None:
        given = dict(locals())
        check_options(given)
        candidates = None
        if isinstance(shared_parameters, nn.Module):
            candidates = candidates_in(shared_parameters, given)
            self._given = given
        elif shared_parameters is not None:
            shared_parameters = checked_parameters(shared_parameters)
            candidates = trainable(shared_parameters)
        engine = choose_engine(given, candidates)
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
            copy_gradients=copy_gradients,
            engine=engine,
        )
        self.robust_step_size = None if robust_step_size is None else float(robust_step_size)
        self.max_log_ratio = float(max_log_ratio)
        self.combination = combine
        self.priorities = None if priorities is None else tuple(map(float, priorities))
        self.fisher: Fisher = fisher
        self.eps = float(eps)
        self.num_warmup_steps = num_warmup_steps
        self.gradient_momentum = float(gradient_momentum)
        self.relative = relative
        self.update_every = update_every
        self.feature_dim = feature_dim
        self.feature_adapter: Adapter = feature_adapter
        self.tasks_per_step = tasks_per_step
        self.min_weight = (
            float(min_weight)
            if isinstance(min_weight, int | float)
            else tuple(map(float, min_weight))
        )
        self.state_dtype = state_dtype
        self.rounding_seed = rounding_seed
        self.needs_features = estimate_from == "features"
        self._subset: list[Tensor] | None = getattr(engine, "subset", None)
        self._use(engine)
        self._collapse_guard = CollapseGuard()
        self.observers.append(self._collapse_guard)
        if self._subset is not None:
            self.layout = ParamLayout([parameter.numel() for parameter in self._subset])
        elif self.needs_features:
            self.layout = None  # known from the first features on
        self.set_state(self.initial_state(self.task_weights.device))

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self.can_stream = engine.stream_obstacle is None
        self._rotation = engine if isinstance(engine, RotationEngine) else None
        shards_state = engine.shards_state and not self.awaits_losses
        self._parallel = cast("DataParallel", engine) if shards_state else None

    def layout_for(self, shared: Sequence[Tensor]) -> ParamLayout | None:
        """Returns None where the layout does not follow from the shared parameters."""
        if self._subset is not None or self.needs_features:
            return None
        return super().layout_for(shared)

    def take_shared(self, shared: Sequence[Tensor]) -> None:
        """Makes the engine of several ranks for the parameters found, and checks that a subset is among them."""
        if self._subset is not None:
            checked_subset(self._subset, shared)
        if self.engine.shards_state:
            self._use(choose_engine(self._given, shared))
            self._parallel = cast("DataParallel", self.engine)

    def size_for(self, features: Features) -> None:
        """Gives the state the shape of the features' adapters, where risks are estimated from them."""
        if self.shared_parameters is None or self.needs_features:
            size_for_features(self, [features] if isinstance(features, Tensor) else list(features))

    @classmethod
    def from_preset(
        cls,
        preset: Preset,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        **options: Any,
    ) -> ExcessMTL:
        """Returns a balancer with a named set of choices; ``options`` are those of the class and override the set.

        Args:
            preset: ``"recommended"``: the defaults. ``"official"``: follows the weights of the
                authors' code (step size 0.01, its default). ``"paper"``: the text as printed (linear
                Fisher, weights on the simplex); its warm-up is 3 epochs, so ``num_warmup_steps``
                must be given. Both add 1e-7 to S, so that the unit of a loss counts where gradients are
                below some 3e-4; ``eps=2**-126`` undoes that. docs/estimator.md compares them.
            shared_parameters: As for the class.
            **options: ``num_tasks`` and whatever should differ from the set.

        Raises:
            ValueError: the preset is unknown, or ``"paper"`` is given no ``num_warmup_steps``.
        """
        return cls(shared_parameters, **preset_options(preset, options))

    def split(
        self, features: Features, *, grad_scale: Tensor | float | None = None
    ) -> tuple[Any, ...]:
        """Returns T copies of the encoder's output, one per task; the backward pass through them is a balanced step.

        ::

            z = encoder(inputs)
            z_a, z_b = balancer.split(z)
            loss = loss_a(head_a(z_a)) + loss_b(head_b(z_b))
            loss.backward()  # or a trainer's

        Heads get the gradient of their own loss, the encoder that of the weighted sum, as from
        ``backward(losses, features=z)``, in one pass. A task whose copy no loss depends on is absent.
        What is added to the loss and depends on ``z`` itself is not weighted. Where gradients are
        disabled, ``z`` requires none or the balancer is in evaluation mode (``eval()``), the copies
        are ``z`` and nothing moves.

        A step counts once the gradients of all copies have met: an error further down leaves the
        weights moved. If several ranks are initialised, each of them comes through its node, and the
        weights are those of the joined batch.

        Args:
            features: What the heads take from the encoder: a tensor, or several in a list.
            grad_scale: Loss scale of the backward pass to come, as ``GradScaler.get_scale()``.

        Returns:
            T tensors, or T tuples of as many tensors as ``features`` has. They are views: layers
            that begin a head must not write in place.

        Raises:
            ValueError: shape or device is not as expected, or the options ask for other gradients.
            RuntimeError: in the backward pass, where an earlier one has moved the weights already.
        """
        return split(self, self._close, features, grad_scale)

    def compiled(
        self,
        loss_function: LossFunction,
        optimizer: Optimizer | None = None,
        *,
        mode: str | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> CompiledStep:
        """Returns a training step as one graph of ``torch.compile``: ``losses = step(*batch)``.

        Arguments, results and errors are those of :class:`excessmtl_ext.compiled_step.CompiledStep`.
        Gradients are added to ``.grad``, as by :meth:`backward`: call ``optimizer.zero_grad()`` before each step.
        """
        return CompiledStep(
            self, loss_function, optimizer, close=self._close, mode=mode, backend=backend
        )

    def reset(self) -> None:
        """Forgets everything, as every balancer does."""
        self.lone_tasks = frozenset()
        super().reset()

    def host_state(self) -> Fields:
        """Adds whether the collapse guard has warned, and which tasks wait for their turn."""
        fields = super().host_state()
        fields["has_warned_of_collapse"] = [float(self._collapse_guard.has_warned)]
        if self._rotation is None:
            waiting = [task for task in range(self.num_tasks) if task not in self.lone_tasks]
        else:
            waiting = self._rotation.rotation.waiting
        fields["waits"] = [float(task in waiting) for task in range(self.num_tasks)]
        return fields

    def set_host_state(self, fields: Fields) -> None:
        """Takes what :meth:`host_state` gave; a run that has been warned is not warned again."""
        super().set_host_state(fields)
        if self._parallel is not None:
            self._parallel.is_compared = False
        self._collapse_guard.restart()
        self._collapse_guard.has_warned = bool(
            round(fields.get("has_warned_of_collapse", [0.0])[0])
        )
        waiting = waiting_tasks(fields, self.num_tasks)
        if self._rotation is None:
            self.lone_tasks = frozenset(range(self.num_tasks)) - frozenset(waiting)
            return
        self._rotation.rotation.restart()
        self._rotation.rotation.waiting = waiting

    def options(self) -> dict[str, Any]:
        """Returns the constructor's keyword arguments that rebuild the balancer, but for those that are objects."""
        names = [
            name
            for name in inspect.signature(ExcessMTL).parameters
            if name not in ("shared_parameters", "process_group", "reduce", "model")
        ]
        return {
            name: self._described_estimate() if name == "estimate_from" else getattr(self, name)
            for name in names
            if name != "combine"
        } | {"combine": self.combination}

    def _described_estimate(self) -> str:
        if self._subset is not None:
            return f"{len(self._subset)} of {len(self.shared_parameters or ())} parameters"
        return "features" if self.needs_features else "parameters"
