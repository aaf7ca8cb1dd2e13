"""A run that is asked to end at any moment keeps what it has done, and goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
from same_end import require_same_end
from tiny_runs import train, write_cohort

from ds_wsi.evaluation import norm_choice, predict
from ds_wsi.runtime.signals import STATUS, Stopped, asked, deferring, heeding_signals
from ds_wsi.training import loop, one_step, outcome, resume

pytestmark = pytest.mark.usefixtures("default_signals")
EPOCHS = 3
OPTIONS = ("--dropout", "0.3", "--save_total_limit", "9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert train(folder, folder / "whole", *OPTIONS, epochs=EPOCHS) == 0
    return folder


def at_call(monkeypatch, module, name, number, action):
    """Do something before the call of this number, from 0, of a function."""
    real, calls = getattr(module, name), [0]

    def counted(*words, **named):
        if calls[0] == number:
            action()
        calls[0] += 1
        return real(*words, **named)

    monkeypatch.setattr(module, name, counted)


# Of 18 steps, 6 an epoch, 4 slides validated after each, and 2 tested. Many more: tests/chaos.
MOMENTS = [
    (one_step, "_micro_loss", 0, signal.SIGUSR1),
    (one_step, "_micro_loss", 5, signal.SIGTERM),  # an epoch's last step
    (predict, "_aggregate", 4, signal.SIGINT),
    (norm_choice, "best_candidate", 2, signal.SIGTERM),
    (resume, "save_checkpoint", 0, signal.SIGUSR1),
    (outcome, "write_results", 0, signal.SIGINT),
]


@pytest.mark.parametrize(("module", "name", "call", "number"), MOMENTS)
def test_a_signal_at_any_moment(module, name, call, number, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at_call(patch, module, name, call, lambda: os.kill(os.getpid(), number))
        assert train(whole, tmp_path / "run", *OPTIONS, epochs=EPOCHS) == STATUS
    words = capfd.readouterr().err
    assert f"stopped by {number.name}: the same command goes on, with --resume_from_checkpoint" in words
    assert "Traceback" not in words
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"
    assert train(whole, tmp_path / "run", *OPTIONS, "--resume_from_checkpoint", epochs=EPOCHS) == 0
    require_same_end(tmp_path / "run", whole / "whole")


def test_stopped_after_each_step(whole, tmp_path, capfd):
    """The clock stops it after a step of each start, also after an epoch's last one."""
    command = (*OPTIONS, "--resume_from_checkpoint", "--max_minutes", "1e-9")
    codes = []
    while (code := train(whole, tmp_path / "run", *command, epochs=EPOCHS)) == STATUS:
        codes.append(code)
        assert len(codes) <= 18
    assert code == 0
    assert len(codes) == 18, "a step each start"
    assert "stopped by --max_minutes 1e-09: the same command goes on" in capfd.readouterr().err
    require_same_end(tmp_path / "run", whole / "whole")


def test_no_checkpoint_is_needed_before_the_first_step(whole, tmp_path, monkeypatch, capfd):
    at_call(monkeypatch, loop, "tell_start", 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(whole, tmp_path / "run", *OPTIONS, epochs=EPOCHS) == STATUS
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_outside_of_deferring_the_exception_comes_at_once():
    began = time.monotonic()
    with pytest.raises(Stopped, match="SIGUSR1"), heeding_signals():
        _ask_and_wait()
    assert time.monotonic() - began < 4


def _ask_and_wait():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(5)


def test_inside_it_is_noted():
    with heeding_signals():
        with deferring():
            assert asked() == ""
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert asked() == "SIGTERM"
        assert asked() == ""


def test_what_ignores_a_signal_goes_on_ignoring_it():
    """Nohup means it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heeding_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


SECOND = """
import os, signal, sys, time, torch
from ds_wsi.runtime.signals import heeding_signals, deferring
with heeding_signals(), deferring():
    print("ready", flush=True)
    if sys.argv[1] == "python":
        while True:
            time.sleep(60)
    import torch.distributed as dist
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    store.get("never")  # a call of a library that holds the main thread
"""


@pytest.mark.parametrize("place", ["python", "library"])
def test_a_second_ctrl_c_leaves_at_once(place):
    """Wherever the main thread is; two presses within a second are one, which launchers pass on as well."""
    process = subprocess.Popen([sys.executable, "-c", SECOND, place], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT


def test_a_forked_child_is_left_alone():
    """It ignores Ctrl-C, and what it gets is no second press for its parent."""
    with heeding_signals(), deferring():
        child = os.fork()
        if child == 0:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.6)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert asked() == ""


COMMAND = """
import argparse, atexit, os, signal, sys, time
from ds_wsi import cli

def hit(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)

ALL = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]
real, number = cli._parsed, ALL[int(sys.argv[2])]
sys.argv[1:], moment = ["--version"], sys.argv[1]

def at_parsing(arguments):
    hit(number)
    return real(arguments)

def in_an_import_that_takes_all(arguments):
    try:
        hit(number)
    except BaseException:
        pass
    return argparse.Namespace(run=lambda options: 0)

def never(arguments):
    return argparse.Namespace(run=lambda options: 3)

cli._parsed = {"parsing": at_parsing, "import": in_an_import_that_takes_all}.get(moment, never)

class LastOfAll:
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=ALL):
        for number in numbers:
            kill(pid, number)

status = cli.main()
if moment == "end":
    hit(*ALL)
    atexit.register(hit, number)
    last = LastOfAll()
if moment == "goes on":  # a notebook's %run: the next command heeds the signals
    cli._parsed = at_parsing
    status = cli.main(["--version"])
if moment == "hangs":
    hit(signal.SIGINT)
    time.sleep(1.2)
    hit(signal.SIGINT)
    time.sleep(20)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        *(("parsing", number, STATUS) for number in range(4)),
        ("import", 0, STATUS),
        ("import", 3, STATUS),
        ("end", 0, 3),
        ("hangs", 0, 130),
        ("goes on", 0, STATUS),
    ],
)
def test_signals_before_and_after_a_commands_work(moment, number, status):
    """A signal has the promised exit status from the first lines to the last, or changes none that is there."""
    command = [sys.executable, "-c", COMMAND, moment, str(number)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert (status != STATUS) or "the same command goes on" in done.stderr


def test_a_call_of_the_command_puts_the_handlers_back():
    """Where the process goes on after it."""
    from ds_wsi.cli import main

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]
    with pytest.raises(SystemExit):
        main(["--version"])
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]
    assert after == before
