"""Broken worlds for the processes that test_doctor.py starts; a module of its own, which imports no torch."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def rank_and_sum(one: int, other: int) -> list[Any]:
    return [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("SLURM_JOB_ID"), one + other]


def hang_on_rank_1(pid_file: str) -> None:
    if os.environ["RANK"] == "1":
        Path(pid_file).write_text(str(os.getpid()))
        time.sleep(600)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def answer_and_crash_at_exit() -> str:
    atexit.register(os.abort)
    return "the answer"


def leave() -> None:
    sys.stdout.write("the reason\n")
    sys.stdout.flush()
    os._exit(3)


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("no such op\nand more")
    time.sleep(600)


def sum_without_exchange() -> Any:
    import torch.distributed as dist

    from ds_wsi.doctor import ranks

    dist.all_reduce = lambda values: None
    return ranks.sum_of_ranks()


def rank_1_does_not_come() -> Any:
    from ds_wsi.doctor import ranks

    if os.environ["RANK"] == "1":
        time.sleep(600)
    return ranks.sum_of_ranks()


def at_another_rate(engine: str, on_gpu: bool) -> Any:
    from ds_wsi.doctor import engines

    under = engines._under

    def faster(*arguments: Any) -> Any:
        engines.RATE *= 2
        return under(*arguments)

    engines._under = faster
    return engines.two_steps(engine, on_gpu)
