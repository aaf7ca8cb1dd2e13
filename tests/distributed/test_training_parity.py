"""Two ranks train on the same step as one process, under DDP, FSDP2 and every ZeRO stage: same weights after SGD.

The oracle is plain PyTorch: the mean over the step's bags of the per-bag gradients. Five bags on two ranks leave the
last step uneven, so that a mean of per-rank means is wrong; the test checks that it would be noticed.
"""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from ds_wsi.bags.sampler import plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.runtime.seeding import step_seed
from ds_wsi.stacking import stack_bags
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.stacking.randomness import bag_randomness, key_dropouts
from ds_wsi.training.step import bag_weight, blank_tile, idle_loss, run_micro_step
from harness import run_ranks

pytestmark = pytest.mark.distributed
TILE_PX = 32
LENGTHS = (3, 1, 4, 2, 5)
LEARNING_RATE = 0.1


def make_model(aggregator: str = "gated_abmil", dropout: float = 0.0) -> SlideModel:
    torch.manual_seed(0)
    # GroupNorm: running statistics of BatchNorm are per rank until averaged, and have a test of their own below.
    encoder = timm.create_model("resnet10t", num_classes=0, norm_layer="groupnorm1")
    model = SlideModel(encoder, build_aggregator(aggregator, encoder.num_features, 2, dropout=dropout)).float()
    key_dropouts(model.aggregator)
    pack_bags(model.aggregator, 0)
    return model


def plan_of(layout: dict) -> tuple:
    """The steps of the one epoch, and the model's options."""
    layout = dict(layout)
    model = {name: layout.pop(name) for name in ("aggregator", "dropout") if name in layout}
    if "stacking" in layout:
        layout["stacking"] = StackingPolicy(**layout["stacking"])
    size = StepLayout(layout["world_size"], layout["bags_per_rank"], layout["accumulation"], layout.get("stacking"))
    return plan_epoch(len(LENGTHS), size, seed=0, epoch=0, lengths=LENGTHS), model


def make_bags() -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 256, (n, 3, TILE_PX, TILE_PX), dtype=torch.uint8, generator=generator), n % 2)
        for n in LENGTHS
    ]


