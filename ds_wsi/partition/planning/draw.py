"""A plan as a picture: memory over the step."""

from pathlib import Path

from matplotlib.figure import Figure

from ds_wsi.partition.planning.plan import PartitionPlan
from ds_wsi.runtime.files import atomic_path

_COLOURS = {"forward": "#3b6ea5", "backward": "#c8553d"}


def draw_plan(plan: PartitionPlan, path: str | Path) -> None:
    """Write a PNG: the device's peak in each segment's forward and backward, in order, against native and budget."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = plan.timeline or (("forward and backward", plan.peak_bytes),)
    modes = {part.last or "output": part.mode for part in plan.segments}
    names = [name.split(" ", 1) for name, _ in steps]
    axes.bar(
        range(len(steps)),
        [size / 2**30 for _, size in steps],
        color=[_COLOURS.get(first, _COLOURS["forward"]) for first, *_ in names],
    )
    lines = [(plan.native_peak_bytes, "native", "--")]
    # An unlimited budget would squeeze the bars to nothing.
    if 0 < plan.gpu_budget_bytes < 100 * max(plan.peak_bytes, 1):
        lines.append((plan.gpu_budget_bytes, "budget", ":"))
    for size, name, style in lines:
        axes.axhline(size / 2**30, color="black", linestyle=style, linewidth=1)
        axes.annotate(f" {name}", (0, size / 2**30), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    largest = max(size for _, size in steps)
    if plan.native_peak_bytes > 4 * largest:
        axes.set_yscale("log")
    axes.set_xticks(range(len(steps)))
    axes.set_xticklabels(
        [f"{rest[0]}\n{modes.get(rest[0], '')}" if rest else first for first, *rest in names],
        rotation=60,
        ha="right",
        fontsize=7,
    )
    for first in ("forward", "backward"):
        axes.bar(0, 0, color=_COLOURS[first], label=first)
    axes.legend(loc="upper right", fontsize=8)
    axes.set_ylabel("device memory at most, GiB")
    axes.set_title("x".join(map(str, plan.input_shape)) + f" on the {plan.axis} axis", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
