"""How pictures look: two themes (light, dark), tile maps and task axes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.typing import ColorType

from hpc_cpd.report.run_results import Row, short_names
from hpc_cpd.run.publish import write_bytes

T = TypeVar("T")

DPI = 150
ROW_INCHES = 0.24


@dataclass(frozen=True)
class Theme:
    """Colours of a picture, unless given those of the light one. `ramp` runs from failure to success; the others are
    safe for colour-blind eyes.
    """

    name: str = "light"
    background: str = "#ffffff"
    text: str = "#1b2430"
    muted: str = "#667282"
    line: str = "#d9dfe6"
    band: str = "#f5f7f9"
    teacher: str = "#b7791f"
    student: str = "#0b62a8"
    earlier: str = "#9cc6e8"
    loss: str = "#c8551b"
    gain: str = "#1d8a6b"
    ramp: tuple[tuple[float, str], ...] = (
        *((0.0, "#f6ece6"), (0.4, "#d3e3ee"), (0.7, "#94c3e3"), (0.9, "#3f8fc8"), (1.0, "#0a4f8c")),
    )

    @property
    def suffix(self) -> str:
        return "" if self.name == "light" else f"-{self.name}"

    @property
    def success_colours(self) -> LinearSegmentedColormap:
        """From failure to success; steepest near the top, where policies differ."""
        return LinearSegmentedColormap.from_list(f"success-{self.name}", self.ramp)

    @property
    def share_colours(self) -> LinearSegmentedColormap:
        """From nothing to all."""
        return LinearSegmentedColormap.from_list(f"share-{self.name}", [self.band, self.student])


LIGHT = Theme()
DARK = Theme(
    name="dark",
    background="#171c23",
    text="#e6ebf1",
    muted="#93a0b0",
    line="#323b47",
    band="#1d232c",
    teacher="#e2b458",
    student="#5fb2f2",
    earlier="#2f5f86",
    loss="#f08a4f",
    gain="#55c9a3",
    ramp=((0.0, "#3a2a26"), (0.4, "#24384b"), (0.7, "#2a618f"), (0.9, "#479ade"), (1.0, "#a9dbff")),
)
THEMES = (LIGHT, DARK)
Drawing = Callable[[T, Theme], Figure | None]
"""Draws results in the colours of a theme; None: there is nothing to show yet."""


def new_figure(
    theme: Theme, width: float, height: float, rows: int = 1, columns: int = 1, grid: Literal["x", "y"] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of the given inches and its rows x columns axes, painted in `theme`; no global state.

    `grid`: the axis whose ticks get lines, behind everything else.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_facecolor(theme.background)
        ax.tick_params(colors=theme.muted, labelcolor=theme.text, labelsize=8, length=0)
        ax.spines[:].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.label.set(color=theme.muted, fontsize=8.5)
        if grid is not None:
            ax.grid(True, axis=grid, color=theme.line, linewidth=0.8)
            ax.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The picture as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # Curves of long runs would otherwise be simplified to different bytes at different sizes.
    with matplotlib.rc_context({"path.simplify": False}):
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def task_figure(theme: Theme, rows: Sequence[Row], width: float, bands: bool = True) -> tuple[Figure, Axes]:
    """A figure whose y axis has the tasks of `rows`, first on top, and marks which stage each belongs to.

    `bands`: a shade behind every other stage, lines at the ticks of the x axis, and room above for a legend.
    """
    height = ROW_INCHES * len(rows) + 0.8 + 0.3 * bands
    figure, (ax,) = new_figure(theme, width, height, grid="x" if bands else None)
    stages = [row["stage"] for row in rows]
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), short_names([row["task"] for row in rows]))
    right = ax.secondary_yaxis("right")
    right.tick_params(colors=theme.muted, labelcolor=theme.muted, labelsize=8, length=0)
    right.spines["right"].set_visible(False)
    middles = {}
    for stage in sorted(set(stages)):
        members = [row for row, own in enumerate(stages) if own == stage]
        top, bottom = min(members) - 0.5, max(members) + 0.5
        middles[f"stage {stage}"] = (top + bottom) / 2
        if bands and stage % 2:
            ax.axhspan(top, bottom, color=theme.band, zorder=0, linewidth=0)
        if top > 0:
            ax.axhline(top, color=theme.line, linewidth=0.8, zorder=2.5)
    right.set_yticks(list(middles.values()), list(middles))
    return figure, ax


def tiles(
    ax: Axes, values: np.ndarray, colours: Colormap, theme: Theme, left: float = 0.0, numbers: bool = True
) -> None:
    """Draw rates [rows, columns] as tiles from x = `left` - 0.5 on, named above; NaN leaves the place empty."""
    ax.xaxis.set_ticks_position("top")
    ax.xaxis.set_label_position("top")
    rows, columns = values.shape
    edges = np.arange(columns + 1) + left - 0.5, np.arange(rows + 1) - 0.5
    masked = np.ma.masked_invalid(np.clip(values, 0, 1))
    ax.pcolormesh(*edges, masked, cmap=colours, vmin=0, vmax=1, edgecolors=theme.background, linewidth=1.6, zorder=2)
    style: dict[str, Any] = {"fontsize": 7.5 if columns <= 14 else 6.0, "ha": "center", "va": "center_baseline"}
    for (row, column), value in np.ndenumerate(values):
        if numbers and not np.isnan(value):
            ink = _ink(colours(float(np.clip(value, 0, 1))))
            ax.text(left + column, row, f"{100 * value:.0f}", color=ink, **style)


def outline(ax: Axes, left: float, top: float, width: float, height: float, colour: str) -> None:
    """Draw a border around whole tiles."""
    style: dict[str, Any] = {"fill": False, "linewidth": 1.4, "zorder": 4, "clip_on": False}
    ax.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, edgecolor=colour, **style))


def legend(ax: Axes, theme: Theme, columns: int = 3) -> None:
    """A quiet legend above the axes."""
    look: dict[str, Any] = {"frameon": False, "fontsize": 8, "borderaxespad": 0.4, "handletextpad": 0.4}
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": columns, "columnspacing": 1.4}
    ax.legend(labelcolor=theme.text, **look, **place)


def _ink(colour: ColorType) -> str:
    """Black or white, whichever has the higher contrast on `colour` (WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#10151b" if luminance > 0.18 else "#ffffff"


def draw(figures: Mapping[str, Drawing[T]], results: T, folder: Path, themes: Iterable[Theme] = THEMES) -> list[str]:
    """Write the pictures of `results` in each theme, or delete what is left of earlier ones; return those drawn."""
    drawn = []
    for name, figure_of in figures.items():
        for theme in themes:
            figure, path = figure_of(results, theme), folder / f"{name}{theme.suffix}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, png(figure))
                drawn.append(name)
    return list(dict.fromkeys(drawn))
