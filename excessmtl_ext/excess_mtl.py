"""ExcessMTL: weights tasks by their estimated excess risk (He et al., ICML 2024)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from excessmtl_ext import functional
from excessmtl_ext.arguments import checked_parameters
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.collapse import CollapseGuard
from excessmtl_ext.engines.cheaper import RotationEngine
from excessmtl_ext.excess_mtl_options import (
    EstimateFrom,
    Preset,
    check_options,
    choose_engine,
    preset_options,
)
from excessmtl_ext.state import (
    MAX_LOG_STEP,
    Fisher,
    ParamLayout,
    StepOptions,
    StepState,
    init_state,
)
from excessmtl_ext.step import Batched, HeadWeighting, NonFinite, Step, Targets, WeightScale

if TYPE_CHECKING:
    import torch.distributed as dist

    from excessmtl_ext.distributed import DataParallel, Reduce

_SIZED_BY_FIRST_STEP = ("sq_grad_sum", "grad_mean")

_step_state = attrgetter(*StepState._fields)
_step_options = attrgetter(*StepOptions._fields)


class ExcessMTL(Balancer):
    r"""Weights tasks by their estimated excess risk (He et al., ICML 2024, https://proceedings.mlr.press/v235/he24n.html).

    .. math:: S_i \leftarrow S_i + g_i^2, \qquad E_i = \textstyle\sum_j g_{ij}^2 / h(S_{ij}), \qquad R_i = E_i / B_i, \\
              \alpha_i \leftarrow \alpha_i \exp(\eta_\alpha R_i) / Z

    (Eqs. 6, 7 and 9, Sec. 3.2), then ``.grad`` of the shared parameters is :math:`\sum_i \alpha_i
    g_i` with the new weights (Algorithm 1). A weight grows with the task's distance from its own
    optimum, not with its loss.

    Args:
        shared_parameters: What all tasks share, usually ``model.encoder.parameters()``. None for a
            balancer that is only given gradients.
        num_tasks: T, between 1 and 512.
        robust_step_size: :math:`\eta_\alpha > 0`. Larger moves the weights faster.
        fisher: ``"sqrt"``: h(S) = sqrt(S + eps) (the official code); ``"linear"``: h(S) = S + eps
            (Eq. 7 as printed).
        eps: Added to S, at least 1.2e-38. With ``"sqrt"``, 1e-7 floors each coordinate of h at
            3e-4.
        num_warmup_steps: Steps with uniform weights whose mean risk is the baseline B. 1 is the
            official code's behaviour; the paper's Appendix C.1 uses 3 epochs. A task without a
            gradient until then gets its baseline at its first one.
        weight_scale: What the weights sum to: ``"simplex"``: 1 (the paper), ``"num_tasks"``: T (the
            official code).
        head_weighting: ``"none"``: heads get the gradient of their own loss (the paper);
            ``"task_weights"``: times the task's weight (the official code).
        gradient_momentum: b in [0, 1). 0: E uses this step's gradient (everybody). Above 0: E uses
            the bias-corrected running mean of the gradients, m / (1 - b^t), so that gradient
            variance does not pass for excess risk. Ours. Needs a second state of T * P elements.
        relative: Divide the risk by its baseline (the official code; the paper where loss types
            differ). False: R = E, for the linear Fisher E / P.
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
        tasks_per_step: Tasks whose risk a step estimates, in rotation; None for all T. When each had
            its turn, a round, the weights move once, with the latest risks; S and m of a task, its
            share of ``num_warmup_steps`` and the momentum count its own turns. A step costs as many
            passes and one more, whatever T is.
        min_weight: Floor f of every weight, mixed in as (1 - T f) a + f; at most 1 / T.
        state_dtype: None: S and m in float32 (float64 for float64 gradients). ``torch.bfloat16``:
            half of that memory. Arithmetic stays float32, and what is stored is rounded
            stochastically, so that sums do not stall: :func:`excessmtl_ext.stochastic_rounding.stochastically_rounded`.
            Not for float64 gradients, nor with ``process_group``.
        rounding_seed: With ``state_dtype=torch.bfloat16``: together with the number of the step, the
            task and the position in the parameters it gives every random bit, so that a run
            repeats itself, also from a checkpoint.
        nonfinite: See :class:`excessmtl_ext.Balancer`.
        batched: See :class:`excessmtl_ext.Balancer`.
        process_group: Ranks that train together, each with a batch of its own, such as
            ``torch.distributed.group.WORLD``. See :mod:`excessmtl_ext.distributed`.
        reduce: ``"grads"``: weights and gradients are those of one process with the joined batch;
            each rank keeps 1 / W of the state. ``"risks"``: each rank estimates risks from its own
            gradients and T numbers are averaged: cheaper, and noisier.
        model: With several ranks, the whole model, so that the gradients of its heads are averaged
            too. If it is a DistributedDataParallel, that does all averaging, and ``process_group``
            may be left out; so it may with ``fully_shard`` parameters.

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
    32, held from the first step on; all of it is in ``state_dict``.

    Example, one task with one parameter, so that every number can be checked by hand (g = 3, then g
    = 4):

        >>> import torch
        >>> balancer = ExcessMTL(num_tasks=2, robust_step_size=1.0, fisher="linear", eps=1e-30)
        >>> # E = 9 / 9 and 1 / 1: the baselines
        >>> balancer.update_weights([[torch.tensor([3.0])], [torch.tensor([1.0])]]).tolist()
        [0.5, 0.5]
        >>> balancer.update_weights([[torch.tensor([4.0])], [torch.tensor([1.0])]]).tolist()  # doctest: +ELLIPSIS
        [0.534..., 0.465...]
        >>> balancer.relative_excess_risk.tolist()  # 16/25 and 1/2
        [0.639..., 0.5]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"task_grads"})

    transient_state: ClassVar[frozenset[str]] = frozenset({"ticket"})

    sq_grad_sum: Tensor
    grad_mean: Tensor
    excess_risk: Tensor
    relative_excess_risk: Tensor
    baseline_excess_risk: Tensor
    num_task_steps: Tensor
    ticket: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | None = None,
        *,
        num_tasks: int,
        robust_step_size: float = 0.01,
        fisher: Fisher = "sqrt",
        eps: float = 1e-7,
        num_warmup_steps: int = 1,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        gradient_momentum: float = 0.0,
        relative: bool = True,
        update_every: int = 1,
        estimate_from: EstimateFrom = "parameters",
        feature_dim: int = 1,
        tasks_per_step: int | None = None,
        min_weight: float = 0.0,
        state_dtype: torch.dtype | None = None,
        rounding_seed: int = 0,
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        process_group: dist.ProcessGroup | None = None,
        reduce: Reduce = "grads",
        model: nn.Module | None = None,
    ) -> None:
        given = dict(locals())
        check_options(given)
        if shared_parameters is not None:
            shared_parameters = checked_parameters(shared_parameters)
        engine = choose_engine(given, shared_parameters)
        super().__init__(
            shared_parameters,
            num_tasks=num_tasks,
            weight_scale=weight_scale,
            head_weighting=head_weighting,
            nonfinite=nonfinite,
            engine=engine,
        )
        self.robust_step_size = float(robust_step_size)
        self.fisher: Fisher = fisher
        self.eps = float(eps)
        self.num_warmup_steps = num_warmup_steps
        self.gradient_momentum = float(gradient_momentum)
        self.relative = relative
        self.update_every = update_every
        self.feature_dim = feature_dim
        self.tasks_per_step = tasks_per_step
        self.min_weight = float(min_weight)
        self.state_dtype = state_dtype
        self.rounding_seed = rounding_seed
        self.can_stream = engine.stream_obstacle is None
        self.needs_features = estimate_from == "features"
        self._rotation = engine if isinstance(engine, RotationEngine) else None
        self._parallel = cast("DataParallel", engine) if engine.shards_state else None
        self._collapse_guard = CollapseGuard()
        self.observers.append(self._collapse_guard)
        self._subset: list[Tensor] | None = getattr(engine, "subset", None)
        if self._subset is not None:
            self.layout = ParamLayout([parameter.numel() for parameter in self._subset])
        elif self.needs_features:
            self.layout = None  # known from the first features on
        self.set_state(self.initial_state(self.task_weights.device))

    @classmethod
    def from_preset(
        cls, preset: Preset, shared_parameters: Iterable[Tensor] | None = None, **options: Any
    ) -> ExcessMTL:
        """A balancer with a named set of choices; ``options`` are those of the class and override the set.

        Args:
            preset: ``"official"``: follows the weights of the authors' code (step size 0.01, its
                default). ``"paper"``: the text as printed (linear Fisher, weights on the simplex);
                its warm-up is 3 epochs, so ``num_warmup_steps`` must be given. ``"recommended"``:
                gradient momentum 0.98, linear Fisher, step size 3. Of 120 settings the one that met every
                part of the goal on SARCOS and on MultiMNIST at 14 px (one seed, batch 256); of five at full
                size with three seeds the only one too. There, with 80 % of the noisy tasks' labels corrupted
                (none corrupted): clean tasks' error on SARCOS 0.0505 (0.0506), Uniform's 0.0566 (0.0532); clean
                task's accuracy on MultiMNIST 0.946 (0.932), Uniform's 0.939 (0.934). The noisy tasks pay: at
                80 % their error is 0.0739, not 0.0608, their accuracy 0.665, not 0.732. docs/estimator.md has
                the study.
            shared_parameters: As for the class.
            **options: ``num_tasks`` and whatever should differ from the set.

        Raises:
            ValueError: the preset is unknown, or ``"paper"`` is given no ``num_warmup_steps``.
        """
        return cls(shared_parameters, **preset_options(preset, options))

    @property
    def step_options(self) -> StepOptions:
        """The choices as the stateless layer takes them."""
        return StepOptions(*_step_options(self))

    @property
    def step_state(self) -> StepState:
        """The state as the stateless layer takes it: the balancer's own tensors, not copies."""
        buffers = self._buffers
        return StepState(*[buffers[name] for name in StepState._fields])  # type: ignore[misc]

    def initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Every state tensor before the first step, by name.

        S and m get their size, type and device from the first gradients: [T, 0] until then. A rank's part of them is
        known beforehand, and torch.distributed.checkpoint loads into what is there.
        """
        parallel = self._parallel
        state = init_state(
            self.num_tasks,
            ParamLayout([]) if parallel is None else parallel.state_layout,
            dtype=self.state_dtype or torch.float32 if parallel is None else parallel.wire_dtype,
            device=device,
            has_momentum=parallel is not None and self.gradient_momentum > 0,
            weight_total=self.weight_total,
        )
        return state._asdict()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self._parallel is not None:
            for name in _SIZED_BY_FIRST_STEP:
                entries = self._parallel.exported(name, destination.pop(prefix + name))
                destination.update({prefix + key: value for key, value in entries.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._parallel is not None:
            state_dict = self._parallel.imported(state_dict, prefix)
        else:
            state_dict = self._in_own_type(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _in_own_type(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state saved in another type in this balancer's: widened, or rounded to nearest once."""
        is_narrow = self.state_dtype is torch.bfloat16
        has_float64 = any(each.dtype is torch.float64 for each in self.shared_parameters or ())
        own = dict(state_dict)
        for name in _SIZED_BY_FIRST_STEP:
            saved = state_dict.get(prefix + name)
            if saved is None:
                continue
            if (saved.dtype is torch.bfloat16) != is_narrow:
                saved = saved.bfloat16() if is_narrow else saved.float()
            if has_float64 and saved.dtype is torch.float32:
                saved = saved.double()  # what the op asks of the state for such gradients
            own[prefix + name] = saved
        return own

    def _may_resize(self, name: str, tensor: Tensor, saved: Tensor) -> bool:
        if name not in _SIZED_BY_FIRST_STEP or saved.dim() != 2 or saved.shape[0] != self.num_tasks:
            return False
        if saved.shape[1] == 0:  # saved before its first step, or without momentum
            return name == "sq_grad_sum" or self.gradient_momentum == 0.0 or tensor.shape[1] > 0
        if name == "grad_mean" and self.gradient_momentum == 0.0:
            return False
        return self.layout is None or saved.shape[1] == self.layout.padded_numel

    def prepare(self, step: Step) -> tuple[StepState, StepOptions]:
        """Sizes S and m at the first gradients, and checks the device of all later ones; returns state and options."""
        task_grads, layout, _ = step.task_grads
        first = next((grad for grad in task_grads if grad.numel() > 0), self.task_weights)
        device = first.device
        if self.sq_grad_sum.shape[1] == 0:
            has_float64 = any(
                grad.dtype == torch.float64 for grad in task_grads if grad.numel() > 0
            )
            if has_float64 and self.state_dtype is not None:
                raise ValueError(
                    f"Expected gradients narrower than float64 with state_dtype={self.state_dtype}, but got float64. "
                    "Leave `state_dtype` out: float64 gradients get float64 state."
                )
            stored = self.state_dtype or (torch.float64 if has_float64 else torch.float32)
            if device != self.task_weights.device:
                self.to(device)
            columns = layout.padded_numel
            self.sq_grad_sum = torch.zeros(self.num_tasks, columns, dtype=stored, device=device)
            self.grad_mean = torch.zeros(
                self.num_tasks,
                columns if self.gradient_momentum > 0 else 0,
                dtype=stored,
                device=device,
            )
        elif device != self.sq_grad_sum.device:
            raise ValueError(
                f"Expected gradients on {self.sq_grad_sum.device}, where the balancer's state is, but got {device}. "
                f"Call balancer.to({str(device)!r}) after moving the model."
            )
        return self.step_state, self.step_options

    def update(self, step: Step) -> None:
        """Moves the weights by one step (He et al. 2024, Eqs. 6, 7 and 9)."""
        state, options = self.prepare(step)
        grads = step.task_grads
        functional.fused_step_(grads.tensors, grads.layout, state, options, step.grad_scale)

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the weighted sum to ``targets``; after a non-finite step repairs the state and writes NaN."""
        grads = step.task_grads
        functional.combine_(
            grads.tensors,
            targets.outputs,
            grads.layout,
            self.step_state,
            self.step_options,
            step.grad_scale,
            accumulate=targets.accumulate,
        )

    def update_and_combine(self, step: Step, targets: Targets) -> None:
        """:meth:`update` and :meth:`combine` in one op."""
        state, options = self.prepare(step)
        grads = step.task_grads
        functional.fused_step_combine_(
            grads.tensors,
            targets.outputs,
            grads.layout,
            state,
            options,
            step.grad_scale,
            accumulate=targets.accumulate,
        )

    def stream_task(self, step: Step) -> Tensor:
        """Takes in the gradients of one task; returns its new log-weight, not normalised."""
        (task,) = step.tasks
        state, options = self.prepare(step)
        if not step.moves_weights:
            return self.log_task_weights[task].clone()
        grads = step.task_grads
        functional.estimate_task_risk_(
            task, grads.tensors, grads.layout, state, options, step.grad_scale
        )
        is_past_warmup = (state.num_steps >= self.num_warmup_steps).to(state.log_task_weights.dtype)
        log_step = self.robust_step_size * state.relative_excess_risk[task]
        return state.log_task_weights[task] + is_past_warmup * log_step.clamp(max=MAX_LOG_STEP)

    def stream_finish(self, step: Step) -> None:
        """Moves the weights (Eq. 9) once the risk of every task of the step is known."""
        if step.moves_weights:
            functional.update_task_weights_(step.tasks, self.step_state, self.step_options)

    def get_extra_state(self) -> dict[str, Any]:
        """As for every balancer, and whether the collapse guard has warned."""
        return {
            **super().get_extra_state(),
            "has_warned_of_collapse": self._collapse_guard.has_warned,
            "waiting_tasks": []
            if self._rotation is None
            else list(self._rotation.rotation.waiting),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """As for every balancer; a run that has been warned is not warned again."""
        super().set_extra_state(state)
        self._collapse_guard.restart()
        self._collapse_guard.has_warned = state.get("has_warned_of_collapse", False)
        if self._rotation is not None:
            rotation = self._rotation.rotation
            rotation.start_round()
            rotation.waiting = state.get("waiting_tasks") or rotation.waiting

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the constructor that rebuild the balancer, but for those that are objects."""
        names = [
            name
            for name in inspect.signature(ExcessMTL).parameters
            if name not in ("shared_parameters", "process_group", "reduce", "model")
        ]
        return {
            name: self._described_estimate() if name == "estimate_from" else getattr(self, name)
            for name in names
        }

    def _described_estimate(self) -> str:
        if self._subset is not None:
            return f"{len(self._subset)} of {len(self.shared_parameters or ())} parameters"
        return "features" if self.needs_features else "parameters"
