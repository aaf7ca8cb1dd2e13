"""Norms whose population is the optimizer step, on two ranks under every engine, against one plain BatchNorm.

The oracle is plain PyTorch in one process: an encoder called once on all tiles of all bags of the step, the mean of the
bags' losses. Bags are of unequal length, the last step leaves a rank without one, chunks are odd.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_wsi.bags.sampler import plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.engines.policies.norms import apply_training
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.norms import NormPolicy, batch_norms
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.stacking import stack_bags
from ds_wsi.training.step import bag_weight, idle_loss, run_micro_step
from harness import run_ranks

pytestmark = pytest.mark.distributed
LENGTHS = (3, 1, 4, 2, 5)  # bags; three a step: the second step has two, both of one rank's share of three
TILE_PX, WIDTH, LEARNING_RATE, STEPS = 9, 4, 0.1, 100
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")  # what DeepSpeed leaves behind, FSDP2 takes amiss


class Encoder(nn.Module):
    """Two levels of norms, a residual; the first norm is of the tiles themselves."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3, 2), nn.BatchNorm2d(WIDTH)
        self.last, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        x = self.norm(self.conv(self.first(x))).relu()
        return (x + self.norm2(self.last(x)).relu()).mean((2, 3))


def make_model(dtype) -> SlideModel:
    torch.manual_seed(0)
    model = SlideModel(Encoder(), build_aggregator("gated_abmil", WIDTH, 2, dropout=0.0))
    for part in model.encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5), nn.init.normal_(part.bias)
    return model.to(dtype).train()


def make_bags(dtype) -> list:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, TILE_PX, TILE_PX, dtype=torch.float64, generator=generator).add(n).to(dtype), n % 2)
        for n in LENGTHS
    ]


def plan_of(world_size: int, accumulation: int):
    plan = plan_epoch(len(LENGTHS), StepLayout(world_size, 1, accumulation), seed=0, epoch=0)
    return [step.as_one for step in plan]


def oracle(plan, dtype) -> dict:
    """The plain step: the encoder called once per step, on all tiles of all its bags."""
    model, bags = make_model(dtype), make_bags(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in plan:
        slides = [slide for rank in step.micro_steps[0] for slide in rank]
        features = model.encoder(torch.cat([bags[slide][0] for slide in slides]))
        parts = features.split([len(bags[slide][0]) for slide in slides])
        losses = [
            F.cross_entropy(model.aggregate(stack_bags([part])).logits, torch.tensor([bags[slide][1]]))
            for part, slide in zip(parts, slides, strict=True)
        ]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    return {name: value.detach().double() for name, value in copy.deepcopy(model.state_dict()).items()}


def start(engine: str, model: SlideModel, *, learning_rate: float = LEARNING_RATE):
    from pathlib import Path

    from accelerate.state import AcceleratorState, GradientState

    from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = None
    if engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "optimizer": {"type": "SGD", "params": {"lr": "auto", "weight_decay": "auto"}},
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_allow_untested_optimizer": True,
        }
    settings = EngineSettings(*(learning_rate, 0.0, 0.0, "sgd", 1, 1), fsdp=engine == "fsdp2")
    accelerator = build_accelerator(settings, Path("unused"), config)
    return accelerator, lambda: prepare(accelerator, model, settings)


def loss_of(model, bags, dtype) -> torch.Tensor:
    """The sum of the losses of a rank's (tiles, label), which can be none."""
    if not bags:
        return idle_loss(model, torch.zeros(1, 3, TILE_PX, TILE_PX, dtype=dtype))
    tiles, labels = zip(*bags, strict=True)
    return stack_loss(model(stack_bags(tiles)), torch.tensor(labels))


def train_on_rank(cases) -> list:
    """Weights and statistics of every case on this rank, float64."""
    from ds_wsi.engines.sharded.zero import full_state_dict

    states = []
    for engine, mode, accumulation in cases:
        dtype = torch.float32 if engine.startswith("zero") else torch.float64
        model = make_model(dtype)
        accelerator, wrap = start(engine, model)
        apply_training("step", NormPolicy(), model)
        if mode is not None or engine == "zero3":
            policy = PartitionPolicy(mode=mode or "native", chunk_size=None if mode is None else 3, bn_population="bag")
            partition_layers(model.encoder, policy)
        wrapped, optimizer = wrap()
        wrapped.train()
        bags, rank = make_bags(dtype), accelerator.process_index
        for step in plan_of(2, accumulation):
            bags_here = [bags[slide] for slide in step.micro_steps[0][rank]]
            loss = partial(loss_of, wrapped, bags_here, dtype)
            run_micro_step(accelerator, wrapped, optimizer, loss, bag_weight(step.n_bags, 2, 1))
        module = accelerator.unwrap_model(wrapped)
        state = {name: value.double() for name, value in full_state_dict(module).items()}
        if engine in ("ddp", "fsdp2"):  # in float64, which the exported float32 would round
            state |= {name: value.double() for name, value in module.named_buffers()}
        states.append(state)
    return states


