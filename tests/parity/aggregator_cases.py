"""An aggregator in float64 on one bag of a stack, and the steps that several papers share."""

import torch

from ds_wsi.models import build_aggregator
from ds_wsi.stacking import stack_bags

DIM, CLASSES = 5, 3
LABEL = 1


def build(name, **options):
    torch.manual_seed(0)
    module = build_aggregator(name, DIM, CLASSES, **{"dropout": 0.0, **options}).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def draw_bag(length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, DIM, dtype=torch.float64, generator=generator)


def run(module, bag, labelled=False):
    """The bag's part of a stack of two, the first of which is another bag."""
    stack = stack_bags([draw_bag(4, seed=2), bag])
    output = module(stack, torch.tensor([0, LABEL])) if labelled else module(stack)
    attention = None if output.attention is None else output.attention[4:]
    return output.logits[1], attention, output.auxiliary_loss[1] if labelled else None


def assert_same(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def gated(module, h):
    content = torch.tanh(linear(module.attention_v, h)) * torch.sigmoid(linear(module.attention_u, h))
    return linear(module.attention_w, content)
