"""A sample of the campaign in every test run; and its drills see what they are there to see."""

import os
import signal

import pytest

from ds_wsi.training import checkpoint, loop, output_folder, resume

from . import launch
from .campaign import attempt, warm_up
from .case import FELL, HELD, HUNG, LEFT, LOST, NOT_RUN, SILENT, STRANGER, TORN, Case, Moment, Outcome
from .cases import ASKED_AT, CASES, KILLED_AT
from .engines import PARALLEL
from .table import Line, markdown, read_results, write_line, write_table
from .yard import DROPOUT, Yard

SAMPLE = [case for case in CASES if case.sample]
TIMEOUT_S = 120.0
STEP = Moment("step", 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    warm_up(folder)
    yard = Yard(folder, folder / "first", TIMEOUT_S)
    yard.whole(yard.words(yard.run, "plain", *DROPOUT), yard.run, "plain", 1, "dropout")
    return folder


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.key)
def test_a_case_holds(case, root):
    outcome = attempt(case, root, TIMEOUT_S)
    if outcome.status == NOT_RUN:
        pytest.skip(outcome.detail)
    assert outcome.status == HELD, outcome


def fallen(case, root, way, timeout_s=TIMEOUT_S):
    """The outcome of a case that must fall by a way."""
    outcome = attempt(case, root, timeout_s)
    assert outcome.status == FELL
    assert way in outcome.ways, outcome
    return outcome


def test_what_is_lost_is_seen(root, monkeypatch):
    """A run that goes on with the weights it began with."""
    monkeypatch.setattr(resume, "put_state", lambda *words, **named: None)
    fallen(Case("kill", at=STEP), root, LOST)


def test_what_other_ranks_lose_is_seen(root, monkeypatch):
    monkeypatch.setattr(resume, "put_state", lambda *words, **named: None)
    fallen(Case("other ranks", at="plain 1, plain 1"), root, LOST)


def test_a_flipped_bit_that_nobody_looks_for_is_seen(root, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda directory: None)
    fallen(Case("flipped bit of a checkpoint", at="file 1 last"), root, SILENT)


def test_a_hang_is_seen(root):
    fallen(Case("slow", at=STEP), root, HUNG, timeout_s=4.0)


def test_silence_is_seen(root, monkeypatch):
    monkeypatch.setattr("ds_wsi.cli.STATUS", 0)
    assert "ended with 0, not 75" in fallen(Case("SIGTERM", at=STEP), root, SILENT).detail


def test_a_stranger_is_seen(root, monkeypatch):
    """A run that sweeps its folder as a glob would."""
    real = output_folder.begin

    def sweeping(path):
        for one in path.glob(".*.tmp"):
            if one.is_file():
                one.unlink()
        real(path)

    monkeypatch.setattr(output_folder, "begin", sweeping)
    fallen(Case("kill", at=STEP), root, STRANGER)


def test_a_torn_checkpoint_and_what_is_left_are_seen(root, monkeypatch):
    """A checkpoint that has its name before it has its files; and a process that outlives the run."""
    real = loop.tell_start

    def leaving(run, *words):
        if os.fork() == 0:
            signal.pause()
        (run.output_dir / "checkpoint-99").mkdir(exist_ok=True)
        return real(run, *words)

    monkeypatch.setattr(loop, "tell_start", leaving)
    monkeypatch.setattr(launch, "GONE_S", 0.5)
    outcome = fallen(Case("kill", at=STEP), root, TORN)
    assert LEFT in outcome.ways


def test_the_campaign_has_what_it_promises():
    keys = [case.key for case in CASES]
    assert len(keys) == len(set(keys))
    assert len(KILLED_AT) >= 50
    assert len(ASKED_AT) == 20
    for fault in ("stopped for ever", "slow", "kill", "SIGTERM"):
        assert {case.engine for case in CASES if case.fault == fault} >= set(PARALLEL)
    assert len([case for case in CASES if case.fault == "disk full" and case.ranks == 1]) == 8


def test_results_are_read_again(tmp_path):
    path = tmp_path / "results.jsonl"
    fell = Outcome(FELL, [LOST], "a|b\nc", [0, None], 3.0)
    for case, outcome in ((CASES[0], fell), (CASES[1], Outcome()), (CASES[0], Outcome())):
        write_line(path, Line(case.fault, case.engine, case.ranks, str(case.at), case.rank, outcome, "abc"))
    results = read_results(path)
    assert [results[case.key].outcome.status for case in CASES[:2]] == [HELD, HELD], "the last line of a case counts"
    words = markdown([*results.values(), Line("kill", "plain", 1, "step 4", None, fell, "abc")])
    assert "| all | 3 | 2 | 0 | 1 | 0 |" in words
    assert "a\\|b c" in words
    page = tmp_path / "page.md"
    page.write_text("# Stops\n")
    for _ in range(2):
        write_table(path, page)
    assert page.read_text().startswith("# Stops\n\n## What was tried\n\n<!-- chaos: begin")
    assert page.read_text().count("| all | 2 | 2 |") == 1
    assert f"Of {len(CASES)} cases {len(CASES) - 3} were not tried yet" in words
