"""All cases: faults, times the engines that they concern, times moments."""

from .case import Case, Moment
from .engines import PARALLEL

# Of a run on one process with a save each step: 18 steps, 18 saves of 3 files, 12 slides validated, then 2 tested.
KILLED_AT = (
    *(Moment("prepare"), Moment("start")),
    *(Moment("step", number) for number in range(18)),
    *(Moment("validation", number) for number in (0, 2, 3, 4, 7, 8, 11, 12)),
    *(Moment("save", number) for number in (0, 5, 6, 11, 17)),
    *(Moment("write", number) for number in (0, 1, 2, 16, 40)),
    *(Moment("seal", number) for number in (1, 8)),
    *(Moment("rename", number) for number in (0, 9, 17)),
    *(Moment("remove", number) for number in (0, 7)),
    *(Moment("delete", number, delay) for number, delay in ((0, 0.0), (2, 0.0005), (5, 0.0))),
    *(Moment("export"), Moment("results"), Moment("record")),
    *(Moment("step", number, delay) for number, delay in ((3, 0.005), (4, 0.02), (9, 0.1))),
)
ASKED_AT = (
    *(Moment("prepare"), Moment("start")),
    *(Moment("step", number) for number in (0, 2, 5, 6, 11, 17)),
    *(Moment("validation", number) for number in (0, 3, 4, 9, 12)),
    *(Moment("save", 0), Moment("save", 2), Moment("seal", 1), Moment("rename", 0)),
    *(Moment("results"), Moment("step", 3, 0.005), Moment("step", 9, 0.05)),
)
_STEP = Moment("step", 4)
_SAMPLED = {
    "kill/plain-1/rename 9",
    "SIGTERM/plain-1/validation 4",
    "disk full/plain-1/50%",
    "flipped bit of a checkpoint/plain-1/file 1 middle",
    "double start/plain-1/step 4",
    "stopped for ever/ddp-2/step 4 of rank 0",
    "slow/zero2-2/step 4 of rank 1",
    "other ranks/plain-1/plain 1, zero3 2, fsdp2 2, plain 1",
}


def _all() -> list[Case]:
    # What concerns every engine first: a campaign that is stopped early has seen all of them.
    cases = [
        Case(fault, engine, 2, _STEP, rank=1)
        for fault in ("stopped for ever", "slow", "kill", "SIGTERM")
        for engine in PARALLEL
    ]
    chains = [f"plain 1, {engine} 2, {engine} 4, plain 1" for engine in PARALLEL if engine != "accelerate_zero2"]
    chains += ["plain 1, zero3 2, fsdp2 2, plain 1", "accelerate 1, accelerate_zero2 2, zero3 4, accelerate 1"]
    cases += [Case("other ranks", at=chain) for chain in chains]
    cases += [Case("kill", at=moment) for moment in KILLED_AT]
    cases += [Case("disk full", at=f"{share}%") for share in (2, 10, 20, 35, 50, 65, 80, 95)]
    cases += [
        Case("small /dev/shm", engine, ranks, f"{size} MB")
        for engine, ranks in (("plain", 1), ("ddp", 2))
        for size in (16, 64)
    ]
    cases += [Case(fault, at=_STEP) for fault in ("worker stopped", "worker killed")]
    cases += [Case("double start", at=moment) for moment in (Moment("prepare"), _STEP, Moment("save", 3))]
    cases += [Case("double start", at=moment) for moment in (Moment("validation", 5), Moment("results"))]
    cases += [Case("double start", "ddp", 2, _STEP)]
    cases += [
        Case("flipped bit of a checkpoint", at=f"file {number} {byte}")
        for number in range(6)
        for byte in ("first", "middle", "last")
    ]
    cases += [Case(name, at=moment) for moment in ASKED_AT for name in ("SIGTERM", "SIGUSR1", "SIGINT")]
    cases += [
        Case("flipped bit of a store", at=f"file {number} {byte}")
        for number in range(6)
        for byte in ("first", "middle", "last")
    ]
    # Two checkpoints may be on the way to the disk: of three saves one is there.
    cases += [Case("killed at each start", at=Moment("step", number)) for number in (3, 4)]
    cases += [Case("killed at each start", "ddp", 2, Moment("step", 3)), Case("deadlock", at=Moment("write", 5))]
    cases += [Case(fault, "ddp", 2, Moment("part", 2), rank=1) for fault in ("kill", "exception", "stopped for ever")]
    cases += [Case("disk full", engine, 2, "50%") for engine in ("ddp", "zero3", "fsdp2")]
    moments = [Moment("grid"), Moment("grid", 3), Moment("pack"), Moment("pack", 4), Moment("packing", 2)]
    cases += [Case(fault, at=moment) for fault in ("packing killed", "packing asked to end") for moment in moments]
    cases += [Case("packing twice", at=moment) for moment in (Moment("grid"), Moment("pack", 2))]
    moments = [Moment("step"), Moment("step", 7), Moment("step", 13), Moment("save", 1), Moment("results")]
    cases += [Case(fault, "beside", at=moment) for fault in ("kill", "SIGTERM") for moment in moments]
    cases += [Case(fault, "beside", at=Moment("step", 7)) for fault in ("validator killed", "validator stopped")]
    cases += [Case("file too large", at=f"{size} bytes") for size in (1000, 4096, 20000)]
    cases += [Case(fault, at=_STEP) for fault in ("exception", "segfault", "deadlock", "slow", "stopped, goes on")]
    cases += [Case("exception", at=moment) for moment in (Moment("prepare"), Moment("write", 7), Moment("rename", 3))]
    cases += [Case("exception", at=moment) for moment in (Moment("validation", 5), Moment("results"))]
    cases += [Case(fault, "accelerate", 1, _STEP) for fault in ("kill", "SIGTERM", "SIGUSR1", "SIGINT")]
    cases += [
        Case(fault, engine, 2, _STEP, rank=1)
        for fault in ("deadlock", "stopped, goes on", "exception", "segfault", "SIGUSR1")
        for engine in PARALLEL
    ]
    moments = [Moment("prepare"), Moment("save", 2), Moment("rename", 2), Moment("validation", 2), Moment("results")]
    cases += [Case("kill", engine, 2, moment, rank=0) for moment in moments for engine in PARALLEL]
    cases += [Case("stopped for ever", engine, 2, _STEP, rank=0) for engine in PARALLEL]
    unique = {case.key: case for case in cases}
    return [Case(**{**vars(case), "sample": key in _SAMPLED}) for key, case in unique.items()]


CASES = _all()
