"""One step of the paper's partition beside the plain module's, and what the tests of it share."""

import copy

import torch
from torch import nn

from ds_wsi.partition.execution.paper import apply_paper

CPU = torch.device("cpu")
INPUTS = {"batch": ((7, 3, 32, 32), 3), "spatial": ((1, 3, 75, 64), 5)}


def close(actual, expected, what):
    scale = max(float(expected.abs().max()), 1e-30)
    error = float((actual - expected).abs().max()) / scale
    assert actual.shape == expected.shape
    assert error < 1e-10, f"{what}: relative error {error:.1e}"


def run(module, x):
    """The output and everything that a training step reads or changes, by name."""
    x = x.clone().requires_grad_()
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weights + out.square()).sum().backward()
    results = {"output": out.detach(), "input gradient": x.grad}
    results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return results | {f"buffer {name}": buffer for name, buffer in module.named_buffers()}


def check(module, x, axis, chunk, stop_bytes=0):
    plain, big = copy.deepcopy(module), copy.deepcopy(module)
    undo = apply_paper(big, device=CPU, axis=axis, chunk=chunk, stop_bytes=stop_bytes)
    expected, actual = run(plain, x), run(big, x)
    undo()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name].double(), value.double(), name)


def lively(module):
    """Statistics and affine maps that a confusion would show."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low in (
                (part.weight, 0.5),
                (part.bias, -0.5),
                (part.running_var, 0.5),
                (part.running_mean, -0.5),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, low + 1)
    return module.double()
