"""Compressed exchanges between processes against one process that does the same with plain loops, bit by bit."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from compression_cases import (
    BEYOND,
    MOMENTUM,
    NAMES,
    NUMELS,
    POLICIES,
    PULLS,
    RATE,
    STEPS,
    TYPES,
    WORLDS,
    D,
    gradient_of,
    on_every_rank,
    start,
)

from ds_wsi.compression import DMGC, Compressor, TopK, fold_states, topology_of
from ds_wsi.compression.exchange import even_bounds
from ds_wsi.compression.wire import section_bytes
from harness import run_ranks

pytestmark = pytest.mark.distributed


def largest(values, keep):
    """Positions, by a stable sort."""
    k = max(1, round(keep * len(values)))
    return sorted(np.argsort(-np.abs(values.numpy()), kind="stable")[:k].tolist())


def masked(c, policy, keep, parts):
    """The entries that are sent, as a receiver decodes it; `parts`: (start, stop, sent whole)."""
    sent = torch.zeros_like(c)
    for begin, end, whole in parts:
        chosen = range(end - begin) if whole else largest(c[begin:end], keep)
        at = torch.tensor([begin + i for i in chosen])
        sent[at] = c[at].to(TYPES[policy.values]).float()
    return sent


def parts_of(policy, begin=0, end=D):
    whole = [(0, 300, False), (300, 307, True), (307, D, False)] if policy.dense_below else [(0, D, False)]
    cut = [(max(b, begin), min(e, end), w) for b, e, w in whole]
    return [(b, e, w) for b, e, w in cut if b < e]


def mean_of(tensors):
    total = torch.zeros(D)
    for tensor in tensors:
        total += tensor
    return total / len(tensors)


def bounds_of(policy, world):
    return even_bounds(D, world) if policy.topology == "sharded" else (0, *[D] * world)


def sent_back(mean, policy, world, step):
    """What owners send of their means, together."""
    if topology_of(policy) == "all_gather" or policy.pull_keep_at(step) == 1:
        return mean
    shards = pairwise(bounds_of(policy, world))
    keep = policy.pull_keep_at(step)
    return sum(masked(mean, policy, keep, parts_of(policy, begin, end)) for begin, end in shards)


def oracle_means(policy, world, owners=False):
    """The means by step, and the residuals; `owners`: as they have them, weights are what goes back."""
    residuals, means = [torch.zeros(D)] * world, []
    for step in range(STEPS):
        inputs = [gradient_of(step, rank) + residuals[rank] for rank in range(world)]
        sent = [masked(c, policy, policy.keep_at(step), parts_of(policy)) for c in inputs]
        residuals = [c - s for c, s in zip(inputs, sent, strict=True)]
        mean = mean_of(sent)
        back = mean if owners else sent_back(mean, policy, world, step)
        if back is not mean:
            for rank, (begin, end) in enumerate(pairwise(bounds_of(policy, world))):
                residuals[rank][begin:end] += world * (mean - back)[begin:end]
        means.append(back)
    return means, residuals


def oracle_replicas(policy, world):
    theta, replica, replicas = start(), start(), []
    bounds = bounds_of(policy, world)
    for step, mean in enumerate(oracle_means(policy, world, owners=True)[0]):
        theta -= RATE * mean
        keep = policy.pull_keep_at(step)
        for begin, end in pairwise(bounds):
            if keep == 1 and policy.values == "fp32":
                replica[begin:end] = theta[begin:end]
            else:
                replica += masked(theta - replica, policy, keep, parts_of(policy, begin, end))
        replicas.append(replica.clone())
    return replicas


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request):
    return run_ranks(on_every_rank, request.param)


def test_the_mean_is_one_processs_and_the_same_on_all_ranks(ranks):
    for name, policy in POLICIES.items():
        means, residuals = oracle_means(policy, len(ranks))
        for rank, outcomes in enumerate(ranks):
            result = outcomes["hooked"][name]
            assert all(torch.equal(one, two) for one, two in zip(result["means"], means, strict=True)), (name, rank)
            kept = torch.cat([result["state"]["residual." + part] for part in NAMES])
            assert torch.equal(kept, residuals[rank]), (name, rank)
            assert result["state"]["step"].tolist() == [STEPS]


def test_clipping_and_momentum_are_one_processs(ranks):
    """DGC's order: clip by the rank's share, velocity, sum, selection; a parameter sent whole keeps its velocity."""
    world = len(ranks)
    u, v = [torch.zeros(D)] * world, [torch.zeros(D)] * world
    for step in range(STEPS):
        sent = []
        for rank in range(world):
            gradient = gradient_of(step, rank)
            limit = torch.tensor(MOMENTUM.clip_norm / world**0.5)
            scaled = gradient * torch.minimum(limit / gradient.norm(), torch.tensor(1.0))
            u[rank] = 0.5 * u[rank] + scaled
            v[rank] = v[rank] + u[rank]
            sent.append(masked(v[rank], MOMENTUM, 0.05, parts_of(MOMENTUM)))
            v[rank] = v[rank] - sent[rank]
            whole = torch.arange(D).ge(300) & torch.arange(D).lt(307)
            u[rank] = u[rank].where((sent[rank] == 0) | whole, 0)
        back = sent_back(mean_of(sent), MOMENTUM, world, step)
        for rank, (begin, end) in enumerate(pairwise(bounds_of(MOMENTUM, world))):
            v[rank][begin:end] += world * (mean_of(sent) - back)[begin:end]
        for outcomes in ranks:
            torch.testing.assert_close(outcomes["momentum"][step], back, rtol=1e-6, atol=1e-7)


def test_keeping_everything_is_dense(ranks):
    dense = [mean_of([gradient_of(step, rank) for rank in range(len(ranks))]) for step in range(STEPS)]
    for outcomes in ranks:
        for route in ("all_gather", "sharded", "server"):
            means = outcomes["hooked"][f"{route} 1.0 fp32 0"]["means"]
            assert all(torch.equal(one, two) for one, two in zip(means, dense, strict=True))
            if len(ranks) <= 2:  # of more, the engine's all-reduce adds in another order
                assert torch.equal(means[0], outcomes["reduced"])
        assert all(torch.equal(one, two) for one, two in zip(outcomes["cast"]["fp32"]["means"], dense, strict=True))


def test_replicas_are_one_processs_and_the_same_on_all_ranks(ranks):
    for name, policy in PULLS.items():
        expected = oracle_replicas(policy, len(ranks))
        for rank, outcomes in enumerate(ranks):
            replicas = outcomes["pulled"][name]["replicas"]
            assert all(
                one.numpy().tobytes() == ranks[0]["pulled"][name]["replicas"][i].numpy().tobytes()
                for i, one in enumerate(replicas)
            ), name
            assert all(torch.equal(one, two) for one, two in zip(replicas, expected, strict=True)), (name, rank)


def test_a_cast_is_summed_as_float32(ranks):
    for name, dtype in TYPES.items():
        for step in range(STEPS):
            parts = [gradient_of(step, rank).to(dtype).float() for rank in range(len(ranks))]
            expected = mean_of(parts).to(dtype).float()
            assert all(torch.equal(outcomes["cast"][name]["means"][step], expected) for outcomes in ranks)


def test_a_cast_to_float16_holds_what_is_beyond_its_range(ranks):
    """Each value to 11 bits of the largest of its part, which is where a plain cast has infinity."""
    for outcomes in ranks:
        large, n_large, broken, n_broken, small, n_small = outcomes["beyond"]["fp16"]
        gradients = [gradient_of(0, rank) for rank in range(len(ranks))]
        for rank, gradient in enumerate(gradients):
            gradient[D // 4 :] *= BEYOND * (1 + rank)
        exact = mean_of(gradients)
        assert float(exact.abs().max()) > 65504, "the case must overflow"
        assert large.isfinite().all()
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        assert float((large - exact).abs().max()) <= 2 * largest * 2**-11
        kept = exact.abs() > largest / 100
        assert float(((large - exact).abs() / exact.abs())[kept].max()) < 0.06
        assert torch.equal(large, ranks[0]["beyond"]["fp16"][0])
        # What is not finite stays so, for a loss scaler to find.
        assert broken[3] == float("inf")
        assert broken[-1].isnan()
        assert broken[4:-1].isfinite().all()
        # Where nothing is too large, the bits are those of a plain cast.
        parts = [gradient_of(2, rank).half().float() for rank in range(len(ranks))]
        assert torch.equal(small, mean_of(parts).half().float())
        assert 0 < n_large < n_broken == n_small
        assert outcomes["beyond"]["bf16"][1::2] == [0, 0, 0]


def cheapest_bytes(values, d, nnz):
    return min(section_bytes(encoding, values, d, nnz) for encoding in ("coo", "bitmap", "gap", "dense"))


def test_bytes_are_those_of_the_calls_and_of_the_formula(ranks):
    for kind in ("hooked", "pulled", "cast"):
        for name in ranks[0][kind]:
            results = [outcomes[kind][name] for outcomes in ranks]
            counts, calls = [result["count"] for result in results], [result["calls"] for result in results]
            # An announcement counts at its sender for the push, at its receivers for the pull: as many bytes.
            total = sum(count[way]["wire"] for count in counts for way in ("push", "pull"))
            assert total == sum(call["sent"] + call["announced"] for call in calls), name
            assert sum(call["sent"] for call in calls) == sum(call["received"] for call in calls)
    for outcomes in ranks:
        for name, policy in POLICIES.items():
            count = outcomes["hooked"][name]["count"]["push"]
            assert count["dense"] == [4 * D] * STEPS
            if name in ("all_gather 0.05 fp32 0", "server 0.05 fp32 0"):
                expected = 40 + 24 + cheapest_bytes("fp32", D, 20)
                assert count["messages"] == [expected] * STEPS
                assert sum(count["by_tensor"].values()) == STEPS * (expected - 64)
            elif policy.dense_below and topology_of(policy) != "sharded":
                sizes = (cheapest_bytes("fp16", 300, 15), 2 * 7, cheapest_bytes("fp16", 94, 5))
                assert count["messages"] == [40 + 3 * 24 + sum(sizes)] * STEPS
                assert count["by_tensor"] == {n: STEPS * s for n, s in zip(NAMES, sizes, strict=True)}
            elif policy.keep == 1:
                shards = len(ranks) if policy.topology == "sharded" else 1
                assert count["messages"] == [shards * 64 + 4 * D] * STEPS
                assert count["by_tensor"] == {n: STEPS * 4 * d for n, d in zip(NAMES, NUMELS, strict=True)}
        way = outcomes["hooked"]["all_gather 0.05 fp32 0"]["count"]
        assert way["push"]["wire"] == (len(ranks) - 1) * (sum(way["push"]["messages"]) + STEPS * 8)
        assert way["pull"] == {"messages": [], "dense": [], "wire": 0, "by_tensor": {}}
        pull = outcomes["pulled"]["server 0.05 fp32 0"]["count"]["pull"]
        assert pull["messages"] == [40 + 24 + cheapest_bytes("fp32", D, 20)] * STEPS


def test_an_overflow_anywhere_is_discarded_everywhere(ranks):
    for name in ranks[0]["overflowed"]:
        policy = POLICIES[name]
        for outcomes in ranks:
            first, second, third = outcomes["overflowed"][name]
            assert second.isnan().all()
            assert torch.equal(first, oracle_means(policy, len(ranks))[0][0])
            assert third.isfinite().all()
            assert torch.equal(third, ranks[0]["overflowed"][name][2])


def test_a_resumed_run_equals_an_uninterrupted_one(ranks):
    for outcomes in ranks:
        for name, means in outcomes["resumed"].items():
            expected = outcomes["hooked"][name]["means"]
            assert all(torch.equal(one, two) for one, two in zip(means, expected, strict=True)), name
        pairs = zip(outcomes["momentum resumed"], outcomes["momentum"], strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_a_changed_world_size_owes_the_same(ranks):
    states = [outcomes["hooked"]["sharded 0.05 fp32 0"]["state"] for outcomes in ranks]
    folded = fold_states(states)
    state = Compressor(TopK())
    state.load_state_dict(folded)
    assert state.step == STEPS
    owed = mean_of([torch.cat([one["residual." + name] for name in NAMES]) for one in states])
    assert torch.allclose(torch.cat([folded["residual." + name] for name in NAMES]), owed)
    if len(states) > 1:
        with pytest.raises(ValueError, match=r"of one step, got \[4, 5\]"):
            fold_states([states[0], states[1] | {"step": torch.tensor([5])}])


def test_groups_exchange_apart(ranks):
    policy = DMGC(keep=0.05)
    for rank, outcomes in enumerate(ranks):
        members = range(rank % 2, len(ranks), 2)
        parts = [gradient_of(0, member) for member in members]
        sparse = mean_of([masked(part, policy, 0.05, parts_of(policy)) for part in parts])
        for route, mean in zip(("all_gather", "sharded", "server"), outcomes["groups"]):
            assert torch.equal(mean, sent_back(sparse, DMGC(keep=0.05, topology=route), len(members), 0))
        assert torch.equal(outcomes["groups"][3], mean_of(parts))


def test_an_engines_own_shards(ranks):
    mean = oracle_means(DMGC(keep=0.05), len(ranks), owners=True)[0][0]
    for rank, outcomes in enumerate(ranks):
        begin, values = outcomes["bounds"]["start"], outcomes["bounds"]["values"]
        assert begin == (0 if rank == 0 else 10)
        assert torch.equal(values, mean[begin : begin + len(values)])
    assert sum(len(outcomes["bounds"]["values"]) for outcomes in ranks) == D


def test_wrong_use_is_refused_on_every_rank(ranks):
    for outcomes in ranks:
        parts = ("policy with owners, got TopK", "policy that selects", "bounds must rise from 0 to 401")
        for said, part in zip(
            outcomes["refused"], (*parts, "must be float32 and of the shard", "finite on every rank")
        ):
            assert part in said


def test_odd_buckets(ranks):
    world, policy = len(ranks), DMGC()
    half = mean_of(
        [masked(gradient_of(0, rank).bfloat16().float(), policy, 0.01, parts_of(policy)) for rank in range(world)]
    )
    for outcomes in ranks:
        for route, (empty, mean, tiny) in zip(("all_gather", "sharded", "server"), outcomes["odd"], strict=True):
            assert empty.shape == (0,)
            assert mean.dtype == torch.bfloat16
            assert torch.equal(mean, sent_back(half, DMGC(topology=route), world, 0).bfloat16())
            assert tiny.tolist() == [sum(range(1, world + 1)) / world, 0]


def test_a_dense_pull_sends_the_weights_themselves(ranks):
    assert all(torch.equal(outcomes["jump"], 1e-4 * gradient_of(0, 0)) for outcomes in ranks)
    assert not torch.equal(start() + (ranks[0]["jump"] - start()), ranks[0]["jump"])


def test_training_converges_with_both_ways_compressed(ranks):
    for outcomes in ranks:
        assert outcomes["loss"] < 1e-3
        assert outcomes["loss"] == ranks[0]["loss"]
