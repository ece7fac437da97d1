r"""Two tasks whose optima are known: what equal losses and equal excess risks mean (He et al. 2024, Fig. 1).

Each task estimates a point in the plane from noisy labels :math:`y = c_i + \sigma_i \xi`, :math:`\xi`
standard normal, with the loss :math:`\tfrac{k_i}{2} \|\theta - y\|^2`. So everything is known:

.. math:: E_i(\theta) = \tfrac{k_i}{2} \|\theta - c_i\|^2, \qquad
          \ell_i(\theta) = E_i(\theta) + k_i \sigma_i^2

The second term is the noise of the labels, which no model can learn. The Pareto optimal points are
those between the two centres. Loss weighting ends where the losses are equal and so pays for noise
with the clean task; excess risk weighting ends where both tasks are equally far from their best.

That holds for ExcessMTL given the true excess risks. The *estimated* risks do not equalise the true
ones here. The published estimate, a sum of squared gradients over their accumulated roots, follows
the size of each task's gradient relative to the first step's: its end depends on where training
began, and with label noise the gradient's variance adds to it. The momentum estimate takes that
variance out, but with a linear Fisher it too knows a gradient only relative to its own past.

The share of the noisy task in the sum of both true excess risks (0.5: equal) at the end of 3,000
steps, mean (least, largest) over 16 starting points on the circle of radius 1.5:

    true risks                                           0.50 (0.50, 0.50)
    estimated, published, step size 0.1                  0.31 (0.00, 0.88)
    estimated, momentum 0.98, linear, step size 3        0.67 (0.35, 0.88)
    uniform weights                                      0.80 (0.80, 0.80)
    GroupDRO                                             0.21 (0.21, 0.21)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excessmtl_ext import Balancer, ExcessMTL, GroupDRO, Uniform, functional
from excessmtl_ext.functional import ParamLayout, StepOptions
from excessmtl_ext.training.pictures.style import GRID_COLOUR, TEXT_COLOUR, new_figure, save_figure
from excessmtl_ext.training.run.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_STEPS = 3_000
STEP_SIZE = 0.02
START = (0.0, 1.2)


@dataclass(frozen=True)
class ToyProblem:
    """Two tasks in the plane. The first is steep and clean, the second flat and noisy.

    Attributes:
        centres: c, where each task is at its best.
        curvatures: k > 0.
        label_stds: The standard deviation of each task's labels, per coordinate.
        batch_size: Labels per step and task.
    """

    centres: tuple[tuple[float, float], tuple[float, float]] = ((-1.0, 0.0), (1.0, 0.0))
    curvatures: tuple[float, float] = (4.0, 1.0)
    label_stds: tuple[float, float] = (0.1, 1.2)
    batch_size: int = 32

    def excess_risks(self, theta: Tensor) -> Tensor:
        """Returns the true excess risks [..., 2] at ``theta`` [..., 2]."""
        squares = (theta.unsqueeze(-2) - _as_tensor(self.centres)).square().sum(-1)
        return 0.5 * _as_tensor(self.curvatures) * squares

    @property
    def optimal_losses(self) -> Tensor:
        """[2], the expected loss that label noise leaves at each task's own optimum."""
        return _as_tensor(self.curvatures) * _as_tensor(self.label_stds).square()

    def losses(self, theta: Tensor) -> Tensor:
        """Returns the expected losses [..., 2] at ``theta`` [..., 2]."""
        return self.excess_risks(theta) + self.optimal_losses

    def sample(self, theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws mean losses [2] of one batch per task, and their gradients [2, 2]."""
        noise = torch.randn(2, self.batch_size, 2, generator=generator, dtype=torch.float64)
        spread = _as_tensor(self.label_stds)[:, None, None]
        differences = theta - (_as_tensor(self.centres)[:, None] + spread * noise)
        curvatures = _as_tensor(self.curvatures)
        losses = 0.5 * curvatures * differences.square().sum(-1).mean(1)
        return losses, curvatures[:, None] * differences.mean(1)

    def pareto_set(self, share: Tensor) -> Tensor:
        """Returns the Pareto optimal point [..., 2] at a ``share`` of the way from the first centre to the second."""
        first, second = _as_tensor(self.centres)
        return first + share.unsqueeze(-1) * (second - first)

    @property
    def equal_excess_risk_point(self) -> Tensor:
        """[2], the Pareto optimal point where both excess risks are equal."""
        return self._balanced_point(0.0)

    @property
    def equal_loss_point(self) -> Tensor:
        """[2], the Pareto optimal point where both losses are equal.

        Raises:
            ValueError: there is none: one task's loss is the larger one all along the front.
        """
        return self._balanced_point(float(self.optimal_losses[1] - self.optimal_losses[0]))

    def _balanced_point(self, difference: float) -> Tensor:
        """Finds where the first excess risk exceeds the second by ``difference``: the root of a quadratic."""
        first, second = self.curvatures
        squared_distance = float((_as_tensor(self.centres).diff(dim=0)).square().sum())
        constant = second + 2.0 * difference / squared_distance
        # (first - second) s^2 + 2 second s = constant, solved so that equal curvatures need no case of their own.
        discriminant = second**2 + (first - second) * constant
        root = math.sqrt(discriminant) if discriminant >= 0 else math.nan
        share = constant / (second + root)
        if not 0.0 <= share <= 1.0:
            raise ValueError(
                "Expected `label_stds` that leave a point of equal losses between the centres, "
                f"but got {self.label_stds}."
            )
        return self.pareto_set(torch.tensor(share, dtype=torch.float64))


class TrueRiskWeights:
    """The weights of ExcessMTL if the excess risks were known: Eq. 9, on the package's own op.

    Args:
        num_tasks: T.
        robust_step_size: Of the mirror step.
    """

    def __init__(self, num_tasks: int, robust_step_size: float) -> None:
        """Starts with equal weights."""
        self._tasks = list(range(num_tasks))
        self._state = functional.init_state(num_tasks, ParamLayout([]))
        self._options = StepOptions(robust_step_size=robust_step_size, num_warmup_steps=0)

    def update(self, excess_risks: Tensor) -> Tensor:
        """Moves the weights by the true risks [T]; returns the new weights [T]."""
        self._state.relative_excess_risk.copy_(excess_risks)
        functional.update_task_weights_(self._tasks, self._state, self._options)
        return self._state.task_weights


@dataclass(frozen=True)
class ToyMethod:
    """A way to weigh the two tasks.

    Attributes:
        label: In the figure.
        colour: As in all other figures.
        dashes: Line style; dashed where the risks are estimated.
        build: Makes it.
    """

    label: str
    colour: str
    dashes: str
    build: Callable[[], Balancer | TrueRiskWeights]


def _official() -> Balancer:
    # The default step size, 0.01, would take ten times the steps to come to its end.
    return ExcessMTL.from_preset(
        "official", num_tasks=2, robust_step_size=0.1, weight_scale="simplex"
    )


TOY_METHODS: dict[str, ToyMethod] = {
    "uniform": ToyMethod("Uniform", METHODS["uniform"].colour, "-", lambda: Uniform(num_tasks=2)),
    "groupdro": ToyMethod(
        "GroupDRO (losses)",
        METHODS["groupdro"].colour,
        "-",
        lambda: GroupDRO(num_tasks=2, robust_step_size=0.02),
    ),
    "true-risks": ToyMethod(
        "ExcessMTL, true risks",
        METHODS["excessmtl"].colour,
        "-",
        lambda: TrueRiskWeights(2, robust_step_size=0.02),
    ),
    "official": ToyMethod(
        "ExcessMTL,\npublished estimate",
        METHODS["excessmtl-official"].colour,
        "--",
        _official,
    ),
    "recommended": ToyMethod(
        "ExcessMTL,\nrecommended estimate",
        METHODS["excessmtl-recommended"].colour,
        "--",
        lambda: ExcessMTL.from_preset("recommended", num_tasks=2),
    ),
}


@dataclass(frozen=True)
class ToyRun:
    """One run.

    Attributes:
        method: Key of `TOY_METHODS`.
        thetas: [steps + 1, 2], float64.
        task_weights: [steps, 2], sum 1.
    """

    method: str
    thetas: Tensor
    task_weights: Tensor

    @property
    def end(self) -> Tensor:
        """[2], the mean of the second half: where the run stays, without the jitter of its batches."""
        return self.thetas[len(self.thetas) // 2 :].mean(0)


def run_toy(
    method: str,
    problem: ToyProblem | None = None,
    *,
    num_steps: int = NUM_STEPS,
    start: Sequence[float] = START,
    seed: int = 0,
) -> ToyRun:
    """Runs SGD on the weighted tasks.

    Args:
        method: Key of `TOY_METHODS`.
        problem: What to solve; the default problem when None.
        num_steps: Steps of size 0.02.
        start: First point.
        seed: Decides the labels, the same for all methods.

    Raises:
        ValueError: ``method`` is unknown.
    """
    if method not in TOY_METHODS:
        raise ValueError(
            f"Expected `method` to be one of {', '.join(TOY_METHODS)}, but got {method!r}."
        )
    problem = problem or ToyProblem()
    balancer = TOY_METHODS[method].build()
    generator = torch.Generator().manual_seed(seed)
    theta = _as_tensor(start)
    thetas, task_weights = [theta], []
    for _ in range(num_steps):
        losses, grads = problem.sample(theta, generator)
        if isinstance(balancer, TrueRiskWeights):
            weights = balancer.update(problem.excess_risks(theta))
        else:
            weights = balancer.update_weights(grads, losses)
        theta = theta - STEP_SIZE * (weights @ grads)
        thetas.append(theta)
        task_weights.append(weights.clone())
    return ToyRun(method, torch.stack(thetas), torch.stack(task_weights))


def draw_toy(path: str | Path, problem: ToyProblem | None = None) -> list[ToyRun]:
    """Runs every method and draws Fig. 1: the way through the plane of losses, and what each task is left with.

    Takes about two seconds.

    Args:
        path: Of the picture.
        problem: What to solve; the default problem when None.

    Returns:
        The runs, in the order of `TOY_METHODS`.
    """
    path = Path(path)
    problem = problem or ToyProblem()
    runs = [run_toy(method, problem) for method in TOY_METHODS]
    figure = new_figure(11.5, 5.0)
    plane, bars = figure.subplots(1, 2, width_ratios=[1.15, 1.0])
    _draw_plane(plane, problem, runs)
    _draw_ends(bars, problem, runs)
    for axes in (plane, bars):
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID_COLOUR)
    save_figure(figure, path)
    return runs


def _draw_plane(axes: Axes, problem: ToyProblem, runs: Sequence[ToyRun]) -> None:
    """Draws front, lines of equality, and the runs, in the plane of the two expected losses."""
    front = problem.losses(problem.pareto_set(torch.linspace(0, 1, 400, dtype=torch.float64)))
    start = problem.losses(_as_tensor(START))
    ends = torch.stack([problem.losses(run.end) for run in runs])
    optimal = problem.optimal_losses
    right = 1.12 * float(start[0])
    bottom = 0.85 * float(optimal[1])
    top = 1.05 * float(torch.maximum(start[1], front[:, 1].max()))

    axes.plot(*front.T.numpy(), color="#CCCCCC", linewidth=7, solid_capstyle="round", zorder=1)
    _label(axes, front[int(0.75 * len(front))], "Pareto front", (0, -20), "#777777")
    for offset, text, side in (
        (optimal * 0, "equal losses", "left"),
        (optimal, "equal excess risks", "right"),
    ):
        # y - x is the same all along the line.
        difference = float(offset[1] - offset[0])
        ends_y = torch.tensor([max(bottom, difference), top], dtype=torch.float64)
        axes.plot(
            (ends_y - difference).numpy(), ends_y.numpy(), ":", color="#555555", lw=1.3, zorder=2
        )
        axes.annotate(
            text,
            (top - difference, top),
            (-8 if side == "left" else 12, 3),
            textcoords="offset points",
            ha=side,
            fontsize=9.5,
            color="#555555",
            annotation_clip=False,
        )
    for run, end in zip(runs, ends, strict=True):
        method = TOY_METHODS[run.method]
        way = problem.losses(run.thetas).numpy()
        axes.plot(*way.T, method.dashes, color=method.colour, linewidth=1.7, zorder=3)
        axes.plot(*end.numpy(), "o", color=method.colour, ms=11, mec="white", mew=1.5, zorder=5)
        if run.method in (
            "groupdro",
            "true-risks",
            "official",
        ):  # the rows of the other picture name all
            _label(axes, end, method.label.replace("\n", " "), (12, 0), method.colour)
    axes.plot(*start.numpy(), "ks", markersize=7, zorder=5)
    _label(axes, start, "start", (0, 9), TEXT_COLOUR)
    axes.set_xlim(0, right)
    axes.set_ylim(bottom, top)
    axes.set_title(
        "GroupDRO ends at equal losses; ExcessMTL at equal excess risks,\nif it is given the true ones",
        loc="left",
        pad=24,
        fontsize=11,
        color=TEXT_COLOUR,
    )
    axes.set_xlabel("loss of the clean task", color=TEXT_COLOUR)
    axes.set_ylabel("loss of the noisy task", color=TEXT_COLOUR)


def _label(axes: Axes, point: Tensor, text: str, offset: tuple[float, float], colour: str) -> None:
    axes.annotate(
        text,
        (float(point[0]), float(point[1])),
        offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "center",
        fontsize=9.5,
        color=colour,
        zorder=6,
    )


def _draw_ends(axes: Axes, problem: ToyProblem, runs: Sequence[ToyRun]) -> None:
    """Draws the excess risks that each method ends at."""
    rows = list(reversed(runs))
    for row, run in enumerate(rows):
        colour = TOY_METHODS[run.method].colour
        clean, noisy = problem.excess_risks(run.end).tolist()
        axes.plot([clean, noisy], [row, row], color=colour, linewidth=2.5, zorder=2)
        # A ring that a dot fits into: equal risks show as both.
        axes.plot(noisy, row, "o", color=colour, mfc="white", mew=2, markersize=14, zorder=3)
        axes.plot(clean, row, "o", color=colour, markersize=7.5, zorder=4)
    axes.plot([], [], "o", color=TEXT_COLOUR, markersize=7.5, label="clean task")
    axes.plot([], [], "o", color=TEXT_COLOUR, mfc="white", mew=2, markersize=12, label="noisy task")
    axes.legend(loc="lower right", frameon=False, fontsize=9.5)
    axes.set_yticks(range(len(rows)), [TOY_METHODS[run.method].label for run in rows])
    for label, run in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(TOY_METHODS[run.method].colour)
    axes.grid(axis="x", color=GRID_COLOUR, linewidth=0.6)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_title(
        "What each task is left with at the end",
        loc="left",
        pad=24,
        fontsize=11,
        color=TEXT_COLOUR,
    )
    axes.set_xlabel("excess risk: loss above the task's optimal loss", color=TEXT_COLOUR)


def _as_tensor(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
