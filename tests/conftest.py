"""What all tests share: two threads at most, small demo slides, and no process or variable left behind."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from ds_wsi.runtime.log import logger
from ds_wsi.slides.demo import DemoPolicy, make_demo

torch.set_num_threads(1)

LOGGING = list(logger.handlers), logger.propagate, logger.level
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """A test must not leave rank variables (the next would believe in a launcher) or processes."""
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_FSDP",
    )
    before = {name: os.environ.get(name) for name in launcher}
    yield
    after = {name: os.environ.get(name) for name in launcher}
    assert after == before, "the test left launcher variables in the environment"
    assert not multiprocessing.active_children(), "the test left processes running"


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command called in this process takes over the package's logger: the next test's caplog would miss or double.

    Before a test too: a fixture of a module may have called one.
    """
    logger.handlers[:], logger.propagate, logger.level = LOGGING
    yield
    logger.handlers[:], logger.propagate, logger.level = LOGGING


@pytest.fixture(scope="session")
def demo_manifest(tmp_path_factory) -> Path:
    """A small demo cohort: 4 slides to train on, 2 to validate, 2 to test; a dozen tiles of 64 px each."""
    policy = DemoPolicy(train=4, validation=2, test=2, min_side_px=352, max_side_px=352)
    return make_demo(tmp_path_factory.mktemp("demo"), policy)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real slides and broken files, where the checkout has them beside it."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real slides, shared/data beside the checkout, is missing")
    return SHARED


@pytest.fixture
def default_signals():
    """The signals' own handlers: who starts the tests in the background, as shells do, lets them ignore Ctrl-C."""
    usual = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in usual}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
