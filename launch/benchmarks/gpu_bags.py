"""Bags of tiles in host memory on a GPU, over the floor of computation and link."""

from statistics import median

from torch import Tensor

from ds_wsi.partition import PartitionPolicy, partition_layers
from launch.benchmarks.device_training import DoesNotFitError, Training, planned, resnet18
from launch.benchmarks.gpu_run import GIB, Pooled, normaliser, random_tiles
from launch.benchmarks.gpu_steps import SizedRun, first_step, fitted


def bags_part(run: SizedRun) -> None:
    """(c): bags in order of size, until the time is up."""
    machine, sizes = run.machine, run.sizes
    machine.cap(sizes.bag_cap * GIB)
    a_tile = _native_seconds(run)
    for count in sizes.bags:
        run.need(30 + 4 * count * a_tile, f"a bag of {count} tiles")
        try:
            _bag(run, count, a_tile)
        except DoesNotFitError as error:
            run.skipped[f"bags: {count} tiles"] = str(error)
        machine.rest(host=True)


def _native_seconds(run: SizedRun) -> float:
    """Seconds of a tile, in a native step on as many as fit."""
    machine, sizes = run.machine, run.sizes
    tiles, prepare = random_tiles(machine, sizes.sample, sizes.tile, host=False), normaliser(machine)
    model = Pooled(resnet18(machine, 0)).to(machine.device)
    training = Training(machine, model, lambda: model(prepare(tiles)))
    training.count(2**62)
    took = [training.step() for _ in range(5)][2:]
    case = f"{sizes.sample} tiles"
    run.row(training, part="bags", case=case, mode="native", cap_gib=sizes.bag_cap, seconds=median(took))
    return median(took) / sizes.sample


def _bag(run: SizedRun, count: int, a_tile: float) -> None:
    """One bag: a first step, which also pins host memory, then up to three in what is left of half a minute."""
    machine, sizes = run.machine, run.sizes
    tiles = random_tiles(machine, count, sizes.tile, host=True)
    training, first = fitted(run, sizes.bag_cap, lambda budget: _bag_once(run, tiles, budget), f"{count} tiles")
    took, copied = [first], _copied(training)
    while len(took) < 4 and sum(took) + took[-1] < min(30, run.left):
        before = _copied(training)
        took.append(training.step())
        copied = tuple(now - then for now, then in zip(_copied(training), before, strict=True))
    # A link carries both directions at once; the tiles themselves cross it once at least.
    compute, transfer = a_tile * count, max(copied[0], copied[1] + tiles.nbytes) / run.rates.link
    seconds = median(took[1:] or took)
    run.notes[f"{count} tiles"] = {
        "compute_s": compute,
        "transfer_s": transfer,
        "sent_bytes": copied[0],
        "fetched_bytes": copied[1],
        "input_bytes": tiles.nbytes,
        "steps_s": took,
    }
    common = {"case": f"{count} tiles", "mode": "planner", "cap_gib": sizes.bag_cap, "seconds": seconds}
    run.row(training, part="bags", **common, ratio=seconds / max(compute, transfer), over="floor")


def _bag_once(run: SizedRun, tiles: Tensor, budget: int) -> tuple[Training, float]:
    machine, host = run.machine, run.options["host_gib"]
    model = Pooled(resnet18(machine, 0)).to(machine.device)
    policy = PartitionPolicy(
        gpu_budget_bytes=max(1, budget - machine.resident(model)),
        host_budget_bytes=int(float(host) * GIB) if host else None,
    )
    plan = planned(machine, model.encoder, tuple(tiles.shape), policy, machine.dtype, run.rates)
    handle, prepare = partition_layers(model.encoder, plan, check=False), normaliser(machine)
    training = Training(machine, model, lambda: model(tiles, prepare=prepare), handle, plan)
    return training, first_step(run, training, budget)


def _copied(training: Training) -> tuple[int, ...]:
    """Bytes to host memory and back so far."""
    forward = training.handle.forward if training.handle else None
    store = forward._store if forward else None
    return (store.sent_bytes, store.fetched_bytes) if store else (0, 0)
