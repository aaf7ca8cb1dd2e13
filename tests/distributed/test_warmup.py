"""Epochs of the aggregator alone, under every engine: the encoder rests bit for bit, then trains as if it began there.

The oracle is plain PyTorch: at first an optimizer of the aggregator's parameters only, with the encoder's features
computed without a gradient; then a fresh one of the encoder's joins it.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.stacking import stack_bags
from ds_wsi.training.step import bag_weight, run_micro_step
from ds_wsi.training.warmup import encoder_rests, forget_steps, set_rates
from harness import run_ranks

pytestmark = pytest.mark.distributed
RATE, DECAY = 1e-2, 0.1  # a decay that would be seen at once
EPOCHS, WARM, STEPS = 3, 2, 2


def make_model() -> SlideModel:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
    return SlideModel(nn.Sequential(*parts), build_aggregator("gated_abmil", 8, 2, dropout=0.0))


def make_bag(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, 256, (2 + rank, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.tensor([rank])


def weights_of(model: SlideModel) -> dict[str, torch.Tensor]:
    from ds_wsi.engines.sharded.fsdp import whole

    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def oracle(kind: str, fresh: bool = True) -> list[dict[str, torch.Tensor]]:
    """The weights after each epoch of one process on the bags of both ranks; not `fresh`: Adam counted on."""
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    model, weights = make_model().train(), []
    parts = [optimizers[kind](model.aggregator.parameters(), lr=RATE, weight_decay=DECAY)]
    for epoch in range(EPOCHS):
        rests = epoch < WARM
        model.encoder.train(not rests)
        if epoch == WARM:
            late = optimizers[kind](model.encoder.parameters(), lr=RATE, weight_decay=DECAY)
            parts.append(late)
            for parameter in model.encoder.parameters():
                zeros = torch.zeros_like(parameter), torch.zeros_like(parameter)
                steps = torch.tensor(0.0 if fresh else float(WARM * STEPS))
                late.state[parameter] = dict(zip(("step", "exp_avg", "exp_avg_sq"), (steps, *zeros), strict=True))
        for step in range(STEPS):
            for rank in range(2):
                tiles, label = make_bag(epoch * STEPS + step, rank)
                with torch.set_grad_enabled(not rests):
                    features = model.encode(tiles)
                (F.cross_entropy(model.aggregate(stack_bags([features])).logits, label) / 2).backward()
            for optimizer in parts:
                optimizer.step()
                optimizer.zero_grad()
        weights.append(weights_of(model))
    return weights


def train_cases(cases: list[tuple[str, str]]) -> list[list[dict[str, torch.Tensor]]]:
    from accelerate.state import AcceleratorState, GradientState

    runs = []
    for engine, kind in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        runs.append(_train(engine, kind))
    return runs


def _train(engine: str, kind: str) -> list[dict[str, torch.Tensor]]:
    from pathlib import Path

    from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare

    config = None
    if engine.startswith("zero"):
        params = {"lr": "auto", "weight_decay": "auto", "torch_adam": True}
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "optimizer": {"type": {"adam": "Adam", "adamw": "AdamW"}[kind], "params": params},
            "zero_optimization": {"stage": int(engine[4])},
        }
        if kind == "adam":
            params["adam_w_mode"] = False  # DeepSpeed's "Adam" is AdamW otherwise
        if engine.endswith("offload"):
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
    settings = EngineSettings(RATE, DECAY, 0.0, kind, 1, 1, fsdp=engine == "fsdp2")
    accelerator = build_accelerator(settings, Path("unused"), config)
    module = make_model()
    model, optimizer = prepare(accelerator, module, settings, apart=module.encoder)
    weights = []
    for epoch in range(EPOCHS):
        module.warming_up = encoder_rests(WARM, epoch)
        if epoch == WARM:
            forget_steps(optimizer)
        model.train()
        for step in range(STEPS):
            set_rates(optimizer, RATE, DECAY, resting=module.warming_up)
            tiles, label = make_bag(epoch * STEPS + step, accelerator.process_index)
            stack, weight = stack_bags([tiles]), bag_weight(2, accelerator.num_processes, 1)
            run_micro_step(accelerator, model, optimizer, partial(loss_of, model, stack, label), weight)
        weights.append(weights_of(module))
    return weights


def loss_of(model, stack, label):
    return stack_loss(model(stack), label)


CASES = [("ddp", "adamw"), ("fsdp2", "adamw"), ("zero2offload", "adamw"), ("zero2", "adam")]


def encoder_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("encoder.")}


def test_the_encoder_rests_bit_for_bit_and_then_trains_as_if_it_began_there():
    ranks = run_ranks(train_cases, 2, CASES)
    start, expected = weights_of(make_model()), {kind: oracle(kind) for kind in ("adam", "adamw")}
    for runs in ranks:
        for (engine, kind), epochs in zip(CASES, runs, strict=True):
            for epoch in range(WARM):
                for name, value in encoder_of(start).items():  # BatchNorm's statistics too
                    assert torch.equal(epochs[epoch][name], value), (engine, kind, epoch, name)
            for epoch in range(EPOCHS):
                for name, value in expected[kind][epoch].items():
                    if "running" in name or "tracked" in name:
                        continue  # each rank's own, until they are averaged
                    difference = (epochs[epoch][name] - value).abs().max().item()
                    # Equal here; sums over more ranks would round in another order.
                    assert difference < 1e-3 * RATE, (engine, kind, epoch, name, difference)
            moved = max((epochs[-1][name] - value).abs().max() for name, value in encoder_of(start).items())
            assert moved > RATE / 2, (engine, kind)


def test_a_count_of_steps_that_went_on_would_be_noticed():
    one, other = (encoder_of(oracle("adamw", fresh)[-1]) for fresh in (True, False))
    assert max((one[name] - other[name]).abs().max().item() for name in one) > 0.1 * RATE
