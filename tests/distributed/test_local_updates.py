"""The benchmark's references for local updates: what each equals, and the bytes that each sends, by formula."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector

from ds_wsi.engines.accelerator.stepper import Stepper
from harness import run_ranks
from launch.benchmarks import local_updates
from launch.benchmarks.local_updates import CHUNK, LocalPolicy, Meeting, Outer, payload_bytes

pytestmark = pytest.mark.distributed
RANKS, STEPS, RATE, OUTER, MOMENTUM = 2, 6, 0.1, 0.5, 0.75


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def batch(step, rank):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def train(net, optimizer, after, rank):
    for step in range(STEPS):
        optimizer.zero_grad()
        net(batch(step, rank)).square().mean().backward()
        optimizer.step()
        after()


def weights(net):
    return parameters_to_vector(net.parameters()).detach()


def by_hand(steps, rank):
    """FedAvg: every site's training in this one process, and the mean of their weights."""
    sites = [network() for _ in range(RANKS)]
    for start in range(0, STEPS, steps):
        for number, site in enumerate(sites):
            inner = torch.optim.SGD(site.parameters(), lr=RATE)
            for step in range(start, start + steps):
                inner.zero_grad()
                site(batch(step, number)).square().mean().backward()
                inner.step()
        mean = sum(weights(site) for site in sites) / RANKS
        for site in sites:
            nn.utils.vector_to_parameters(mean.clone(), site.parameters())
    return weights(sites[rank])


def with_engine(policy):
    stepper = Stepper("ddp", network(), "sgd", RATE)
    meeting = Meeting(policy, stepper)
    train(stepper.model, stepper.optimizer, meeting.after_step, dist.get_rank())
    return weights(stepper.module)


def nesterov():
    """The mean gradient of all ranks into torch's SGD, with the step of both rates."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE * OUTER, momentum=MOMENTUM, nesterov=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(net(batch(step, rank)).square().mean() / RANKS for rank in range(RANKS)).backward()
        optimizer.step()
    return weights(net)


def sparse_round():
    """What a site keeps and sends is what it had; the shared weights take the mean, the same on both ranks."""
    rank = dist.get_rank()
    net = nn.Linear(CHUNK // 4, 5)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    outer = Outer(LocalPolicy(1, "topk", outer_lr=0.5, decay=0.5), net)
    generator = torch.Generator().manual_seed(rank)
    moved = torch.randn(len(weights(net)), generator=generator)
    outer.residual += 1.0
    nn.utils.vector_to_parameters(moved.clone(), net.parameters())
    outer.meet()
    had = 0.5 + (0 - moved)
    sent = had - outer.residual
    total = sent.clone()
    dist.all_reduce(total)
    return {
        "weights": weights(net),
        "expected": -0.5 * total / RANKS,
        "sent": int((sent != 0).sum()),
        "unsent": float((had - outer.residual)[sent == 0].abs().max()),
        "residual": float(outer.residual.norm() / had.norm()),
    }


def counted(policy, sizes):
    """Bytes that a round hands to collectives, as each of them sends: a ring, or to every other rank."""
    kept = dist.all_reduce, dist.all_gather, dist.all_to_all_single
    total, ranks = 0, dist.get_world_size()

    def all_reduce(values):
        nonlocal total
        total += 2 * (ranks - 1) * values.nbytes // ranks
        return kept[0](values)

    def all_gather(parts, mine):
        nonlocal total
        total += (ranks - 1) * mine.nbytes
        return kept[1](parts, mine)

    def all_to_all(received, sent):
        nonlocal total
        total += (ranks - 1) * sent.nbytes // ranks
        return kept[2](received, sent)

    dist.all_reduce, dist.all_gather, dist.all_to_all_single = all_reduce, all_gather, all_to_all
    try:
        Outer(policy, nn.ParameterList(torch.ones(size) for size in sizes)).meet()
    finally:
        dist.all_reduce, dist.all_gather, dist.all_to_all_single = kept
    return [total * ranks, payload_bytes(policy, sizes, ranks)]


def all_cases():
    rank = dist.get_rank()
    mean = LocalPolicy(3, "diloco", outer_lr=1.0, outer_momentum=0.0)
    counts = [
        counted(policy, (CHUNK + 6, 12))
        for policy in (mean, LocalPolicy(1, "diloco", values="bf16"), LocalPolicy(1, "topk"))
    ]
    in_bf16 = local_updates._mean_in_bf16(torch.tensor([1.0, 1 / 3, 2.0 + rank]))
    return {
        "localsgd": with_engine(LocalPolicy(3)),
        "mean": with_engine(mean),
        "other rate": with_engine(LocalPolicy(3, "diloco", outer_lr=0.7, outer_momentum=0.0)),
        "by hand": by_hand(3, rank),
        "nesterov": with_engine(LocalPolicy(1, "diloco", outer_lr=OUTER, outer_momentum=MOMENTUM)),
        "torch": nesterov(),
        "sparse": sparse_round(),
        "counts": counts,
        "bf16": in_bf16,
    }


@pytest.fixture(scope="module")
def answers():
    return run_ranks(all_cases, RANKS)


def test_an_outer_step_of_one_is_the_mean_of_the_weights_as_accelerates_local_sgd(answers):
    for answer in answers:
        assert (answer["localsgd"] - answer["by hand"]).abs().max() < 1e-14
        assert (answer["mean"] - answer["localsgd"]).abs().max() < 1e-14
        assert (answer["other rate"] - answer["localsgd"]).abs().max() > 1e-3


def test_rounds_of_one_step_are_torchs_nesterov(answers):
    for answer in answers:
        assert (answer["nesterov"] - answer["torch"]).abs().max() < 1e-14


def test_a_sparse_round_keeps_what_it_does_not_send(answers):
    first, second = (answer["sparse"] for answer in answers)
    assert torch.equal(first["weights"], second["weights"])
    for one in (first, second):
        torch.testing.assert_close(one["weights"], one["expected"], rtol=0, atol=1e-6)
        assert one["sent"] == 64 + 64 + 5  # the weight's whole chunk and its rest; all of the bias
        assert one["unsent"] == 0
        assert 0.9 < one["residual"] < 1


def test_a_round_sends_what_the_formula_says(answers):
    dense, half, sparse = answers[0]["counts"]
    assert dense == [2 * 4 * (CHUNK + 18)] * 2
    assert half == [2 * 2 * (CHUNK + 18)] * 2
    # Tables of 16 bytes; 70 and 12 indices in pairs of 3 bytes; 70 and 12 codes, four in a byte.
    assert sparse == [2 * ((16 + 105 + 18) + (16 + 18 + 3))] * 2
    expected = torch.tensor([1.0, 1 / 3, 2.5]).bfloat16().float()
    assert torch.equal(answers[0]["bf16"], expected)
    assert torch.equal(answers[1]["bf16"], expected)
