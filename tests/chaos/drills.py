"""What is done of each fault, and what must hold then: a function of a case and its yard each."""

from collections.abc import Callable
from functools import partial

from .case import Case, Outcome
from .disks import disk_full, file_limit, small_shm
from .flips import flipped_checkpoint, flipped_store
from .hits import HITS, hit
from .several import again_and_again, double_start, other_ranks, packing
from .yard import Yard

Drill = Callable[[Case, Yard], Outcome]
DRILLS: dict[str, Drill] = {
    **{name: hit for name in HITS},
    "disk full": disk_full,
    "file too large": file_limit,
    "small /dev/shm": small_shm,
    "flipped bit of a checkpoint": flipped_checkpoint,
    "flipped bit of a store": flipped_store,
    "packing killed": partial(packing, "kill"),
    "packing asked to end": partial(packing, "SIGTERM"),
    "packing twice": partial(packing, "hold"),
    "killed at each start": again_and_again,
    "double start": double_start,
    "other ranks": other_ranks,
}
