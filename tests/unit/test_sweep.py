"""The benchmarks that are meant for a GPU, at sizes for a CPU; a GPU's caps and failures are pretended."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from ds_wsi.partition.planning.rates import ASSUMED
from ds_wsi.runtime.memory import DevicePeaks
from launch.benchmarks import device_training, gpu_run, gpu_steps, partition_gpu, peers_gpu, sweep
from launch.benchmarks.table import write_result

SMALL = {"sides": "96,160", "cap_gib": "0.047", "repeats": "2", "warmups": "0", "dtype": "float32"}
GIB = 2**30


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.slow
def test_sweep_says_what_fits_and_how_long_it_takes(tmp_path):
    result = sweep.measure(quick=True, options=SMALL)
    rows = {(row["side"], row["mode"]): row for row in result.rows}
    assert list(rows) == [(side, mode) for side in (96, 160) for mode in sweep.MODES]
    assert rows[96, "native"]["ratio"] == 1
    assert rows[96, "planner"]["plan"] == "native"
    native, planner, paper = (rows[160, mode] for mode in sweep.MODES)
    assert (native["fits"], native["seconds"], native["peak bytes"]) == ("no", None, None)
    assert "the cap is" in native["why"]
    assert planner["fits"] == "yes"
    assert planner["peak bytes"] <= 0.047 * GIB
    assert len(planner["plan"].split()) > 1
    assert planner["ratio"] is None  # native does not fit: there is nothing to compare with
    assert paper["peak bytes"] > planner["peak bytes"]
    assert result.notes["precision"] == "float32, no autocast"
    write_result("sweep", result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}


def test_sweep_in_mixed_precision_on_a_cpu():
    result = sweep.measure(quick=True, options={"sides": "64", "modes": "native,paper", "repeats": "1", "warmups": "0"})
    assert result.notes["precision"] == "autocast to bfloat16"
    assert [row["fits"] for row in result.rows] == ["yes", "yes"]


def test_sweep_follows_the_paper_where_nothing_is_said():
    setting = sweep._setting(False, None)
    assert setting.sides[::24] == [7_680, 13_824]
    assert (len(setting.sides), setting.repeats, setting.warmups) == (25, 10, 5)
    assert sweep.chunk_of("", 13_824) == 512
    assert sweep.chunk_of("auto", 13_824) is None


@pytest.mark.parametrize("option", [{"side": "96"}, {"modes": "ours"}, {"dtype": "float16"}, {"dtype": "int8"}])
def test_wrong_options_are_refused(option):
    with pytest.raises(ValueError, match="must be"):
        sweep.measure(quick=True, options=option)


PEERS = peers_gpu.Case(
    "tiny",
    lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, embed_dim=32, num_heads=2, depth=2, img_size=32, patch_size=4
    ),
    (32, 32),
    share=0.42,
    slower=1.05,
    methods=("native", "torch checkpoint", "Accelerate checkpointing offload", "DeepSpeed cpu_checkpointing"),
)
NEED_A_GPU = ("DeepSpeed cpu_checkpointing",)


@pytest.mark.slow
def test_all_gpu_numbers_at_small_size(tmp_path, monkeypatch):
    small = replace(partition_gpu.QUICK, image=(64, None), largest=(64, None), bags=(8, 32), exact=40)
    monkeypatch.setattr(partition_gpu, "QUICK", small)
    monkeypatch.setattr(peers_gpu, "cases", lambda whole: [PEERS])
    options = {"rows": str(tmp_path / "rows.json")}
    result = partition_gpu.measure(quick=True, options=options)
    assert set(result.notes["skipped"]) == {f"peers: tiny, 32 tiles: {name}" for name in NEED_A_GPU}
    assert max(result.notes["exact"].values()) < 1e-10
    assert [bound.holds for bound in result.bounds] == [True, True]  # all parts, exact: small sizes claim no times
    rows = {(row["part"], row["case"], row["mode"]): row for row in result.rows}
    assert rows["image", "64 px", "planner"]["over"] == "native"
    assert rows["paper", "64 px", "paper"]["over"] == "planner"
    modes = [mode for part, _, mode in rows if part == "peers"]
    assert modes == [*(name for name in PEERS.methods if name not in NEED_A_GPU), "ours", "ours, whole card"]
    assert rows["peers", "tiny, 32 tiles", "ours"]["peak_ratio"] < 0.8
    assert rows["peers", "tiny, 32 tiles", "ours, whole card"]["peak_ratio"] == 1
    losses = result.notes["peers: loss of the first step"]["tiny, 32 tiles"]
    assert list(losses) == modes
    assert list(losses.values()) == pytest.approx([losses["native"]] * len(losses), rel=1e-5)
    assert rows["large", "160 px", "planner"]["peak_gib"] <= small.large[1]
    assert rows["largest", "64 px", "planner"]["plan"] == "recompute:4"
    bag = result.notes["32 tiles"]
    plan = rows["bags", "32 tiles", "planner"]["plan"]
    assert (bag["fetched_bytes"] + bag["sent_bytes"] > 0) == ("offload" in plan or "stream" in plan), plan
    seconds = rows["bags", "32 tiles", "planner"]["seconds"]
    ratio = rows["bags", "32 tiles", "planner"]["ratio"]
    assert ratio == pytest.approx(seconds / max(bag["compute_s"], bag["transfer_s"]))
    for row in result.rows:  # what was planned is what was counted
        if row["planned_gib"] is not None:
            assert row["peak_gib"] == pytest.approx(row["planned_gib"], rel=0.1)
    saved = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert saved["rows"] == result.rows
    assert saved["device"].startswith("cpu")
    write_result("partition_gpu", result, tmp_path)
    assert (tmp_path / "partition_gpu.png").stat().st_size > 0
    again = partition_gpu.measure(quick=True, options={**options, "resume": "yes"})
    assert again.rows == result.rows  # seconds and all: nothing was measured again


def test_parts_that_fail_or_come_too_late_are_named(tmp_path, monkeypatch):
    def exact(run: gpu_steps.SizedRun) -> None:
        run.row(None, part="exact", ratio=0.0)

    def image(run: gpu_steps.SizedRun) -> None:
        raise RuntimeError("a kernel failed\nwith details")

    def large(run: gpu_steps.SizedRun) -> None:
        run.deadline = 0

    parts: dict[str, Callable[[gpu_steps.SizedRun], None]] = {"exact": exact, "image": image, "large": large}
    monkeypatch.setattr(partition_gpu, "_MEASURES", {**partition_gpu._MEASURES, **parts})
    result = partition_gpu.measure(quick=True, options={"rows": str(tmp_path / "rows.json")})
    assert [row["part"] for row in result.rows] == ["exact"]
    assert list(result.notes["skipped"]) == ["image", "bags", "peers", "paper", "largest"]
    assert result.notes["skipped"]["image"] == "RuntimeError: a kernel failed"
    assert "0 s are left" in result.notes["skipped"]["largest"]
    assert (result.bounds[0].measured, result.bounds[0].holds) == (5, False)
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["done"] == ["exact", "large"]
    with pytest.raises(ValueError, match="nothing was measured"):
        partition_gpu.measure(quick=True, options={"minutes": "0", "rows": str(tmp_path / "rows.json")})


def test_bounds_are_of_what_was_measured():
    run = _full_run(
        {"part": "image", "mode": "planner", "ratio": 1.2, "over": "native"},
        {"part": "paper", "mode": "paper", "ratio": 5.0, "over": "planner"},
    )
    assert [bound.holds for bound in partition_gpu._bounds(run)] == [True, False]
    assert partition_gpu._bounds(_full_run()) == []
    run.deadline = 0
    with pytest.raises(gpu_run.TimeIsUpError, match="a step needs about 5 s"):
        run.need(5, "a step")


def _full_run(*rows: dict) -> gpu_steps.SizedRun:
    machine = device_training.Machine(torch.device("cpu"), torch.float32)
    run = gpu_steps.SizedRun(machine, ASSUMED["cpu"], whole=True, rows_file=Path("rows.json"), deadline=0.0)
    run.rows += rows
    return run


def test_peers_claim_bytes_and_seconds_at_full_size():
    labels = [f"{case.name}, {case.shape[0]} tiles" for case in peers_gpu.cases(whole=True)]
    rows = [
        {"part": "peers", "case": label, "mode": mode, "peak_ratio": peak, "ratio": seconds}
        for label, mode, peak, seconds in (
            (labels[0], "native", None, None),
            (labels[0], "ours", 0.41, 1.06),
            (labels[0], "ours, whole card", 1.0, 1.01),
            (labels[1], "native", None, None),
            (labels[1], "ours", 0.26, 1.29),
            (labels[2], "native", None, None),
        )
    ]
    bounds = peers_gpu.bounds(_full_run(*rows))
    assert [(bound.limit, bound.holds) for bound in bounds] == [
        *((0.42, True), (1.05, False)),
        *((1.0, True), (peers_gpu.FITS_BOUND, True)),
        *((0.25, False), (1.3, True)),
        *((1.0, False), (peers_gpu.FITS_BOUND, False)),  # there is no such row
    ]


def test_rows_of_another_device_are_not_taken_over(tmp_path):
    machine = device_training.Machine(torch.device("cpu"), torch.float32)
    notes = {"device": "a", "precision": "float32", "quick": True, "torch": "2"}

    def run(device: str) -> gpu_run.Run:
        made = gpu_run.Run(machine, ASSUMED["cpu"], whole=False, rows_file=tmp_path / "rows.json", deadline=0.0)
        made.notes |= {**notes, "device": device}
        return made

    first = run("a")
    first.resume()  # there is no file yet
    first.row(None, part="exact", ratio=0.0)
    first.row(None, part="bags", case="8 tiles")
    first.skipped = {"exact: one": "why", "bags": "the time was up"}
    first.done.append("exact")
    first.save()
    same, other = run("a"), run("b")
    same.resume()
    other.resume()
    assert ([row["part"] for row in same.rows], same.done, list(same.skipped)) == (["exact"], ["exact"], ["exact: one"])
    assert (other.rows, other.done, other.skipped) == ([], [], {})


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is the CPU, whose allocator is capped: the caps that were set are listed."""
    caps = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(device_training, "restart_peaks", lambda _: None)
    monkeypatch.setattr(device_training, "device_peaks", lambda _: DevicePeaks(100, 123, 200, 0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=4 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(device_training.Machine, "gpu", property(lambda machine: True))
    return caps


def test_the_retries_of_a_step_are_its_own(monkeypatch):
    """They are no peak, which begins anew with each: the allocator counts them for as long as the process lives."""
    stats = {"num_alloc_retries": 3, "active_bytes.all.peak": 7}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: stats)
    resets = {"reset_peak_memory_stats": "active_bytes.all.peak", "reset_accumulated_memory_stats": "num_alloc_retries"}
    for name, number in resets.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, number=number: stats.update({number: 0}))
    machine = device_training.Machine(torch.device("cuda"), torch.float32)
    taken = [
        machine.timed(lambda more=more: stats.update(num_alloc_retries=stats["num_alloc_retries"] + more))[1]
        for more in (2, 0)
    ]
    assert [(peaks.retries, peaks.active) for peaks in taken] == [(2, 0), (0, 0)]