def oracle(layout: dict[str, int], wrong: bool = False) -> dict[str, torch.Tensor]:
    """Plain SGD over the same steps in one process; `wrong` takes the mean of the ranks' means."""
    plan, options = plan_of(layout)
    model, bags = make_model(**options).train(), make_bags()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for number, step in enumerate(plan):
        per_rank = [
            [slide for micro in step.micro_steps for slide in micro[rank]] for rank in range(layout["world_size"])
        ]
        for slides in per_rank:
            for slide in slides:
                tiles, label = bags[slide]
                with bag_randomness([step_seed(0, number, slide)]):
                    loss = F.cross_entropy(model(stack_bags([tiles])).logits, torch.tensor([label]))
                (loss / (len(slides) * layout["world_size"] if wrong else step.n_bags)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


def train_cases(cases: list[tuple[str, dict[str, int]]]) -> list[dict[str, torch.Tensor]]:
    """Train each case on one rank through the project's engine layer and loss weighting."""
    from accelerate.state import AcceleratorState, GradientState

    states = []
    for engine, layout in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        states.append(_train(engine, layout))
    return states


def loss_of(model: torch.nn.Module, bags: dict) -> torch.Tensor:
    """The sum of the bags' losses, each with the seed of its dropout."""
    if not bags:
        return idle_loss(model, blank_tile(TILE_PX, torch.device("cpu")))
    tiles, labels = zip(*bags.values(), strict=True)
    with bag_randomness(list(bags)):
        return stack_loss(model(stack_bags(tiles)), torch.tensor(labels))


def _train(engine: str, layout: dict[str, int]) -> dict[str, torch.Tensor]:
    from pathlib import Path

    from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare
    from ds_wsi.engines.sharded.zero import full_state_dict

    config = None
    if engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "optimizer": {"type": "SGD", "params": {"lr": "auto", "weight_decay": "auto"}},
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_allow_untested_optimizer": True,
        }
    settings = EngineSettings(
        *(LEARNING_RATE, 0.0, 0.0, "sgd", layout["bags_per_rank"], layout["accumulation"]), fsdp=engine == "fsdp2"
    )
    accelerator = build_accelerator(settings, Path("unused"), config)
    plan, options = plan_of(layout)
    module = make_model(**options)
    # As the trainer does where ranks have stacks of more and fewer bags.
    if engine == "zero3" or (engine == "fsdp2" and layout["bags_per_rank"] > 1):
        partition_layers(module.encoder, PartitionPolicy(mode="native", bn_population="bag"))
    model, optimizer = prepare(accelerator, module, settings)
    bags, rank = make_bags(), accelerator.process_index
    model.train()
    for number, step in enumerate(plan):
        weight = bag_weight(step.n_bags, accelerator.num_processes, len(step.micro_steps))
        for ranks in step.micro_steps:
            bags_here = {step_seed(0, number, slide): bags[slide] for slide in ranks[rank]}
            run_micro_step(accelerator, model, optimizer, partial(loss_of, model, bags_here), weight)
    return full_state_dict(accelerator.unwrap_model(model))


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
LAYOUTS = (
    {"world_size": 2, "bags_per_rank": 1, "accumulation": 1},
    {"world_size": 2, "bags_per_rank": 2, "accumulation": 2},
    # All five bags per step, by cost and under a cap: workers hold one to three; dropout is the bag's wherever it is.
    {
        "world_size": 2,
        "bags_per_rank": 3,
        "accumulation": 2,
        "stacking": {"bags_per_step": 5, "max_tiles_per_rank": 6},
        "dropout": 0.4,
    },
    # Three of them a step, and an aggregator that computes one at a time.
    {
        "world_size": 2,
        "bags_per_rank": 3,
        "accumulation": 1,
        "stacking": {"bags_per_step": 3},
        "aggregator": "transmil",
        "dropout": 0.2,
    },
)


def test_two_ranks_equal_one_process_under_every_engine():
    cases = [(engine, layout) for engine in ENGINES for layout in LAYOUTS]
    by_rank = run_ranks(train_cases, 2, cases)
    expected = {str(layout): oracle(layout) for layout in LAYOUTS}
    for index, (engine, layout) in enumerate(cases):
        states = [of_rank[index] for of_rank in by_rank]
        # Every rank holds the same whole weights, bit by bit.
        assert largest_difference(states[0], states[1]) == 0, (engine, layout)
        # Float32: sums in another order, over a few steps of learning rate 0.1.
        assert largest_difference(states[0], expected[str(layout)]) < 2e-6, (engine, layout)


def test_four_ranks_equal_one_process():
    layout = {**LAYOUTS[2], "world_size": 4, "accumulation": 1}
    by_rank = run_ranks(train_cases, 4, [("ddp", layout), ("fsdp2", layout), ("zero3", layout)])
    expected = oracle(layout)
    for rank, index in ((0, 0), (3, 0), (0, 1), (3, 1), (0, 2), (3, 2)):
        assert largest_difference(by_rank[rank][index], expected) < 2e-6, (rank, index)


def test_a_mean_of_rank_means_would_be_noticed():
    layout = LAYOUTS[1]
    assert largest_difference(oracle(layout, wrong=True), oracle(layout)) > 1e-4


def average_on_rank() -> list[float]:
    from pathlib import Path

    import torch.distributed as dist

    from ds_wsi.engines.accelerator.engine import EngineSettings, average_buffers, build_accelerator

    accelerator = build_accelerator(EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 1), Path("unused"), None)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(float(dist.get_rank() + 1))
    average_buffers(accelerator, norm)
    return [*norm.running_mean.tolist(), float(norm.num_batches_tracked)]


def test_running_statistics_are_averaged_over_the_ranks():
    assert run_ranks(average_on_rank, 2) == [[1.5, 1.5, 0.0]] * 2
