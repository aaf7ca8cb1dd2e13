"""The place of this process among those that share a cohort's slides without a process group.

A shard is a place in a queue, not a part of the cohort: it begins with its own slides and goes on with those that
nobody holds (`runtime/locks.py`). So a shard that dies, or that was counted wrongly, leaves no hole.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass

RANKS = ("RANK", "WORLD_SIZE")  # torchrun, accelerate launch, deepspeed
STEP = ("SLURM_PROCID", "SLURM_NTASKS")
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")
OPTION = "--shard"


@dataclass(frozen=True)
class Shard:
    """Process `index`, from 0, of `count` that were started on the same slides."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1


ALONE = Shard(0, 1)


def parse_shard(text: str) -> Shard:
    """The shard that `I/N` names, I from 1 to N.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"must be I/N with I from 1 to N, such as 1/4, got {text!r}. HINT: under torchrun, accelerate launch, srun "
            "and in arrays leave it out"
        )
    return Shard(int(index) - 1, int(count))


def shard_of(given: Shard | None, environ: Mapping[str, str] = os.environ) -> Shard:
    """This process's shard: the option, else what the launcher says, else the only one.

    The first that says more than one process counts:

    1. `--shard`. An array may number anything, such as encoders, so the option stands above it. A launcher gives one
       command to all its processes: under it the option must say what the launcher says.
    2. RANK and WORLD_SIZE; else SLURM_PROCID and SLURM_NTASKS in a step that srun started. torchrun under srun is one
       task per machine with ranks over all of them, so the ranks count.
    3. A Slurm array multiplies 2: each of its tasks has as many processes. A task's place is
       (ID - MIN) / STEP; an array with gaps, such as a second try of tasks 2 and 5, starts somewhere, which is enough.

    Args:
        given: what `--shard` said.
        environ: the variables.

    Raises:
        ValueError: variables that contradict each other, or the option; names them.
    """
    inner = _pair(RANKS, environ)
    step = _pair(STEP, environ) if "SLURM_STEP_ID" in environ else ALONE
    names = RANKS
    if inner.is_alone:
        inner, names = step, STEP
    elif inner.count % step.count:
        raise ValueError(
            f"WORLD_SIZE must be a multiple of SLURM_NTASKS, got {inner.count} and {step.count}: several launchers "
            "count the same ranks. HINT: start one launcher per machine with a common rendezvous, or srun alone."
        )
    if given is not None:
        if not inner.is_alone and given != inner:
            raise ValueError(
                f"{OPTION} must say what the launcher says to each process, {inner} ({names[0]}, {names[1]}), got "
                f"{given}. HINT: leave it out."
            )
        return given
    array = _array(environ)
    return Shard(array.index * inner.count + inner.index, array.count * inner.count)


def local_index(environ: Mapping[str, str] = os.environ) -> int:
    """The place of this process among those of its machine, as its launcher says; 0 without one."""
    in_step = "SLURM_STEP_ID" in environ
    text = environ.get("LOCAL_RANK") or (environ.get("SLURM_LOCALID") if in_step else None) or "0"
    return int(text) if text.isdecimal() else 0


def _pair(names: tuple[str, str], environ: Mapping[str, str]) -> Shard:
    index, count = (environ.get(name, "") for name in names)
    if count in ("", "1") and index in ("", "0"):
        return ALONE
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"{names[0]} must be a number below {names[1]}, got {index or 'none'} and {count or 'none'}. HINT: start "
            f"the command by its launcher, or unset both and give {OPTION} I/N."
        )
    return Shard(int(index), int(count))


def _array(environ: Mapping[str, str]) -> Shard:
    if ARRAY[0] not in environ:
        return ALONE
    texts = [environ.get(name, default) for name, default in zip(ARRAY, ("", "", "", "1"), strict=True)]
    task, first, count, step = (int(text) if text.isdecimal() else -1 for text in texts)
    if not (task >= first >= 0 and count >= 1 and step >= 1):
        said = ", ".join(f"{name}={environ.get(name, 'none')}" for name in ARRAY)
        raise ValueError(f"{ARRAY[0]} must be a task of its array, got {said}. HINT: unset them, or give {OPTION} I/N.")
    return Shard((task - first) // step % count, count)
