"""Training curves."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ds_wsi.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette, which colour-blind readers tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
LINE_STYLES = ("-", "--", "-.", ":")
LOSS_KEYS = ("train_loss", "eval_loss")
METRIC_KEYS = ("eval_auc", "eval_accuracy")

History = Sequence[Mapping[str, Any]]


def draw_curves(
    history: History, path: str | os.PathLike[str], best_epoch: int | None = None, metric: str = "eval_auc"
) -> None:
    """Write a PNG of the losses and of the validation metrics over the epochs.

    Args:
        history: one mapping per epoch: "epoch", and "train_loss", "eval_loss", "eval_auc", "eval_accuracy" and others;
            a key that is absent, None or not finite leaves a gap.
        path: where to; written atomically.
        best_epoch: the epoch whose weights were kept; marked in both panels.
        metric: what it was chosen by, with or without "eval_"; drawn with the others.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, metrics = figure.subplots(1, 2)
    loss_keys, metric_keys = ([*LOSS_KEYS, key], METRIC_KEYS) if "loss" in key else (LOSS_KEYS, [*METRIC_KEYS, key])
    _draw_panel(losses, history, loss_keys, "loss")
    _draw_panel(metrics, history, metric_keys, "validation metrics")
    if best_epoch is not None:
        _mark_best(losses, best_epoch, _value_at(history, best_epoch, key) if key in loss_keys else math.nan)
        _mark_best(metrics, best_epoch, _value_at(history, best_epoch, key) if key in metric_keys else math.nan)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, facecolor="white")


def series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and the values of one key; NaN where an epoch has none."""
    epochs = [float(row["epoch"]) for row in history if "epoch" in row]
    values = [row.get(key) for row in history if "epoch" in row]
    return epochs, [float(value) if value is not None and math.isfinite(value) else math.nan for value in values]


def _draw_panel(axes: "Axes", history: History, keys: Iterable[str], title: str) -> None:
    drawn = 0
    for index, key in enumerate(dict.fromkeys(keys)):
        epochs, values = series(history, key)
        if all(map(math.isnan, values)):
            continue
        # A point between two gaps, or a run of one epoch, shows by its marker only.
        lines = axes.plot(epochs, values, label=_label(key), linewidth=1.8, marker="o", markersize=3.5)
        lines[0].set(color=COLORS[index % len(COLORS)], linestyle=LINE_STYLES[index % len(LINE_STYLES)])
        drawn += 1
    _style_panel(axes, title)
    if drawn:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.5")


def _label(key: str) -> str:
    split, _, name = key.partition("_")
    name = "AUC" if name == "auc" else name.replace("_", " ")
    return f"{'validation' if split == 'eval' else 'training'} {name}"


def _style_panel(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=11, pad=16)  # above the mark of the best epoch
    axes.set_xlabel("epoch", fontsize=9)
    axes.tick_params(labelsize=9, color="0.7")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("0.7")


def _value_at(history: History, epoch: int, key: str) -> float:
    return dict(zip(*series(history, key), strict=True)).get(float(epoch), math.nan)


def _mark_best(axes: "Axes", best_epoch: int, value: float) -> None:
    """Mark the epoch by a line, and its value (where it has one in this panel) on the frame's upper edge."""
    axes.axvline(best_epoch, color="0.45", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        f"best: epoch {best_epoch}" + ("" if math.isnan(value) else f" ({value:.3f})"),
        (best_epoch, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right" if best_epoch > sum(axes.get_xlim()) / 2 else "left",  # inwards, clear of the panel's ends
        fontsize=8,
        color="0.35",
        annotation_clip=False,
    )
