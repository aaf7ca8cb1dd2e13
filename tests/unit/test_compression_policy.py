"""Policies say what is wrong with them; schedules, counts and the cut of a bucket, by hand."""

import dataclasses

import pytest
import torch

from ds_wsi.compression import DMGC, Bucket, ByteCount, Cast, Compressor, KeepSchedule, TopK, WireError, target_ratio
from ds_wsi.compression.exchange import Ranks, even_bounds
from ds_wsi.compression.meter import share
from ds_wsi.compression.route import Route
from ds_wsi.compression.selection import Selection, Span, kept, pieces_of, select, spans_of
from ds_wsi.compression.wire import ABSOLUTE


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TopK(keep=0), r"keep must be in \(0, 1\], got 0\. HINT"),
        (lambda: TopK(keep=2), r"got 2\. HINT"),
        (lambda: TopK(keep=float("nan")), r"got nan"),
        (lambda: TopK(values="int8"), r"values must be one of fp32, fp16, bf16, got 'int8'"),
        (lambda: TopK(momentum=1.0), r"momentum must be in \[0, 1\), got 1\.0"),
        (lambda: TopK(clip_norm=0.0), r"clip_norm must be positive, got 0\.0"),
        (lambda: TopK(dense_below=-1), r"dense_below must be at least 0, got -1"),
        (lambda: DMGC(topology="ring"), r"topology must be one of all_gather, sharded, server, got 'ring'"),
        (lambda: DMGC(pull_keep=1.5), r"pull_keep must be in \(0, 1\], got 1\.5"),
        (lambda: DMGC(keep=-1), r"keep must be in"),
        (lambda: Cast(torch.int8), r"dtype must be float16, bfloat16 or float32, got torch\.int8"),
        (lambda: KeepSchedule(dense_steps=-1), r"dense_steps must be at least 0, got -1"),
        (lambda: KeepSchedule(stages=(0.1, 0.2)), r"do not rise, got \(0\.1, 0\.2\)"),
        (lambda: KeepSchedule(stages=(0.1, 0.0)), r"in \(0, 1\] that do not rise"),
        (lambda: KeepSchedule().keep_at(-1, 0.1), r"a step must be at least 0"),
        (lambda: Compressor(TopK()).load_state_dict({}), r"must hold its step"),
        (lambda: ByteCount().message_ratio("push"), r"needs a message, got none \(push\)"),
        (lambda: ByteCount().message_ratio("push", 0), r"at least 1 message, got 0"),
        (lambda: ByteCount().message_ratio("up"), r"one of push, pull, got up"),
        (lambda: target_ratio(ByteCount(), ByteCount()), r"both runs must meet the target"),
    ],
)
def test_wrong_settings_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_policies_are_frozen():
    for policy in (TopK(), DMGC(), Cast(), KeepSchedule()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(policy, dataclasses.fields(policy)[0].name, 0.5)


def test_the_schedule_is_dgcs():
    """Dense, then 25, 6.25, 1.56, 0.4, 0.1 %."""
    schedule = KeepSchedule(dense_steps=3, stage_steps=2)
    ratios = [schedule.keep_at(step, 0.001) for step in range(14)]
    assert ratios == [1.0] * 3 + [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [0.004] * 2 + [0.001] * 3
    # A stage below the policy's own ratio is raised to it.
    assert [schedule.keep_at(step, 0.05) for step in (3, 5, 7, 100)] == [0.25, 0.0625, 0.05, 0.05]
    assert [KeepSchedule().keep_at(step, 0.01) for step in (0, 5)] == [0.01, 0.01]
    policy = DMGC(keep=0.001, pull_keep=0.1, schedule=schedule)
    assert [policy.keep_at(0), policy.keep_at(20), policy.pull_keep_at(0), policy.pull_keep_at(20)] == [
        1,
        0.001,
        1,
        0.1,
    ]


def test_counts_by_hand():
    count = ByteCount()
    for size in (400, 40, 20):
        count.record(
            "push",
            message_bytes=size,
            wire_bytes=3 * size,
            numels={"a": 60, "b": 40},
            by_tensor={"a": size - 9, "b": 9},
        )
    count.record("pull", message_bytes=50, wire_bytes=10, numels={"a": 60, "b": 40}, by_tensor={"a": 50})
    assert count.message_ratio("push") == (460 / 3) / 400
    assert count.message_ratio("push", 2) == 30 / 400
    assert count.message_ratio("push", 99) == count.message_ratio("push")
    assert count.message_ratio("pull", 1) == 50 / 400
    assert count.wire_bytes == 3 * 460 + 10
    assert count.push.by_tensor == {"a": 433, "b": 27}
    assert count.push.dense_by_tensor == {"a": 720, "b": 480}
    assert len(count.push.messages) == 3
    assert count.push.message_bytes == 460


def test_bytes_to_target_are_those_when_it_was_first_met():
    sparse, dense = ByteCount(), ByteCount()
    for count, size in ((sparse, 100), (dense, 1000)):
        count.record("push", message_bytes=size, wire_bytes=size, numels={}, by_tensor={})
        count.reach_target()
        count.record("push", message_bytes=size, wire_bytes=size, numels={}, by_tensor={})
        count.reach_target()
    assert sparse.bytes_to_target == 100
    assert target_ratio(sparse, dense) == 0.1


def test_shares_sum_to_the_whole():
    assert share(10, [1, 1, 1]) == [3, 3, 4]
    assert share(7, [0, 3, 0]) == [0, 7, 0]
    assert share(5, [0, 0]) == [0, 0]
    assert share(5, []) == []


def test_shards_are_even():
    assert even_bounds(10, 4) == (0, 3, 6, 8, 10)
    assert even_bounds(2, 4) == (0, 1, 2, 2, 2)
    assert even_bounds(0, 2) == (0, 0, 0)
    assert even_bounds(5, 1) == (0, 5)


def test_spans_and_their_pieces():
    assert spans_of((300, 7, 94), 0) == [Span(0, 0, 401, False)]
    assert spans_of((300, 7, 0, 3, 94), 10) == [
        Span(0, 0, 300, False),
        Span(1, 300, 310, True),
        Span(2, 310, 404, False),
    ]
    assert spans_of((), 10) == []
    pieces = pieces_of(spans_of((300, 7, 94), 10), 290, 305)
    assert pieces == [Span(0, 0, 10, False), Span(1, 10, 15, True)]
    assert pieces_of(spans_of((300,), 0), 300, 300) == []


def test_how_many_are_kept():
    assert [kept(1000, keep) for keep in (0.01, 0.0004, 0.07, 1.0)] == [10, 1, 70, 1000]
    assert kept(0, 0.5) == 0


def test_a_selection_is_by_span():
    flat = torch.tensor([1.0, -9, 2, 0.1, 0.2, 5, 4, 3])
    chosen = select(flat, spans_of((3, 2, 3), 3), 0.34)
    assert chosen.indices.tolist() == [1, 3, 4, 5]
    assert chosen.values.tolist() == flat[[1, 3, 4, 5]].tolist()
    indices, values = chosen.between(3, 5)
    assert (indices.tolist(), values.tolist()) == ([0, 1], flat[3:5].tolist())
    assert select(flat, spans_of((8,), 9), 0.1).indices is None


def test_a_message_of_another_shard_step_or_kind_is_refused():
    ranks = Ranks(None, 0, 2, torch.device("cpu"))
    route = Route(Bucket(torch.ones(4), ("a",), (4,)), ranks, spans_of((4,), 0), [(0, 2), (2, 4)], "fp32", 3)
    sections = route.sections(Selection(None, torch.ones(4)), 1)
    into = torch.zeros(2)
    for message, said in (
        (route.message(sections, 0), r"of shard 1, flags 0, got 0, 0"),
        (route.message(sections, 1, ABSOLUTE), r"of shard 1, flags 0, got 1, 1"),
        (dataclasses.replace(route, step=4).message(sections, 1), r"of step 3, got 4"),
    ):
        with pytest.raises(WireError, match=said):
            route.read(message, 1, into)
    assert not into.any()
    route.read(route.message(sections, 1), 1, into)
    assert into.tolist() == [1, 1]
