"""The comparison itself: what it compares, what it would notice, what it refuses."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from launch.benchmarks import equivalence
from launch.benchmarks.equivalence import Case, _bounds, _cases, _compared, _draw, _reference, _row


def test_all_engines_exchanges_and_optimizers_are_compared():
    steps, cases = _cases(quick=False, options={})
    assert steps == 20
    assert len(cases) == len(set(cases)) > 100
    for name, values in (
        ("world", {1, 2, 4}),
        ("engine", set(equivalence.ENGINES)),
        ("exchange", {"gather", "replicated", "sharded"}),
        ("optimizer", {"sgd", "adam"}),
        ("dtype", {"float32", "float64"}),
    ):
        assert {getattr(case, name) for case in cases} == values
    with pytest.raises(ValueError, match="--option must be one of steps, worlds"):
        _cases(quick=True, options={"world": "1"})


def test_a_wrong_factor_breaks_the_bound_under_sgd_and_hides_under_adam():
    records = {name: _reference("small", name, "float64", 3) for name in ("sgd", "adam")}
    rows = {}
    for name, reference in records.items():
        case = Case(2, 2, "ddp", "sharded", name, "float64")
        assert _row(case, _compared(reference, reference))["gradients, first step"] == 0
        doubled = [
            {**record, "gradients": {key: 2 * value for key, value in record["gradients"].items()}}
            for record in reference
        ]
        rows[name] = _row(case, _compared(doubled, reference))
        assert rows[name]["gradients, first step"] == pytest.approx(1)
        assert rows[name]["parameters, last step"] == 0  # the reason to compare gradients, and SGD
    assert [bound.holds for bound in _bounds("float64", list(rows.values()))] == [False, True]


def test_the_figure_draws_what_was_compared(tmp_path):
    reference = _reference("small", "sgd", "float32", 2)
    other = _reference("small", "sgd", "float64", 2)
    curve = _compared(reference, other)
    assert 0 < max(curve["gradients all"]) < 1e-6
    assert {len(values) for key, values in curve.items() if not key.endswith("all")} == {2}
    figure = Figure()
    _draw(figure, {Case(4, 4, "ddp", "sharded", "sgd", "float32"): curve})
    assert sum(len(axis.lines) for axis in figure.axes) == 3 + 3 + 1 + 3  # two panels of layers, a loss, the legend's
    figure.savefig(tmp_path / "figure.png")
    json.dumps(curve)
    assert torch.get_default_dtype() is torch.float32
