"""A process that was forked trains as another does."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ds_wsi import PartitionPolicy, partition_layers
from ds_wsi.engines.accelerator.scope import engine_scope
from ds_wsi.runtime.processes import is_forked


def in_a_fork(work):
    """The exit code of a forked process that does it; 1 where it raises."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_is_told_from_a_new_program():
    assert in_a_fork(lambda: int(not is_forked())) == 0
    program = "from ds_wsi.runtime.processes import is_forked; raise SystemExit(is_forked())"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def partitioned_step():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    partition_layers(encoder, PartitionPolicy(mode="lean", chunk_size=2))
    encoder(torch.ones(4, 3, 8, 8)).sum().backward()


def engine_step():
    with engine_scope():
        nn.Linear(2, 1)(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize("step", [partitioned_step, engine_step])
@pytest.mark.parametrize("forked", [True, False])
def test_the_pool_is_made_anew_in_a_fork_alone_and_before_the_first_backward(step, forked, monkeypatch):
    events = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch, "set_num_threads", lambda n: events.append(n))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *words: events.append("backward") or backward(*words))
    monkeypatch.setattr("ds_wsi.runtime.forked.is_forked", lambda: forked)
    step()
    threads = torch.get_num_threads()
    assert events[:1] == ([threads] if forked else ["backward"])
    assert "backward" in events


FORKS = """
import torch
from test_forked import in_a_fork
from torch import nn

from ds_wsi.runtime.forked import make_pool_anew
from ds_wsi.runtime.seams import FakeTensorMode


def step():
    make_pool_anew()
    nn.Conv2d(3, 8, 3)(torch.ones(2, 3, 32, 32)).sum().backward()


torch.set_num_threads(torch.get_num_threads())  # the pool that the forks inherit
with FakeTensorMode():
    torch.ones(3)
raise SystemExit(sum(in_a_fork(lambda: in_a_fork(step)) != 0 for _ in range(150)))
"""


@pytest.mark.slow
def test_backwards_in_forks_of_forks_are_not_aborted():
    """One in sixty was, where nothing made the pool anew; a process in which autograd had no threads yet forks."""
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", FORKS], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == 0
