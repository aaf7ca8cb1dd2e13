"""Pictures of a task's results: Kaplan-Meier curves over their table of numbers at risk, predictions over targets."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ds_wsi.evaluation.curves import COLORS, LINE_STYLES
from ds_wsi.evaluation.metrics import FloatArray
from ds_wsi.evaluation.task_metrics.kaplan_meier import SurvivalCurve
from ds_wsi.evaluation.task_metrics.measured import finite_column
from ds_wsi.runtime.files import atomic_path

DPI = 150
FRAME = "0.7"
FAINT = "0.45"


def draw_kaplan_meier(
    curves: Mapping[str, SurvivalCurve],
    path: str | os.PathLike[str],
    *,
    time_unit: str = "",
    counted: str = "slides",
    note: Sequence[str] = (),
) -> None:
    """Write a PNG of survival curves, their intervals and censoring, with the numbers at risk below.

    Args:
        curves: group -> its curve, at least one.
        path: where to; written atomically.
        time_unit: the times' unit, such as months, for the axis.
        counted: what is at risk: slides or patients.
        note: lines below, such as the log-rank test's; drawn as they are.

    Raises:
        ValueError: no curve.
    """
    if not curves:
        raise ValueError("curves must hold at least one group, got none")
    figure = Figure(figsize=(6.4, 4.1 + 0.42 * len(curves) + 0.15 * len(note)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4.0, 0.32 + 0.24 * len(curves)))
    colours = {name: COLORS[number % len(COLORS)] for number, name in enumerate(curves)}
    for number, (name, curve) in enumerate(curves.items()):
        _draw_curve(upper, curve, name, colours[name], LINE_STYLES[number % len(LINE_STYLES)])
    _style(upper)
    end = max(float(curve.times[-1]) for curve in curves.values()) or 1.0
    upper.set(ylim=(0, 1.03), xlim=(-0.02 * end, 1.03 * end))
    upper.set_ylabel("survival", fontsize=9)
    upper.tick_params(labelbottom=True)
    upper.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 3, 4, 5, 6, 10]))
    confidence = next(iter(curves.values())).confidence
    # Above the axes, as any corner inside may be crossed by a curve.
    legend = upper.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2)
    legend.set_title(f"Kaplan-Meier curves, {100 * confidence:g}% intervals, | censored", prop={"size": 10})
    legend.set_alignment("left")
    ticks = [float(tick) for tick in upper.get_xticks() if 0 <= tick <= end]
    _draw_at_risk(lower, curves, colours, ticks, counted)
    lower.set_xlabel(f"time, {time_unit}" if time_unit else "time", fontsize=9)
    if note:
        figure.supxlabel("\n".join(note), x=0.02, ha="left", fontsize=8.5, color="0.2", parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, facecolor="white")


def _draw_curve(axes: Axes, curve: SurvivalCurve, name: str, colour: str, line_style: str) -> None:
    times = np.concatenate([[0.0], curve.times])
    survival, low, high = (np.concatenate([[1.0], each]) for each in (curve.survival, curve.low, curve.high))
    events = int(curve.events.sum())
    label = f"{name} ({events} of {int(curve.at_risk[0])} had the event)"
    axes.step(times, survival, where="post", color=colour, linestyle=line_style, linewidth=1.8, label=label)
    # Where the curve ends at 0 it has no interval; NaN there would take the one before it away.
    low, high = np.nan_to_num(low), np.nan_to_num(high)
    axes.fill_between(times, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
    censored = curve.censored > 0
    axes.plot(curve.times[censored], curve.survival[censored], "|", color=colour, markersize=6, markeredgewidth=1)


def _draw_at_risk(
    axes: Axes, curves: Mapping[str, SurvivalCurve], colours: Mapping[str, str], ticks: Sequence[float], counted: str
) -> None:
    axes.set(ylim=(len(curves) - 0.4, -0.6), yticks=range(len(curves)))
    axes.set_yticklabels(curves.keys(), fontsize=8.5)
    for label, colour in zip(axes.get_yticklabels(), colours.values(), strict=True):
        label.set_color(colour)
    axes.set_title(f"{counted} at risk", loc="left", fontsize=8.5, color=FAINT, pad=3)
    for row, curve in enumerate(curves.values()):
        for tick, number in zip(ticks, curve.at_risk_at(ticks), strict=True):
            axes.text(tick, row, f"{number:g}", ha="center", va="center", fontsize=8.5)
    axes.tick_params(length=0, pad=12, labelbottom=False)  # clear of the numbers at 0
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_scatter(
    targets: npt.ArrayLike,
    predictions: npt.ArrayLike,
    path: str | os.PathLike[str],
    *,
    name: str,
    unit: str = "",
    note: Sequence[str] = (),
) -> None:
    """Write a PNG of predictions over targets, both axes of one range, with the line of no error.

    Args:
        targets, predictions: float [N], in the target's unit.
        path: where to; written atomically.
        name, unit: the target's, for the axes; drawn as they are.
        note: lines for the upper left corner, such as the metrics.

    Raises:
        ValueError: shapes that do not fit, no slide, numbers that are not finite.
    """
    x = finite_column("targets", targets)
    y = finite_column("predictions", predictions, len(x))
    figure = Figure(figsize=(4.8, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    limits = _limits(np.concatenate([x, y]))
    axes.plot(limits, limits, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    # Many slides make one cloud: each is then fainter.
    opacity = float(np.clip(12 / np.sqrt(len(x)), 0.15, 0.7))
    axes.scatter(x, y, s=22, color=COLORS[0], alpha=opacity, linewidths=0, zorder=2)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    _style(axes)
    axes.grid(axis="x", color="0.92")
    suffix = f", {unit}" if unit else ""
    axes.set_xlabel(f"{name}{suffix}", fontsize=9, parse_math=False)
    axes.set_ylabel(f"predicted {name}{suffix}", fontsize=9, parse_math=False)
    if note:
        axes.text(
            *(0.03, 0.97, "\n".join(note)),
            transform=axes.transAxes,
            va="top",
            fontsize=8.5,
            color="0.2",
            parse_math=False,
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, facecolor="white")


def _limits(values: FloatArray) -> tuple[float, float]:
    """The range of the values and a margin; around one value, one on either side."""
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _style(axes: Axes) -> None:
    axes.tick_params(labelsize=9, color=FRAME)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FRAME)
