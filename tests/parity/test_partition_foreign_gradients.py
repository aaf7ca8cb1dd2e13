"""Contexts, dtypes, outputs and derivatives of modules of others: exact in a partition, or refused by name."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_module_cases import (
    MODES,
    Middle,
    Net,
    assert_exact,
    build,
    every_norm,
    kinds_of_modes,
    parted,
    refusal,
    step,
    tiles,
)
from torch import nn
from torch.utils.checkpoint import checkpoint


@torch.no_grad()
def gate(x):
    return x.sigmoid()


def in_context(context, inner):
    def run(self, x):
        with context():
            y = inner(self, x)
        return x + y

    return run


def out_argument(self, x):
    y = torch.empty_like(x)
    return torch.mul(x, 2, out=y)


def gradient(self, x):
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        return x + torch.autograd.grad(z.sin().sum(), z)[0]


def teacher():
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())


CONTEXTS = {
    "no_grad": lambda: Middle(in_context(torch.no_grad, lambda self, x: x.tanh())),
    "decorated": lambda: Middle(lambda self, x: x * gate(x)),
    "set_grad_enabled": lambda: Middle(in_context(lambda: torch.set_grad_enabled(False), lambda self, x: x * x)),
    "inference_mode": lambda: Middle(lambda self, x: x * in_inference(x).clone()),
    "parameters": lambda: Middle(in_context(torch.no_grad, lambda self, x: self.part(x)), part=teacher()),
    "out": lambda: Middle(in_context(torch.no_grad, out_argument)),
    "a gradient": lambda: Middle(gradient),
    "asked": lambda: Middle(lambda self, x: x * 2 if torch.is_grad_enabled() else x),
}


def in_inference(x):
    with torch.inference_mode():
        return x.detach().mean((2, 3), keepdim=True) * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CONTEXTS)
def test_contexts_that_a_forward_enters(kind, mode):
    assert_exact("bn", mode, CONTEXTS[kind])


def test_a_norm_of_a_teacher_is_exact():
    def part():
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    for mode in MODES:
        assert_exact("bn", mode, lambda: Middle(in_context(torch.no_grad, lambda self, x: self.part(x)), part=part()))


class Island(nn.Module):
    """Full precision where others are short, and the other way round."""

    def __init__(self, **context):
        super().__init__()
        self.context, self.norm, self.conv = context, nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)

    def forward(self, x):
        with torch.autocast("cpu", **self.context):
            return self.conv(self.norm(x)).float().mean((2, 3))


@pytest.mark.parametrize("mode", ["keep", "lean", "recompute"])
@pytest.mark.parametrize("inner", [{"enabled": False}, {"dtype": torch.bfloat16}], ids=["off", "on"])
def test_autocast_within_a_forward(inner, mode):
    torch.manual_seed(0)
    plain = Island(**inner)
    net = parted(copy.deepcopy(plain), mode)
    with torch.autocast("cpu", torch.bfloat16, enabled="dtype" not in inner):
        (out, grad), (expected, expected_grad) = step(net, tiles().float()), step(plain, tiles().float())
    tolerance = 1e-5 if "enabled" in inner else 2e-2
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    assert (grad - expected_grad).abs().max() <= tolerance * expected_grad.abs().max()
    if "enabled" in inner:
        short = copy.deepcopy(plain)
        short.context = {"dtype": torch.bfloat16}
        assert (step(short, tiles().float())[0] - expected).abs().max() > 1e-3 * expected.abs().max(), (
            "the test must see it"
        )


@kinds_of_modes
@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: x + (x - x.mean(0)).bfloat16().to(x.dtype),
        lambda self, x: x.half().to(x.dtype) - x.mean(0),
        lambda self, x: x.bfloat16().softmax(0).to(x.dtype),
    ],
)
def test_mixing_beside_16_bits_is_named(run, norm, mode):
    assert "'middle' (Middle) must treat tiles independently" in refusal(norm, mode, lambda: Middle(run))


@every_norm
def test_16_bits_without_mixing_are_no_reason(norm):
    torch.manual_seed(0)
    weights = [torch.randn(8, 8, 3, 3) / 8 for _ in range(4)]

    def run(self, x):
        y = x.bfloat16()
        for weight in weights:
            y = F.group_norm(y + F.gelu(F.conv2d(y, weight.bfloat16(), padding=1)), 1)
        return y.to(x.dtype)

    plain, net = build(norm, lambda: Middle(run)), parted(build(norm, lambda: Middle(run)), "lean")
    assert (step(net, tiles())[0] - step(plain, tiles())[0]).abs().max() <= 0.05


def test_a_reentrant_checkpoint_is_refused():
    middle = lambda: Middle(lambda self, x: checkpoint(self.part, x, use_reentrant=True), part=nn.Conv2d(8, 8, 1))  # noqa: E731
    assert "must not checkpoint inside a partition, got a reentrant checkpoint" in refusal("gn", "keep", middle)


# ------------------------------------------------------------------------------------ outputs, dtypes, derivatives


class Returns(Net):
    def __init__(self, norm, how):
        super().__init__(norm, nn.Identity())
        self.how = how

    def forward(self, x):
        return self.how(super().forward(x))


@kinds_of_modes
@pytest.mark.parametrize(
    "how",
    [lambda f: (f, len(f)), lambda f: {"f": f, "n": float(f.shape[0])}, lambda f: f @ f.T, lambda f: f.to_sparse()],
    ids=["number", "dict", "gram", "sparse"],
)
def test_outputs_that_are_others_for_chunks_are_refused(how, norm, mode):
    torch.manual_seed(0)
    net = parted(Returns(norm, how).double(), mode)
    with pytest.raises(ValueError, match=r"Returns must |output of Returns must "):
        net(tiles())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, dtype=torch.complex128), nn.BatchNorm2d(8).double()

    def forward(self, x):
        x = torch.view_as_real(self.conv(x.to(torch.complex128))).movedim(-1, 2).flatten(1, 2)
        return self.norm(x).mean((2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_complex_values_have_gradients(mode):
    torch.manual_seed(0)
    plain = Complex()
    net = parted(copy.deepcopy(plain), mode)
    for one, other in zip(step(net, tiles()), step(plain, tiles()), strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()
    assert torch.allclose(net.conv.weight.grad, plain.conv.weight.grad, rtol=1e-9, atol=1e-12)


@kinds_of_modes
def test_an_embeddings_sparse_gradient(norm, mode):
    assert_exact(
        norm,
        mode,
        lambda: Middle(
            lambda self, x: x + self.held(torch.arange(8)).view(8, 1, 1), held=nn.Embedding(8, 1, sparse=True)
        ),
    )


@kinds_of_modes
def test_an_empty_bag_whose_gradient_is_wanted(norm, mode):
    net = parted(build(norm, nn.Identity), mode).eval()
    x = tiles(0).requires_grad_()
    out = net(x)
    out.sum().backward()
    assert out.shape == (0, 6)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@kinds_of_modes
def test_an_input_that_a_forward_cuts_off_has_no_gradient(norm, mode):
    class Cut(Net):
        def forward(self, x):
            return super().forward(x.detach())

    torch.manual_seed(0)
    net = parted(Cut(norm, nn.Identity()).double(), mode)
    x = tiles().requires_grad_()
    net(x).sum().backward()
    assert x.grad is None
    assert net.c1.weight.grad is not None


@kinds_of_modes
@pytest.mark.parametrize("product", [torch.autograd.functional.hvp, torch.autograd.functional.vhp])
def test_products_with_a_hessian_are_refused_and_not_zero(product, norm, mode):
    net = parted(build(norm, nn.Identity), mode)
    with pytest.raises(RuntimeError, match="must be differentiated once and in reverse, got create_graph"):
        product(lambda x: net(x).square().sum(), tiles(3), tiles(3, seed=2))


@kinds_of_modes
def test_a_second_gradient_that_may_be_unused_is_refused(norm, mode):
    net = parted(build(norm, nn.Identity), mode)
    x = tiles().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    for target in (x, net.c2.weight):
        with pytest.raises(RuntimeError, match="must be differentiated once and in reverse, got create_graph"):
            torch.autograd.grad(grad.sum(), target, allow_unused=True, retain_graph=True)


class ReadEarly(nn.Module):
    """The statistics that its norm is about to write, in the graph of a gradient."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(torch.sigmoid(x * self.norm.running_var.view(-1, 1, 1)))


@pytest.mark.parametrize("mode", ["keep", "lean", "recompute"])
def test_running_statistics_read_before_they_are_written_are_refused(mode):
    assert " must " in refusal("bn", mode, ReadEarly)


def test_no_global_generator_is_left_elsewhere():
    """The looks at a module for other numbers of tiles draw nothing."""
    net = parted(build("bn", lambda: nn.Dropout(0.3)), "lean")
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].copy()
    torch.manual_seed(1)
    first = net(tiles())
    torch.manual_seed(1)
    assert torch.equal(net(tiles()), first)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
