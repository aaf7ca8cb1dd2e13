"""Rates by layer, weight decay by kind of parameter and L2-SP, under every engine: the weights of a plain loop.

The oracle is one process in float64 on the bags of both ranks, with a parameter group made by hand for each name.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ds_wsi.models import SlideModel, build_aggregator, build_encoder
from ds_wsi.models.loss import stack_loss
from ds_wsi.stacking import stack_bags
from ds_wsi.training.parameter_groups import ENCODER, parameter_groups
from ds_wsi.training.step import bag_weight, run_micro_step
from ds_wsi.training.warmup import set_rates
from harness import run_ranks

pytestmark = pytest.mark.distributed
RATE, WEIGHT_DECAY, LAYER_DECAY, FACTOR = 1e-2, 0.5, 0.5, 0.25
PULL = 100.0  # as strong as a step
SHARES = (0.5, 1.0, 1.0, 0.25)  # of the rate, by step: a schedule
SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
# A softmax does not feel it: its gradient is rounding, which Adam makes steps of.
UNFELT = "aggregator.attention_w.bias"
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero2 json", "zero2 offload json", "zero3", "zero3 json")
PULLED = tuple(f"{engine} pulled" for engine in ("ddp", "fsdp2", "zero1", "zero2 offload json", "zero3"))
# DeepSpeed leaves its mark in the environment.
IN_ORDER = sorted((*ENGINES, *PULLED), key=lambda engine: engine.startswith("zero"))


def make_model():
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", tile_size_px=32, **SMALL)
    encoder.pos_embed.data *= 20  # so that their decay is seen
    encoder.cls_token.data += 0.5
    return SlideModel(encoder, build_aggregator("gated_abmil", 24, 2, embed="8", embed_dropout=0.0))


def by_hand(name, *, norm_layer=3):
    """(rate, decays) of a parameter."""
    free = name.endswith("bias") or "norm" in name or "cls_token" in name or "pos_embed" in name
    if name.startswith("aggregator."):
        return RATE, not free
    part = name.removeprefix("encoder.")
    layer = int(part.split(".")[1]) + 1 if part.startswith("blocks.") else norm_layer if part.startswith("norm") else 0
    return RATE * FACTOR * LAYER_DECAY ** (3 - layer), not free


def make_bag(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, 256, (2 + rank, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.tensor([rank])


def oracle(rule=by_hand, pull=0.0, coupled=False):
    model = make_model().double().train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = {name: rule(name) for name, _ in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "weight_decay": WEIGHT_DECAY if groups[name][1] else 0.0}
            for name, parameter in model.named_parameters()
        ]
    )
    for step, share in enumerate(SHARES):
        for group, (rate, _) in zip(optimizer.param_groups, groups.values(), strict=True):
            group["lr"] = share * rate
        optimizer.zero_grad()
        for rank in range(2):
            tiles, label = make_bag(step, rank)
            (F.cross_entropy(model(stack_bags([tiles])).logits, label) / 2).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("encoder."):
                from_start = pull * (parameter.detach() - start[name])
                if coupled:
                    parameter.grad += from_start
                else:
                    parameter.data -= share * groups[name][0] * from_start
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_all(engines):
    from accelerate.state import AcceleratorState, GradientState

    results = []
    for engine in engines:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        results.append(train(engine))
    return results


def train(engine):
    from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare
    from ds_wsi.engines.accelerator.pull import pull_to_start
    from ds_wsi.engines.sharded.fsdp import whole
    from ds_wsi.engines.sharded.zero import full_state_dict

    config = None
    if engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(engine[4])},
        }
        if "json" in engine:
            params = {"lr": "auto", "weight_decay": "auto", "torch_adam": "offload" not in engine}
            config["optimizer"] = {"type": "AdamW", "params": params}
        if "offload" in engine:
            params["torch_adam"] = True
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
    settings = EngineSettings(RATE, WEIGHT_DECAY, 0.0, "adamw", 1, 1, fsdp=engine.startswith("fsdp2"))
    accelerator = build_accelerator(settings, Path("unused"), config)
    module = make_model() if config else make_model().double()  # ZeRO's masters are float32
    groups = parameter_groups(module, LAYER_DECAY, no_decay_1d=True)
    model, optimizer = prepare(accelerator, module, settings, groups=groups)
    if engine.endswith("pulled"):
        pull_to_start(module, optimizer, PULL, ENCODER)
    model.train()
    for step, share in enumerate(SHARES):
        set_rates(optimizer, share * RATE, WEIGHT_DECAY, resting=False, encoder_factor=FACTOR)
        tiles, label = make_bag(step, accelerator.process_index)
        run_micro_step(
            accelerator, model, optimizer, partial(loss_of, model, stack_bags([tiles]), label), bag_weight(2, 2, 1)
        )
    weights = full_state_dict(module) if config else {name: whole(value) for name, value in module.named_parameters()}
    return {name: value.double() for name, value in weights.items()}


def loss_of(model, stack, label):
    return stack_loss(model(stack), label)


def errors(weights_now, expected):
    """The relative error of what each parameter moved by."""
    start = make_model().state_dict()
    moved = {name: value - start[name] for name, value in expected.items()}
    return {
        name: ((weights_now[name] - start[name] - step).norm() / step.norm()).item()
        for name, step in moved.items()
        if name != UNFELT
    }


def test_weights_are_those_of_a_plain_loop_with_groups_made_by_hand():
    plain, pulled = oracle(), oracle(pull=PULL)
    for results in run_ranks(train_all, 2, IN_ORDER):
        for engine, weights_now in zip(IN_ORDER, results, strict=True):
            expected = pulled if engine in PULLED else plain
            worst = max(errors(weights_now, expected).items(), key=lambda pair: pair[1])
            # In float32 a small gradient's rounding is a part of Adam's step.
            assert worst[1] < (1e-9 if engine.split()[0] in ("ddp", "fsdp2") else 2e-2), (engine, worst)


@pytest.mark.parametrize("other", [{}, {"pull": PULL, "coupled": True}, {"pull": PULL / 4}])
def test_another_pull_would_be_noticed(other):
    assert errors(oracle(**other), oracle(pull=PULL))["encoder.blocks.1.mlp.fc1.weight"] > 0.05


@pytest.mark.parametrize(
    ("rule", "seen_in"),
    [
        (lambda name: by_hand(name, norm_layer=2), "encoder.norm.weight"),  # as timm's own grouping has it
        (lambda name: (by_hand(name)[0], True), "encoder.norm.weight"),
        (lambda name: (by_hand(name)[0], by_hand(name)[1] or "pos_embed" in name), "encoder.pos_embed"),
        (
            lambda name: (RATE * FACTOR if "encoder" in name else RATE, by_hand(name)[1]),
            "encoder.blocks.1.mlp.fc1.weight",
        ),
        (lambda name: (by_hand(name)[0] / (1 if "aggr" in name else FACTOR), by_hand(name)[1]), "encoder.norm.bias"),
    ],
)
def test_other_groups_would_be_noticed(rule, seen_in):
    assert errors(oracle(rule), oracle())[seen_in] > 0.05
