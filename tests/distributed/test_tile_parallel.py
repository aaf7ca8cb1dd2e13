"""One bag over several ranks has the gradients of one process: summed over the ranks, in float64, without an engine."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.stacking import StackedBags, stack_bags
from ds_wsi.tile_parallel import TileMesh, TileParallelPolicy, collectives, shard_tiles, stream_bag, tile_mesh
from harness import run_ranks

pytestmark = pytest.mark.distributed
SIDE = 12
WIDTH = 10
LABELS = torch.tensor([1, 0])
# Tiles of two bags on each of four ranks.
SPLITS = {
    "even": ((3, 3, 3, 2), (2, 2, 2, 3)),
    "idle ranks": ((5, 6, 0, 0), (0, 4, 5, 0)),
    "lopsided": ((1, 1, 1, 12), (9, 0, 0, 1)),
}
EXCHANGES = ("sharded", "replicated", "gather")


class Block(nn.Module):
    """A residual block with two norms on one level, whose collectives must not be mixed up."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short, self.short_norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + self.short_norm(self.short(x)))


POOLED = ("mean", "max", "embedded gated_abmil")


def make_model(aggregator="gated_abmil", dropout=0.0):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, WIDTH)),
    )
    encoder.num_features = WIDTH
    options = {"embed": "8-5", "embed_dropout": 0.0} if aggregator.startswith("embedded") else {}
    pooling = build_aggregator(aggregator.split()[-1], WIDTH, 2, dropout=dropout, **options)
    return SlideModel(encoder, pooling).double().train()


def tiles_of(bag, count):
    generator = torch.Generator().manual_seed(bag)
    return torch.rand(count, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)


def shards(split, rank):
    """This rank's part of each bag, as it lies in the slide's order."""
    parts = []
    for bag, counts in enumerate(split):
        first = sum(counts[:rank])
        parts.append(tiles_of(bag, sum(counts))[first : first + counts[rank]])
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return StackedBags(torch.cat(parts), ends)


def found_by(model):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients | {f"running {name}": b.clone() for name, b in model.named_buffers() if "running" in name}


def precision(case):
    return torch.autocast("cpu", dtype=torch.bfloat16) if case.get("amp") else nullcontext()


def one_process(case) -> dict[str, Tensor]:
    model = make_model(case.get("aggregator", "gated_abmil"))
    bags = stack_bags([tiles_of(bag, sum(counts)) for bag, counts in enumerate(SPLITS[case["split"]])])
    if case.get("population") == "stack":
        partition_layers(model.encoder, PartitionPolicy(mode="keep", chunk_size=64))
    if case.get("amp"):
        model, bags = model.float(), bags.with_values(bags.values.float())
    with precision(case):
        output = model(bags, LABELS)
    (stack_loss(output, LABELS) / 2).backward()
    return found_by(model)


def on_this_rank(case) -> dict[str, Tensor]:
    """Gradients summed over all ranks, running statistics and traffic of this one."""
    mesh = case.pop("mesh")
    model = make_model(case.get("aggregator", "gated_abmil"))
    handle = shard_tiles(model, mesh, TileParallelPolicy(4, case["exchange"]))
    if case.get("norms") is False:
        for undo in handle._undo:  # the norms no longer see the other ranks
            undo()
    if case.get("alone"):
        del model.aggregator.__dict__["forward"]
    if "mode" in case:
        policy = PartitionPolicy(mode=case["mode"], chunk_size=2, bn_population=case.get("population", "bag"))
        partition_layers(model.encoder, policy)
    stack = shards(SPLITS[case["split"]], mesh.tile_rank)
    if case.get("amp"):
        model, stack = model.float(), stack.with_values(stack.values.float())
    with precision(case):
        output = model(stack, LABELS)
    loss = stack_loss(output, LABELS) / 2 / mesh.tile_size
    (loss * case.get("factor", 1)).backward()
    results = found_by(model)
    for name, value in results.items():
        if not name.startswith("running"):
            dist.all_reduce(value)
    results["logits"] = output.logits.detach()
    results["rows"] = torch.tensor(-1 if output.attention is None else len(output.attention))
    traffic = handle.forward.traffic
    results["traffic"] = torch.tensor([sum(traffic.bytes.values()), sum(traffic.calls.values())])
    return results


