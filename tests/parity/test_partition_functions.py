"""An autograd.Function in a forward: its own backward runs, whoever applies it, or it is refused by name.

Every backward here differs from its forward's derivative where the values, or the gradients, are large: the check's few
tiles are small, and see no difference.
"""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.graph.functions import applied_functions

SHAPES = {"batch": (7, 3, 9, 9), "spatial": (2, 3, 17, 11)}
NORMS = {"bn": nn.BatchNorm2d, "gn": lambda channels: nn.GroupNorm(2, channels)}
LARGE = 60.0  # of one pixel in the second call
every_axis = pytest.mark.parametrize("axis", SHAPES)


class Straight(torch.autograd.Function):
    """A quantiser's clamp: gradient goes straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-4, 4)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Clipped(torch.autograd.Function):
    """The identity, whose gradients are clipped."""

    @staticmethod
    def forward(x, bound):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.bound, ctx.bound), None


class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            return Straight.apply(x).detach() * 1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


class Itself(torch.autograd.Function):
    """Returns what it is given."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


class Holding(torch.autograd.Function):
    """Is given a module."""

    @staticmethod
    def forward(ctx, x, part):
        return x * part.gain

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1), None


class Middle(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.gain = run, 0.5
        self.kept = Straight.apply  # bound before anybody looks

    def forward(self, x):
        return self.run(self, x)


class Net(nn.Module):
    """A statement between a norm and a convolution: in a sub-module, or in the module's own forward."""

    def __init__(self, norm, run, inside):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 4, 3, padding=1), NORMS[norm](4)
        self.middle = Middle(run)
        self.c2 = nn.Conv2d(4, 2, 3)
        self.inside = inside

    def forward(self, x):
        x = self.n1(self.c1(x))
        return self.c2(self.middle(x) if self.inside else self.middle.run(self.middle, x))


APPLIED = {
    "straight": lambda self, x: Straight.apply(x),
    "clipped": lambda self, x: Clipped.apply(x, 0.3),
    "nested": lambda self, x: Nested.apply(x),
    "without gradient": lambda self, x: x * torch.no_grad()(Nested.apply)(x),
}


def pair(run, axis, mode="lean", norm="bn", inside=True):
    torch.manual_seed(0)
    plain = Net(norm, run, inside).double()
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode=mode, axis=axis, chunk_size=3))
    return plain, net


def gradients(net, x):
    net.zero_grad()
    x = x.clone().requires_grad_()
    net(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in net.parameters())]


def assert_second_call_exact(plain, net, axis):
    for large in (1.0, LARGE):
        x = torch.rand(SHAPES[axis], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x[-1, 0, 4, 4] *= large
        expected = gradients(plain, x)
        scale = max(grad.abs().max() for grad in expected)
        for one, other in zip(gradients(net, x), expected, strict=True):
            assert (one - other).abs().max() <= 1e-9 * scale


@every_axis
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inside", [True, False], ids=["in a part", "in the module"])
@pytest.mark.parametrize("name", APPLIED)
def test_its_backward_runs(name, inside, norm, axis):
    for mode in ("lean", "recompute", "keep"):
        assert_second_call_exact(*pair(APPLIED[name], axis, mode, norm, inside), axis)


@every_axis
def test_one_whose_apply_was_kept_stays_whole_with_its_part(axis):
    assert_second_call_exact(*pair(lambda self, x: self.kept(x), axis), axis)


@every_axis
@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda self, x: self.kept(x), "an autograd.Function is called, whose backward is its own"),
        (lambda self, x: Itself.apply(x * 1), "Itself, an autograd.Function, works in place"),
        (lambda self, x: Holding.apply(x, self), "Holding, an autograd.Function, is given more than tensors"),
    ],
    ids=["kept", "in place", "given a module"],
)
def test_what_is_no_function_of_tensors_is_exact_in_a_part_and_refused_by_name_in_the_module(run, words, axis):
    assert_second_call_exact(*pair(run, axis), axis)
    _, net = pair(run, axis, inside=False)
    with pytest.raises(ValueError, match=words):
        net(torch.rand(SHAPES[axis], dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_is_what_it_calls_across_batchnorm(reentrant):
    def run(self, x):
        def part(y):
            with torch.no_grad():
                scale = y.tanh()
            return Straight.apply(y) * scale

        return checkpoint(part, x, use_reentrant=reentrant)

    assert_second_call_exact(*pair(run, "batch", inside=False), "batch")


def test_a_library_s_operation_keeps_its_own_backward():
    @torch.library.custom_op("ds_wsi_tests::clamped", mutates_args=())
    def clamped(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-4, 4)

    clamped.register_fake(torch.empty_like)
    clamped.register_autograd(lambda ctx, grad: grad)
    for inside in (True, False):
        assert_second_call_exact(*pair(lambda self, x: clamped(x), "batch", inside=inside), "batch")


def test_torch_s_own_apply_is_put_back():
    before = torch.autograd.Function.__dict__["apply"]
    _, net = pair(APPLIED["straight"], "batch")
    net(torch.rand(SHAPES["batch"], dtype=torch.float64))
    assert torch.autograd.Function.__dict__["apply"] is before


def test_a_function_that_was_bound_while_recorded_is_its_own_afterwards():
    """A module that a forward imports has `op = Fn.apply`."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 7

    with applied_functions(lambda *_: "recorded"):
        op = Twice.apply
        assert op(torch.ones(1)) == "recorded"
    x = torch.ones(1, requires_grad=True)
    op(x).backward()
    assert x.grad.item() == 7
