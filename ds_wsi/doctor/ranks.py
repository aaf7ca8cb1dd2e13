"""Whether two processes of this machine can exchange tensors."""

import os
from datetime import timedelta
from pathlib import Path

from ds_wsi.doctor.apart import STORE, finding_apart
from ds_wsi.doctor.finding import FAIL, PASS, Finding

RANKS_S = 60
_REMEDY = (
    "name the network interface to use, as GLOO_SOCKET_IFNAME=lo on one machine, or give this host's name an address "
    "in /etc/hosts"
)


def check_ranks() -> Finding:
    """Whether two gloo processes form a group and sum a tensor."""
    return finding_apart(sum_of_ranks, n_ranks=2, timeout_s=RANKS_S, remedy=_REMEDY)


def join_ranks(backend: str) -> None:
    """Form the group of the ranks that work in this folder. Collective."""
    import torch.distributed as dist

    n_ranks = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(Path(STORE).absolute()), n_ranks)
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=timedelta(seconds=RANKS_S))


def sum_of_ranks() -> Finding:
    """All-reduce a tensor. In processes of its own, two of them."""
    import torch
    import torch.distributed as dist

    join_ranks("gloo")
    try:
        values = torch.full((1000,), float(dist.get_rank() + 1))
        dist.all_reduce(values)
        if not torch.equal(values, torch.full((1000,), 3.0)):
            return Finding(FAIL, f"the sum of 1 and 2 over two processes is {values[0].item():g}", _REMEDY)
        return Finding(PASS, "two gloo processes sum a tensor")
    finally:
        dist.destroy_process_group()
