"""The network namespaces of a benchmark: taken down when it is asked to end, and by the next one when it was killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from ds_wsi.runtime.signals import Stopped, heeding_signals
from launch.benchmarks.link import LimitedLink, remove_left_behind

pytestmark = [
    pytest.mark.usefixtures("default_signals"),
    pytest.mark.skipif(not LimitedLink.available(), reason="network namespaces cannot be made here"),
]


def _hold(ready):
    try:
        with heeding_signals(), LimitedLink(2):
            ready.set()
            time.sleep(60)
    except Stopped:
        os._exit(75)


def of(pid):
    return sorted(path.name for path in Path("/var/run/netns").glob(f"dswsi{pid}*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_namespace_is_left(number):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=_hold, args=(ready,))
    process.start()
    assert ready.wait(30)
    assert len(of(process.pid)) == 3
    remove_left_behind()
    assert len(of(process.pid)) == 3, "those of a process that lives stay"
    os.kill(process.pid, number)
    process.join(30)
    if number == signal.SIGKILL:
        assert len(of(process.pid)) == 3
        remove_left_behind()
    else:
        assert process.exitcode == 75
    assert not of(process.pid)