CASES = [
    *((engine, None, 1) for engine in ENGINES[:2]),
    ("fsdp2", "recompute", 1),
    *(("ddp", mode, 2) for mode in (None, "lean", "recompute", "checkpoint", "offload")),
    *((engine, None, 1) for engine in ENGINES[2:]),
    ("zero2", None, 2),
    ("zero3", "lean", 2),
]


@pytest.fixture(scope="module")
def trained():
    return run_ranks(train_on_rank, 2, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{e}-{m}-{a}" for e, m, a in CASES])
def test_a_step_is_one_population_on_any_number_of_ranks(trained, index):
    engine, _, accumulation = CASES[index]
    plan = plan_of(2, accumulation)
    assert any(not slides for step in plan for slides in step.micro_steps[0]) or accumulation == 2, (
        "a rank without a bag"
    )
    exact = oracle(plan, torch.float64)
    for state in (ranks[index] for ranks in trained):
        for name, value in exact.items():
            buffer = name.endswith(("running_mean", "running_var"))
            # Weights leave the engines in float32; DeepSpeed trains in it.
            tolerance = 1e-10 if buffer and engine in ("ddp", "fsdp2") else 2e-5 if engine[0] == "z" else 1e-6
            torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance, msg=f"{CASES[index]} {name}")


def test_bags_as_populations_of_their_own_would_be_noticed():
    plan = plan_of(2, 1)
    whole = oracle(plan, torch.float64)
    apart = oracle([step for step in plan_of(1, 1)], torch.float64)
    assert (whole["encoder.first.running_var"] - apart["encoder.first.running_var"]).abs().max() > 0.01


def statistics_on_rank(training: str) -> list:
    """Per engine: first norm's (mean, var) after 100 steps on the rank's own data, as a checkpoint would hold them."""
    import torch.distributed as dist

    import ds_wsi
    from ds_wsi.engines.accelerator.engine import average_buffers

    statistics = []
    for engine in ENGINES:
        model = make_model(torch.float32)
        accelerator, wrap = start(engine, model, learning_rate=1e-4)
        apply_training(training, NormPolicy(), model)
        wrapped, optimizer = wrap()
        wrapped.train()
        rank = dist.get_rank()
        for number in range(STEPS):
            loss = partial(loss_of, wrapped, [(stained(rank, number), rank)], torch.float32)
            run_micro_step(accelerator, wrapped, optimizer, loss, 1.0)
        module = accelerator.unwrap_model(wrapped)
        if engine == "ddp":  # as in a loop of one's own
            ds_wsi.pool_statistics(wrapped)
        else:
            average_buffers(accelerator, module)
        norm = module.encoder.first
        statistics.append([norm.running_mean.double().tolist(), norm.running_var.double().tolist()])
    return statistics


def shared_bags_on_rank() -> list:
    """Per engine: the same of 100 steps in which both ranks hold a part of one bag."""
    from ds_wsi.tile_parallel import shard_tiles, tile_mesh

    statistics = []
    for engine in ENGINES:
        model = make_model(torch.float32)
        accelerator, wrap = start(engine, model, learning_rate=1e-4)
        mesh = tile_mesh(2)
        shard_tiles(model, mesh)
        wrapped, optimizer = wrap()
        wrapped.train()
        for number in range(STEPS):
            loss = partial(loss_of, wrapped, [(stained(mesh.tile_rank, number), 1)], torch.float32)
            run_micro_step(accelerator, wrapped, optimizer, loss, 1.0)
        norm = accelerator.unwrap_model(wrapped).encoder.first
        statistics.append([norm.running_mean.double().tolist(), norm.running_var.double().tolist()])
    return statistics