def run_cases(cases):
    mesh = tile_mesh(4)
    return [on_this_rank({**case, "mesh": mesh}) for case in cases]


def difference(ours, theirs) -> float:
    """Largest normalised L1 over the gradients, and the running statistics."""
    least = 1e-3 * max(value.abs().sum() for name, value in theirs.items() if not name.startswith("running"))
    return max(
        ((ours[name] - value).abs().sum() / value.abs().sum().clamp_min(least)).item() for name, value in theirs.items()
    )


def all_cases():
    plain = [{"exchange": exchange, "split": split} for exchange in EXCHANGES for split in SPLITS]
    pooling = [{"exchange": e, "split": "idle ranks", "aggregator": a} for e in EXCHANGES for a in POOLED]
    labelled = [
        {"exchange": exchange, "split": "lopsided", "aggregator": name}
        for name in ("clam_sb", "clam_mb", "dsmil", "transmil")
        for exchange in EXCHANGES
        if exchange != "sharded" or name.startswith("clam")
    ]
    modes = ("lean", "recompute", "offload", "checkpoint")
    parts = [
        {"exchange": "sharded", "split": split, "mode": mode, "population": population}
        for split, mode, population in [
            *(("idle ranks", mode, "bag") for mode in modes),
            *(("lopsided", mode, "stack") for mode in modes),
        ]
    ]
    return plain + pooling + labelled + parts


WRONG = {
    "a missing factor": {"factor": 4},
    "a mean of the ranks' own losses": {"alone": True},
    "norms of each rank's own tiles": {"norms": False},
    "an all-reduce whose backward is the identity": {"identity": True},
}


def run_everything(cases, wrong):
    results = run_cases(cases)
    for case in wrong:
        keep = collectives._SumOver.backward
        if case.get("identity"):
            collectives._SumOver.backward = staticmethod(lambda ctx, *grads: (grads[0], None, None))
        try:
            results += run_cases([case])
        finally:
            collectives._SumOver.backward = keep
    return results


@pytest.fixture(scope="module")
def results():
    cases = all_cases()
    wrong = [{"exchange": "sharded", "split": "even", **change} for change in WRONG.values()]
    half = [{"exchange": exchange, "split": "lopsided", "amp": True} for exchange in EXCHANGES]
    by_rank = run_ranks(run_everything, 4, cases, [*wrong, *half])
    return cases, by_rank


def test_gradients_and_statistics_are_those_of_one_process(results):
    cases, by_rank = results
    expected: dict[str, dict[str, Tensor]] = {}
    for index, case in enumerate(cases):
        key = str((case["split"], case.get("aggregator"), case.get("population")))
        if key not in expected:
            expected[key] = one_process(case)
        for rank in range(4):
            assert difference(by_rank[rank][index], expected[key]) < 1e-12, (case, rank)
            assert torch.equal(by_rank[rank][index]["logits"], by_rank[0][index]["logits"]), (case, rank)


def test_the_obvious_mistakes_are_noticed(results):
    cases, by_rank = results
    expected = one_process({"split": "even"})
    for index, name in enumerate(WRONG, start=len(cases)):
        assert difference(by_rank[0][index], expected) > 1e-3, name


def test_mixed_precision_is_no_further_from_the_exact_gradient_than_one_process_in_it(results):
    cases, by_rank = results
    exact = one_process({"split": "lopsided"})
    alone = difference(one_process({"split": "lopsided", "amp": True}), exact)
    for number, exchange in enumerate(EXCHANGES, start=len(cases) + len(WRONG)):
        assert 1e-6 < difference(by_rank[1][number], exact) < 1.5 * alone, exchange


def test_attention_is_of_the_ranks_own_tiles(results):
    cases, by_rank = results
    for index, case in enumerate(cases):
        if case.get("aggregator") in ("mean", "max"):
            continue
        for rank in range(4):
            n_tiles = sum(counts[rank] for counts in SPLITS[case["split"]])
            assert by_rank[rank][index]["rows"] == (-1 if case["exchange"] == "gather" else n_tiles)


