"""What the pictures of survival and regression hold, read from the axes before they are written."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from survival_cohort import RISKS, TEST, TRAINING_RISKS

from ds_wsi.evaluation.task_metrics.follow_up import follow_up
from ds_wsi.evaluation.task_metrics.kaplan_meier import kaplan_meier
from ds_wsi.evaluation.task_metrics.plots import draw_kaplan_meier, draw_scatter
from ds_wsi.evaluation.task_metrics.risk_groups import compare_risk_groups, fit_risk_cutoffs

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, in turn."""
    written = []
    save = Figure.savefig

    def record(figure, *args, **options):
        written.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return written


def test_the_curves_and_the_slides_at_risk(figures, tmp_path):
    groups = compare_risk_groups(TEST, RISKS, fit_risk_cutoffs(TRAINING_RISKS), split="test")
    path = tmp_path / "kaplan_meier.png"
    draw_kaplan_meier(
        groups.curves, path, time_unit="months", counted="patients", note=["log-rank p 0.031", "a $ sign"]
    )
    with Image.open(path) as image:
        assert image.format == "PNG"
    upper, lower = figures[0].axes
    low = groups.curves["low risk"]
    steps = upper.lines[0]
    assert steps.get_drawstyle() == "steps-post"
    np.testing.assert_array_equal(steps.get_xydata(), [[0, 1], *zip(low.times, low.survival)])
    marks = upper.lines[1].get_xydata()
    np.testing.assert_array_equal(marks[:, 0], low.times[low.censored > 0])
    shown = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in lower.texts}
    ticks = sorted({x for x, _ in shown})
    assert ticks[0] == 0
    for row, curve in enumerate(groups.curves.values()):
        members = TEST.times[np.isin(RISKS, RISKS[(RISKS > 0.1) == bool(row)])]
        assert [shown[tick, row] for tick in ticks] == [str(np.sum(members >= tick)) for tick in ticks]
        assert curve.at_risk[0] == len(members)
    assert [label.get_text() for label in lower.get_yticklabels()] == ["low risk", "high risk"]
    assert lower.get_xlabel() == "time, months"
    assert lower.get_title(loc="left") == "patients at risk"
    words = [text.get_text() for text in figures[0].findobj(lambda artist: hasattr(artist, "get_text"))]
    assert any("log-rank p 0.031\na $ sign" in word for word in words)
    assert any("low risk (4 of 11 had the event)" in word for word in words)


def test_the_interval_reaches_the_end_of_a_curve_that_falls_to_zero(figures, tmp_path):
    draw_kaplan_meier({"all": kaplan_meier(follow_up([10, 20, 90], [1, 1, 1]))}, tmp_path / "a.png")
    (band,) = figures[0].axes[0].collections
    corners = band.get_paths()[0].vertices
    assert np.isfinite(corners).all()
    assert corners[:, 0].max() == 90


def test_odd_curves_are_drawn(figures, tmp_path):
    curves = {f"group {number}": kaplan_meier(follow_up([0], [1])) for number in range(7)}  # more than colours
    draw_kaplan_meier(curves, tmp_path / "a.png")
    draw_kaplan_meier({"all": kaplan_meier(follow_up([5, 9], [0, 0]))}, tmp_path / "b.png")
    assert len(figures) == 2
    with pytest.raises(ValueError, match="curves must hold at least one group, got none"):
        draw_kaplan_meier({}, tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_scatter_has_one_range_on_both_axes(figures, tmp_path):
    targets, predictions = np.array([1.0, 5.0, 2.0]), np.array([2.0, 3.0, -7.0])
    draw_scatter(targets, predictions, tmp_path / "scatter.png", name="eGFR_$x", unit="ml/min", note=["pearson 0.10"])
    axes = figures[0].axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([targets, predictions], axis=1))
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim() == pytest.approx((-7.6, 5.6))
    line = axes.lines[0].get_xydata()
    np.testing.assert_array_equal(line[:, 0], line[:, 1])
    assert axes.get_ylabel() == "predicted eGFR_$x, ml/min"
    draw_scatter([3.0, 3.0], [3.0, 3.0], tmp_path / "one.png", name="til")
    assert figures[1].axes[0].get_xlim() == (2, 4)
    with pytest.raises(ValueError, match="predictions must be finite"):
        draw_scatter([1.0], [np.nan], tmp_path / "none.png", name="til")
    assert not (tmp_path / "none.png").exists()
