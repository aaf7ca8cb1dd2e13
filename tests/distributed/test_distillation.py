"""A step beside a teacher has the gradient of one process over whole bags: in float64, whatever the layout."""

from pathlib import Path

import pytest
from distill_cases import plain_step, run_steps, write_cohort

from harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-10
STACKED = {"slides": 2, "micro_steps": 3}
ONE = {
    "stacked": STACKED,
    "partitioned": {**STACKED, "partition": "recompute", "chunks": {"chunk_size": 2}},
    "cosine": {"slides": 5, "loss": "cosine"},
    "resting": {"slides": 5, "rests": 1},
}
TWO = {
    "ragged": {"micro_steps": 2},
    "dealt": {"stacking": {"bags_per_step": 5, "virtual_workers": 2}},
    "shared": {"micro_steps": 3, "tile_parallel": {"size": 2}},
    "shared and partitioned": {"micro_steps": 2, "tile_parallel": {"size": 2}, "partition": "recompute"},
    "another task": {"slides": 2, "micro_steps": 2, "task": True},
}


def furthest(first, second):
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def check(folder, layout, steps):
    for step in steps:
        gradient, loss, distance = plain_step(folder, layout, step)
        if layout.get("rests"):
            gradient = {key: value * (not key.startswith("encoder")) for key, value in gradient.items()}
        assert furthest(step["gradient"], gradient) < TOLERANCE
        assert step["loss"] == pytest.approx(loss, rel=1e-5)  # summed in float32
        assert step["distilled"] == pytest.approx(distance, rel=1e-5)
    assert steps[0]["distilled"] > 0, "augmented tiles are others than the teacher's"


def on_ranks(folder: str):
    return [run_steps(Path(folder), f"two_{index}", layout) for index, layout in enumerate(TWO.values())]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    write_cohort(folder)
    return folder


@pytest.mark.parametrize("name", ONE)
def test_one_process_is_plain_autograd(cohort, name):
    check(cohort, ONE[name], run_steps(cohort, f"one_{name}", ONE[name]))


def test_two_ranks_are_one_process(cohort):
    results = run_ranks(on_ranks, 2, str(cohort))
    for index, (name, layout) in enumerate(TWO.items()):
        first, second = results[0][index], results[1][index]
        assert all(furthest(a["gradient"], b["gradient"]) == 0 for a, b in zip(first, second, strict=True)), name
        check(cohort, layout, first)
    shared = results[0][list(TWO).index("shared")][0]
    of_parts, _, _ = plain_step(cohort, TWO["shared"], shared, parts=2)
    uneven = furthest(of_parts, shared["gradient"])
    assert uneven > 1e-4, "bags divided by a rank's own number of tiles must be noticed"