def test_bytes_are_as_the_formula_says(results):
    cases, by_rank = results
    for index, case in enumerate(cases):
        if "mode" in case or "aggregator" in case:
            continue
        counts = [sum(bag[rank] for bag in SPLITS[case["split"]]) for rank in range(4)]
        bags, item, numbers = 2, 8, 8 * 3  # lengths of two bags and a seed
        for rank in range(4):
            sent = int(by_rank[rank][index]["traffic"][0])
            if case["exchange"] == "sharded":  # the maxima, the sums, their gradients: no N in it
                assert sent == bags * item * (1 + 2 * (WIDTH + 1))
            elif case["exchange"] == "replicated":
                assert sent == numbers + max(counts) * WIDTH * item * (1 + 4)
            elif rank == 0:  # the paper's: features in, their gradients out
                assert sent == numbers + sum(counts[1:]) * WIDTH * item
            else:
                assert sent == numbers + counts[rank] * WIDTH * item


def stream_on_rank(split):
    """A bag streamed over four ranks, and each rank's sum of gradients."""
    mesh = tile_mesh(4)
    model = make_model()
    model.encoder.eval()
    rank, counts = mesh.tile_rank, split
    first = sum(counts[:rank])
    tiles = tiles_of(0, sum(counts))[first : first + counts[rank]]
    out = stream_bag(model.encoder, model.aggregator, tiles, chunk_size=2, group=mesh.group)
    (F.cross_entropy(out.logits, LABELS[:1]) / 4).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad
        dist.all_reduce(gradients[name])
    return gradients


def keyed_dropout():
    """Aggregators draw alike on all ranks; and as one process that is given the same seed."""
    mesh, logits = tile_mesh(4), []
    for exchange in EXCHANGES:
        model = make_model(dropout=0.5)
        handle = shard_tiles(model, mesh, TileParallelPolicy(4, exchange))
        for seed in (None, 7, 7, 8):
            handle.forward.seed = seed
            torch.manual_seed(mesh.tile_rank)  # the ambient generators differ
            logits.append(model(shards(SPLITS["even"], mesh.tile_rank)).logits.detach())
        handle.remove()
        assert type(model.encoder[1]) is nn.BatchNorm2d
        assert "forward" not in model.aggregator.__dict__
    return torch.stack(logits)


def stream_and_draw():
    return [*[stream_on_rank(counts) for split in SPLITS.values() for counts in split], keyed_dropout()]


def test_a_streamed_bag_over_ranks_and_what_the_aggregator_draws():
    by_rank = run_ranks(stream_and_draw, 4)
    for index, counts in enumerate(counts for split in SPLITS.values() for counts in split):
        model = make_model()
        model.encoder.eval()
        F.cross_entropy(model(stack_bags([tiles_of(0, sum(counts))])).logits, LABELS[:1]).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert difference(by_rank[3][index], expected) < 1e-12, counts
    drawn = [results[-1] for results in by_rank]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    per_exchange = drawn[0].view(3, 4, 2, 2)
    torch.testing.assert_close(per_exchange[0, 1:], per_exchange[1, 1:])
    torch.testing.assert_close(per_exchange[0, 1:], per_exchange[2, 1:])
    assert torch.equal(per_exchange[:, 1], per_exchange[:, 2])
    assert not torch.allclose(per_exchange[:, 2], per_exchange[:, 3])


def test_one_rank_needs_no_process_group():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    handle = shard_tiles(model, tile_mesh(1))
    out = model(stack_bags([tiles_of(0, 3)]))
    assert out.logits.shape == (1, 2)
    handle.remove()
    assert before.keys() == model.state_dict().keys()


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"size must divide the number of ranks, 1, got 2. HINT: one of 1"):
        tile_mesh(2)
    with pytest.raises(ValueError, match="aggregator must be one of auto, sharded, replicated, gather, got 'ring'"):
        TileParallelPolicy(2, "ring")
    with pytest.raises(ValueError, match="shares must be one number per rank of the group, 2"):
        TileParallelPolicy(2, shares=(1.0,))
    model = make_model()
    model.aggregator = nn.Linear(WIDTH, 2)
    with pytest.raises(ValueError, match=r'must be "replicated" or "gather" for Linear'):
        shard_tiles(model, TileMesh(), TileParallelPolicy(aggregator="sharded"))
