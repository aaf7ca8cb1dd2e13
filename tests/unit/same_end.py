"""Two runs that ended alike: what the tests of stops and kills compare."""

import json
from pathlib import Path

TIMED = ("tiles_per_second", "peak_memory_bytes")


def require_same_end(folder: Path, whole: Path) -> None:
    """Weights, predictions and history are equal, bit for bit."""
    for name in ("model.safetensors", "predictions.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    histories = [json.loads((one / "history.json").read_text()) for one in (whole, folder)]
    stripped = [[{k: v for k, v in entry.items() if k not in TIMED} for entry in history] for history in histories]
    assert stripped[0] == stripped[1]