def stained(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randn(3, 3, TILE_PX, TILE_PX, generator=generator) + 10 * rank


def pooled_statistics(training: str) -> tuple:
    """One plain norm of all data ("step"); or one per rank, and the moments of both ranks' values as one population."""
    norms = [nn.BatchNorm2d(3).double() for _ in range(2)]
    for number in range(STEPS):
        tiles = [stained(rank, number).double() for rank in range(2)]
        norms[0](torch.cat(tiles) if training == "step" else tiles[0]), norms[1](tiles[1])
    if training == "step":
        return norms[0].running_mean, norms[0].running_var
    means, variances = (
        torch.stack([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var")
    )
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


@pytest.mark.parametrize("training", ["bag", "step", "tile-parallel"])
def test_running_statistics_of_100_steps_are_the_exact_pool(training):
    shared = training == "tile-parallel"
    by_rank = run_ranks(shared_bags_on_rank, 2) if shared else run_ranks(statistics_on_rank, 2, training)
    mean, var = pooled_statistics("step" if shared else training)  # a bag of both ranks' tiles
    assert 4.9 < mean.min() < mean.max() < 5.1, "not rank 0's"
    assert by_rank[0] == by_rank[1]
    for engine, (found_mean, found_var) in zip(ENGINES, by_rank[0], strict=True):
        torch.testing.assert_close(torch.tensor(found_mean), mean, rtol=1e-5, atol=1e-5, msg=engine, check_dtype=False)
        torch.testing.assert_close(torch.tensor(found_var), var, rtol=1e-5, atol=1e-5, msg=engine, check_dtype=False)


def recalibrate_on_rank(shares, one_chunk) -> dict:
    import torch.distributed as dist

    from ds_wsi.norms.passes import recalibrate

    model, bags = make_model(torch.float64), make_bags(torch.float64)
    tiles = [bags[slide][0] for slide in shares[dist.get_rank()]] or [torch.empty(0, 3, TILE_PX, TILE_PX).double()]
    chunks = [torch.cat(tiles)] if one_chunk else tiles
    encoder = model.eval().encoder
    recalibrate(batch_norms(encoder), encoder, lambda: chunks, group=dist.group.WORLD, one_chunk=one_chunk)
    return {name: value for name, value in encoder.named_buffers() if name.endswith(("mean", "var"))}


@pytest.mark.parametrize("one_chunk", [True, False])
@pytest.mark.parametrize("shares", [((0, 3), (1, 2, 4)), ((0, 1, 2, 3, 4), ())], ids=["both", "one has none"])
def test_statistics_taken_anew_are_those_of_all_ranks_tiles_in_one_call(shares, one_chunk):
    encoder = make_model(torch.float64).encoder
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    encoder.train()(torch.cat([bag for bag, _ in make_bags(torch.float64)]))
    for statistics in run_ranks(recalibrate_on_rank, 2, shares, one_chunk):
        for name, value in statistics.items():
            torch.testing.assert_close(value, dict(encoder.named_buffers())[name], rtol=1e-10, atol=1e-10, msg=name)


def evaluate_on_rank(mode) -> dict:
    """Logits of a model trained over a step of both ranks: of more slides on one rank; and of a bag that both hold."""
    import torch.distributed as dist

    from ds_wsi.norms.roles import is_shared
    from ds_wsi.tile_parallel import shard_tiles, tile_mesh

    rank, bags = dist.get_rank(), make_bags(torch.float64)
    model = make_model(torch.float64)
    apply_training("step", NormPolicy(), model)
    if mode is not None:
        partition_layers(model.encoder, PartitionPolicy(mode=mode, chunk_size=3, bn_population="bag"))
    model.set_norms(evaluation="bag").eval()
    results = {"training": model.train().encoder is not None and is_shared(model.encoder)}
    with torch.no_grad():
        model.eval()
        bags_here = bags if rank == 0 else bags[:2]
        results["logits"] = torch.cat([model(stack_bags([bag])).logits for bag, _ in bags_here])
        if mode is None:
            mesh = tile_mesh(2)
            shard_tiles(model, mesh)
            apply_training("step", NormPolicy(), model)
            tiles = bags[4][0]
            results["shared"] = model.eval()(stack_bags([tiles[:2] if mesh.tile_rank == 0 else tiles[2:]])).logits
    return results


@pytest.mark.parametrize("mode", [None, "lean"])
def test_in_evaluation_a_slide_is_its_own_population_after_a_step_of_ranks(mode):
    """The ranks share nothing there, so one may have more slides than the other; those that share a bag still do."""
    alone = make_model(torch.float64).set_norms("step", "bag").eval()
    with torch.no_grad():
        expected = torch.cat([alone(stack_bags([bag])).logits for bag, _ in make_bags(torch.float64)])
    for results in run_ranks(evaluate_on_rank, 2, mode):
        assert results["training"], "in training they share"
        torch.testing.assert_close(results["logits"], expected[: len(results["logits"])], rtol=1e-10, atol=1e-10)
        if mode is None:
            torch.testing.assert_close(results["shared"], expected[4:], rtol=1e-10, atol=1e-10)
