"""Two optimizer steps under each engine, against plain PyTorch."""

import os
from collections.abc import Callable
from typing import Any

from ds_wsi.doctor.apart import ApartError, finding_apart
from ds_wsi.doctor.device import device_count
from ds_wsi.doctor.finding import FAIL, PASS, Finding
from ds_wsi.doctor.ranks import join_ranks

# Engine of `ds_wsi.engines.accelerator.stepper` -> what serves where it does not work.
INSTEAD = {
    "ddp": 'pip install --force-reinstall accelerate; one process trains without it: "ds-wsi train" without a launcher',
    "zero0": "train without --deepspeed: DDP; or install the DeepSpeed of ds-wsi env's bounds",
    "zero1": "train without --deepspeed: DDP; or with stage 0",
    "zero2": "train without --deepspeed: DDP; or with stage 1",
    "zero3": "train with ZeRO stage 2, or with --fsdp, which shards parameters too",
    "fsdp2": "train without --fsdp: DDP, or ZeRO stage 3, which shards parameters too",
}
ENGINE_S = 60
STEPS, N_TILES, TILE_PX = 2, 8, 16
RATE = 0.05
BOUND = 1e-5  # of float32 weights after two steps: sums in another order


def engine_check(engine: str) -> Callable[[], Finding]:
    """The check of an engine: two ranks on a CPU and on several GPUs, one on a single GPU."""

    def check() -> Finding:
        try:
            n_gpus = device_count()
        except ApartError as error:
            return Finding(FAIL, str(error), "see the device")
        n_ranks = 1 if n_gpus == 1 else 2
        return finding_apart(
            *(two_steps, engine, n_gpus > 0), n_ranks=n_ranks, timeout_s=ENGINE_S, remedy=INSTEAD[engine]
        )

    return check


def two_steps(engine: str, on_gpu: bool) -> Finding:
    """Train a tiny model for two steps on a bag of eight tiles per rank. In processes of its own.

    Args:
        engine: one of `INSTEAD`.
        on_gpu: whether rank r computes on GPU r.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # its rounding is more than the bound
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        from ds_wsi.engines.machine.cpu import skip_shm_op

        skip_shm_op()
    join_ranks("nccl" if on_gpu else "gloo")
    try:
        expected = _plain(device, dist.get_world_size())
        weights = _under(engine, device, dist.get_rank())
    finally:
        dist.destroy_process_group()
    error = max(float((weights[name] - value).abs().max()) for name, value in expected.items())
    if not error <= BOUND:
        return Finding(FAIL, f"weights after {STEPS} steps are {error:.1e} from plain PyTorch's", INSTEAD[engine])
    words = f"{STEPS} steps, {os.environ['WORLD_SIZE']} ranks" if os.environ["WORLD_SIZE"] != "1" else f"{STEPS} steps"
    return Finding(PASS, f"{words}, weights at most {error:.1g} from plain PyTorch's")


def _under(engine: str, device: Any, rank: int) -> dict[str, Any]:
    """The weights after the steps of an engine."""
    from ds_wsi.engines.accelerator.stepper import Stepper

    stepper = Stepper(engine, _model().to(device), "sgd", RATE)
    for step in range(STEPS):
        stepper.backward(_loss(stepper.model, rank, step, device))
        stepper.step()
    return stepper.parameters()


def _plain(device: Any, n_ranks: int) -> dict[str, Any]:
    """The weights after the same steps on all ranks' bags, without an engine."""
    import torch

    model = _model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        for rank in range(n_ranks):
            (_loss(model, rank, step, device) / n_ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _model() -> Any:
    import torch
    from torch import nn

    from ds_wsi.models import SlideModel, build_aggregator

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return SlideModel(encoder, build_aggregator("gated_abmil", 8, 2, dropout=0.0)).float().train()


def _loss(model: Any, rank: int, step: int, device: Any) -> Any:
    """Cross-entropy of a rank's bag, whose tiles are the same in every process."""
    import torch
    import torch.nn.functional as F

    from ds_wsi.stacking.stacked_bags import stack_bags

    generator = torch.Generator().manual_seed(1000 * step + rank)
    tiles = torch.randn(N_TILES, 3, TILE_PX, TILE_PX, generator=generator).to(device)
    label = torch.tensor([(rank + step) % 2], device=device)
    return F.cross_entropy(model(stack_bags([tiles])).logits, label)
