"""`launch/benchmark.py` on the simulated device."""

from pathlib import Path

from .lane import measure


def test_the_benchmark_runs_to_its_end(tmp_path: Path) -> None:
    results = measure("benchmark", str(tmp_path))
    assert results["notes"]["skipped"] == {}
    rows = {(row["part"], row["mode"]): row for row in results["rows"]}
    assert rows.keys() == {(part, mode) for part in ("image", "bags") for mode in ("native", "planner")}
    for row in (rows["image", "planner"], rows["bags", "planner"]):
        assert set(row["plan"].split()) == {"offload:8"}
    assert results["notes"]["24 tiles"]["sent_bytes"] > 2**25
