"""The tables of `launch/benchmark.py compression` and `local_updates`, of training and times that are made up."""

import pytest

from launch.benchmarks import beside_local, compression, hook_runs
from launch.benchmarks.hook_runs import ALIKE, HOOKS, ONE_CLASS, RANKS, SKEWED

MEGABYTES = {"none": 100.0, "dmgc": 1.0, "localsgd": 30.0, "diloco": 40.0}


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """Steps, bytes and seconds by hook; the second seed of whole rounds of 30 never meets the target."""

    def run(function, ranks, cases, *rest, **more):
        assert ranks == RANKS
        if function is hook_runs.time_steps:
            return [[0.1] * len(cases)] * ranks
        missed = {"steps": float("nan"), "taken": 400.0, "bytes": 8e8, "accuracy": 0.8}
        trained = []
        for _, hook, sites in cases:
            sent = MEGABYTES.get(hook.split()[0], 10.0) * 1e6 * RANKS  # the loopback counts all ranks' bytes on each
            steps = 20.0 if sites == ONE_CLASS and hook.startswith("diloco") else 10.0
            met = {"steps": steps, "taken": steps, "bytes": sent / RANKS, "accuracy": 0.95}
            trained.append([met, missed if hook == "diloco H30" else dict(met)])
        return [[[dict(row) for row in case] for case in trained] for _ in range(ranks)]

    monkeypatch.setattr(compression, "run_ranks", run)
    monkeypatch.setattr(compression.LimitedLink, "available", staticmethod(lambda: False))


def test_local_updates_stand_beside_the_hooks_of_ddp(tmp_path):
    result = beside_local.measure(quick=False, slides=(), options={"models": "ABMIL", "seeds": "2"})
    of = {(row["hook"], row["sites"]): row for row in result.rows}
    assert {hook for hook, sites in of if sites == ONE_CLASS} == set(SKEWED)
    assert {hook for hook, sites in of if sites == ALIKE} == {hook for hook in HOOKS if hook_runs.under_ddp(hook)} - {
        "powersgd ddp"
    }
    assert [name for name in result.rows[0] if name.startswith("s at")] == [
        "s at 20 Mbps",
        "s at 100 Mbps",
        "s at 1000 Mbps",
    ]
    assert of["diloco H30", ALIKE]["seeds at target"] == "1/2"
    # 100 MB over 4 ranks in 10 steps, a step of 0.1 s and 2.5 MB at 20 Mbps.
    assert of["none ddp", ALIKE]["s at 20 Mbps"] == pytest.approx(10 * (0.1 + 2.5e6 / 2.5e6))
    measured = [bound.measured for bound in result.bounds]
    assert measured == pytest.approx([11 / (10 * (0.1 + 0.025e6 / 2.5e6)), 30.0, 2.0])
    assert [bound.holds for bound in result.bounds] == [True, True, True]
    payload = result.notes["ABMIL: payload of a round of all ranks together, bytes, by formula"]
    assert payload["diloco H8"] == 2 * 3 * 4 * 264_195 == 2 * payload["diloco H8 bf16"]


def test_the_hooks_alone_have_no_local_updates_and_no_other_sites():
    result = compression.measure(quick=True, slides=(), options={})
    assert {row["sites"] for row in result.rows} == {ALIKE}
    assert not {"localsgd", "diloco", "sparseloco"} & {row["hook"].split()[0] for row in result.rows}
    chosen = compression.measure(quick=True, slides=(), options={"hooks": "localsgd H8"})
    assert [(row["hook"], row["sites"]) for row in chosen.rows] == [
        ("none ddp", ALIKE),
        ("localsgd H8", ALIKE),
        ("none ddp", ONE_CLASS),
        ("localsgd H8", ONE_CLASS),
    ]
    with pytest.raises(ValueError, match="--option must be one of seeds, steps"):
        compression.measure(quick=True, slides=(), options={"rate": "1"})
