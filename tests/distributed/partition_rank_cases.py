"""An encoder in a slide model under each engine, and one step of ranks whose norms are synchronised."""

import copy
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.partition import PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.policy import MODES
from ds_wsi.stacking import stack_bags
from ds_wsi.training.step import blank_tile, idle_loss, run_micro_step

TILE_PX = 16
CHUNK = 3
LENGTHS = ((7, 4), (5, 8), (3, 10), (9, 0))  # tiles of each micro-step's bag, by rank: 1 to 4 chunks; 0: an idle rank
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


def loss_of(model, micro, rank):
    tiles = LENGTHS[micro][rank]
    if tiles == 0:
        return idle_loss(model, blank_tile(TILE_PX, torch.device("cpu")))
    generator = torch.Generator().manual_seed(10 * micro + rank)
    images = torch.randint(0, 256, (tiles, 3, TILE_PX, TILE_PX), dtype=torch.uint8, generator=generator)
    return stack_loss(model(stack_bags([images])), torch.tensor([tiles % 2]))


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

    from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = None if case["engine"] == "ddp" else deepspeed_config(case)
    settings = EngineSettings(
        LEARNING_RATE, 0.0, 0.0, case.get("optimizer", "sgd"), 1, case["accumulation"], case["precision"]
    )
    accelerator = build_accelerator(settings, Path("unused"), config)
    wrapped, optimizer = prepare(accelerator, model, settings)

    def micro_step(index):
        run_micro_step(accelerator, wrapped, optimizer, partial(loss_of, wrapped, index, dist.get_rank()), 1.0)

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
        last = (index + 1) % case["accumulation"] == 0
        model.set_requires_gradient_sync(last)
        with torch.autocast("cpu", torch.bfloat16) if case["precision"] == "bf16" else nullcontext():
            loss = loss_of(model, index, dist.get_rank())
        (loss / case["accumulation"]).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return micro_step


def whole_state(model):
    """Whole parameters and buffers in their own dtype."""
    import deepspeed

    values = model.state_dict(keep_vars=True)
    sharded = [value for value in values.values() if hasattr(value, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        whole = {name: value.full_tensor() if hasattr(value, "placements") else value for name, value in values.items()}
        return {name: value.detach().clone() for name, value in whole.items()}


def a_plan(encoder):
    policy = PartitionPolicy(mode="lean", chunk_size=CHUNK, host_budget_bytes=2**30)
    return plan_partition(encoder, (8, 3, TILE_PX, TILE_PX), policy, dtype=next(encoder.parameters()).dtype)


def train(case):
    """The model's whole state after each step."""
    model = make_model(getattr(torch, case["dtype"]))
    if case["mode"] is not None:
        partition_layers(model.encoder, PartitionPolicy(case["mode"], chunk_size=CHUNK), check=case.get("check", True))
    if case.get("called_before"):  # the partition has seen the parameters that the engine replaces
        before = copy.deepcopy(model.state_dict())
        loss_of(model, 0, 0).backward()
        model.load_state_dict(before)
        model.zero_grad()
        expected = a_plan(model.encoder)
    micro_step = (through_fsdp2 if case["engine"] == "fsdp2" else through_accelerate)(case, model)
    if case.get("called_before"):  # an engine's shards and hooks must not show in a plan
        assert a_plan(model.encoder) == expected
    states = []
    for index in range(STEPS * case["accumulation"]):
        micro_step(index)
        if (index + 1) % case["accumulation"] == 0:
            states.append(whole_state(model))
    return states


def train_cases(cases):
    return [train(case) for case in cases]


class Collectives(TorchDispatchMode):
    """Counts the operations of torch.distributed by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class GlooDDP(DistributedDataParallel):
    """DDP without its refusal of SyncBatchNorm on a CPU, where torch's own does not run."""

    def _passing_sync_batchnorm_handle(self, module):
        pass


SYNC_TILES = (7, 4)
# Modes and chunk sizes by rank; whether the norms are SyncBatchNorm.
SYNC_CASES = [
    (modes, sizes, True)
    for modes in (*((mode, mode) for mode in MODES), ("lean", "recompute"), ("checkpoint", "keep"))
    for sizes in ((3, 2), (20, 1))
]
SYNC_CASES.append((("lean", "lean"), (3, 2), False))


def step_on(module, rows):
    """Output, input gradient, buffers and parameter gradients of a step on the tiles `rows`."""
    generator = torch.Generator().manual_seed(3)
    count = sum(SYNC_TILES)
    images = torch.randn(count, 3, TILE_PX, TILE_PX, dtype=torch.float64, generator=generator)
    gradient = torch.randn(count, 10, dtype=torch.float64, generator=generator)
    x = images[rows].clone().requires_grad_()
    out = module(x)
    out.backward(gradient[rows])
    module = getattr(module, "module", module)
    tensors = {f"buffer {name}": value.clone() for name, value in module.named_buffers()}
    tensors |= {f"gradient {name}": value.grad for name, value in module.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **tensors}


def synchronised_step(modes, sizes, synchronised):
    rank = dist.get_rank()
    encoder = make_model(torch.float64).encoder
    if synchronised:
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    partition_layers(encoder, PartitionPolicy(mode=modes[rank], chunk_size=sizes[rank]))
    ddp = GlooDDP(encoder)
    with Collectives() as collectives:
        results = step_on(ddp, slice(0, SYNC_TILES[0]) if rank == 0 else slice(SYNC_TILES[0], None))
    return results | {"collectives": dict(collectives.counts)}


def synchronised_error(expected, by_rank):
    """The largest difference from one process, by kind of tensor, relative to the largest of the kind."""
    worst = Counter()
    for name, value in expected.items():
        kind = name.split()[0]
        if kind in ("output", "input"):
            pairs = [(torch.cat([results[name] for results in by_rank]), value)]
        else:  # DDP takes the mean over the ranks of what is summed over the tiles
            pairs = [(results[name], value / 2 if kind == "gradient" else value) for results in by_rank]
        scale = max(other.abs().max() for key, other in expected.items() if key.split()[0] == kind)
        worst[kind] = max(worst[kind], *((one - other).abs().max().item() / scale.item() for one, other in pairs))
    return worst