def test_out_of_memory_is_tried_again_with_less(gpu, monkeypatch):
    machine, budgets = device_training.Machine(torch.device("cpu"), torch.float32), []
    layer = torch.nn.Linear(2, 2)

    def build(machine, mode, image, budget, **options):
        budgets.append((mode, budget))

        def fails() -> torch.Tensor:
            if mode == "native" or budget > 0.65 * GIB:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            return layer(image[:, :2, 0, 0])

        return device_training.Training(machine, layer, fails)

    monkeypatch.setattr(sweep, "build", build)
    monkeypatch.setattr(sweep, "resnet18", lambda machine: layer)
    setting = sweep._Setting(machine, [8], list(sweep.MODES), GIB, 1, 1, "8", 1.0, None, dict.fromkeys(sweep.MODES, 0))
    rows = {row["mode"]: row for row in sweep._side(setting, 8)}
    assert rows["native"]["why"] == "OutOfMemoryError: CUDA out of memory."
    assert (rows["planner"]["fits"], rows["planner"]["peak bytes"]) == ("yes", 123)
    state = 10 + 2 * sum(parameter.nbytes for parameter in layer.parameters())
    planned = [budget + state for mode, budget in budgets if mode == "planner"]
    assert planned == [int(share * GIB) for share in (0.9, 0.8, 0.7, 0.6)]
    assert [budget for mode, budget in budgets if mode == "paper"] == [GIB, GIB // 2]
    assert setting.levels["planner"] == 3  # where the next side begins
    machine.cap(GIB)
    machine.cap(None)
    assert gpu == [0.25, 1.0]
