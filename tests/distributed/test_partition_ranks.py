"""A partitioned encoder trains as the plain one under every engine, and across ranks with SyncBatchNorm.

The reference is the same engine on the unpartitioned model: weights after the steps (with plain SGD the gradients, but
for the learning rate) and the running statistics of each rank.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.stacking import stack_bags
from ds_wsi.training.step import stack_loss

pytestmark = pytest.mark.distributed
TILE_PX = 16
CHUNK = 3
LENGTHS = ((7, 4), (5, 8), (3, 10), (9, 2))  # tiles of each micro-step's bag, by rank: 1 to 4 chunks
STEPS = 2
LEARNING_RATE = 0.1


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True)
        self.short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + self.short(x))


class Encoder(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            Block(8, 8, 1),
            Block(8, 12, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 10),
        )


def make_model(dtype):
    torch.manual_seed(0)
    model = SlideModel(Encoder(), build_aggregator("gated_abmil", 10, 2)).to(dtype)
    return model.train()


def bag(micro, rank):
    tiles = LENGTHS[micro % len(LENGTHS)][rank]
    generator = torch.Generator().manual_seed(10 * micro + rank)
    return torch.randint(0, 256, (tiles, 3, TILE_PX, TILE_PX), dtype=torch.uint8, generator=generator), tiles % 2


def deepspeed_config(case):
    zero = {"stage": int(case["engine"][-1])}
    if case.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if zero["stage"] == 3:
        # Nothing stays whole between its uses.
        zero |= dict.fromkeys(("stage3_param_persistence_threshold", "stage3_max_reuse_distance"), 0)
        zero |= dict.fromkeys(("stage3_max_live_parameters", "stage3_prefetch_bucket_size"), 0)
    kind = case.get("optimizer", "sgd")
    params = {"lr": "auto", "weight_decay": "auto"} | ({"torch_adam": True} if kind == "adam" else {})
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": {"sgd": "SGD", "adam": "Adam"}[kind], "params": params},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def through_accelerate(case, model):
    """(model, micro-step) under DDP or ZeRO, as the trainer drives them."""
    from accelerate.state import AcceleratorState, GradientState

    from ds_wsi.engines.accelerate import EngineSettings, build_accelerator, prepare

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = None if case["engine"] == "ddp" else deepspeed_config(case)
    settings = EngineSettings(
        LEARNING_RATE, 0.0, 0.0, case.get("optimizer", "sgd"), 1, case["accumulation"], case["precision"]
    )
    accelerator = build_accelerator(settings, Path("unused"), config)
    wrapped, optimizer = prepare(accelerator, model, settings)

    def micro_step(index):
        tiles, label = bag(index, dist.get_rank())
        with accelerator.accumulate(wrapped):
            loss = stack_loss(wrapped(stack_bags([tiles])), torch.tensor([label]))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    return micro_step


def through_fsdp2(case, model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[case.get("optimizer", "sgd")]
    optimizer = kind(model.parameters(), lr=LEARNING_RATE)

    def micro_step(index):
        tiles, label = bag(index, dist.get_rank())
        last = (index + 1) % case["accumulation"] == 0
        model.set_requires_gradient_sync(last)
        with torch.autocast("cpu", torch.bfloat16) if case["precision"] == "bf16" else nullcontext():
            output = model(stack_bags([tiles]))
        (stack_loss(output, torch.tensor([label])) / case["accumulation"]).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return micro_step


def whole_state(model):
    """Whole parameters and buffers in their own dtype."""
    import deepspeed

    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if hasattr(value, "ds_id"):
            with deepspeed.zero.GatheredParameters([value]):
                state[name] = value.detach().clone()
        else:
            state[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return state


def train(case):
    """The model's state after the first step and after the last."""
    model = make_model(getattr(torch, case.get("dtype", "float32")))
    if case["mode"] is not None:
        partition_layers(model.encoder, PartitionPolicy(mode=case["mode"], chunk_size=CHUNK))
    micro_step = (through_fsdp2 if case["engine"] == "fsdp2" else through_accelerate)(case, model)
    found = []
    for index in range(STEPS * case["accumulation"]):
        micro_step(index)
        if (index + 1) % case["accumulation"] == 0:
            found.append(whole_state(model))
    return found


def train_cases(cases):
    return [train(case) for case in cases]
