"""The look that all figures share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from excessmtl_ext.training.run.files import check_replaceable, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
GRID_COLOUR = "#DDDDDD"
TEXT_COLOUR = "#333333"

_SOFTWARE = "excessmtl_ext, Matplotlib"


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure of that many inches, which needs no display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Figures need matplotlib, which is not installed: pip install ".[train]" in a clone.',
            name=error.name,
        ) from error

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the user has chosen
    return figure


def style_axes(axes: Axes) -> None:
    """Gives a panel the look that all figures share: light grid, no box."""
    axes.title.set(fontsize=10, color=TEXT_COLOUR)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9.5, color=TEXT_COLOUR)
    axes.grid(color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=TEXT_COLOUR, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOUR)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file, in place of an older figure; makes the folder.

    Raises:
        FileExistsError: ``path`` is something else than a figure that matplotlib has drawn.
    """
    check_figure_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": _SOFTWARE}
    write_atomically(
        path,
        lambda file: figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata=metadata),
    )


def check_figure_path(path: Path) -> None:
    """Raises FileExistsError where `save_figure` would, before anything is computed."""
    check_replaceable(path, b"Matplotlib")


def plain(name: str) -> str:
    """Returns a name as matplotlib draws it letter by letter: between two dollar signs it would see mathematics."""
    return name.replace("$", r"\$")
