"""What a forward asks of a tensor beside its numbers is answered as in the call, or refused by name.

What hangs on the answer changes values beyond the check's few tiles, which see no difference.
"""

import copy

import pytest
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers

MODES = ("lean", "recompute", "keep")
SHAPES = {"batch": (7, 3, 9, 9), "spatial": (2, 3, 17, 11)}
every_axis = pytest.mark.parametrize("axis", SHAPES)


class Middle(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.act = run, nn.ReLU()

    def forward(self, x):
        return self.run(self, x)


def built(run):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Middle(run), nn.Conv2d(4, 2, 3)
    return nn.Sequential(*parts).double()


def pair(run, axis, mode):
    plain = built(run)
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode=mode, axis=axis, chunk_size=3))
    return plain, net


def tiles(axis, large=1.0):
    x = torch.rand(SHAPES[axis], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[-1, 0, 4, 4] *= large
    return x


def step(net, x):
    net.zero_grad()
    x = x.clone().requires_grad_()
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in net.parameters())]


def assert_exact(run, axis, mode):
    plain, net = pair(run, axis, mode)
    for large in (1.0, 60.0):
        for one, other in zip(step(net, tiles(axis, large)), step(plain, tiles(axis, large)), strict=True):
            assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp_min(1e-3)


def when(asked):
    return lambda self, x: x.clamp(-4, 4) if asked(self, x) else x


ANSWERED = {
    "requires_grad": lambda self, x: x.requires_grad,
    "not of a comparison": lambda self, x: not (x > 0).requires_grad and x.requires_grad,
    "not of what is detached": lambda self, x: not x.detach().requires_grad and x.requires_grad,
    "not of zeros like it": lambda self, x: not torch.zeros_like(x).requires_grad,
    "not without gradients": lambda self, x: not torch.no_grad()(self.act)(x).requires_grad,
    "of a part's result": lambda self, x: self.act(x).requires_grad,
    "of several results": lambda self, x: x.max(1).values.requires_grad and not x.max(1).indices.requires_grad,
    "after a write": lambda self, x: torch.zeros_like(x).add_(x).requires_grad,
    "is_leaf": lambda self, x: not x.is_leaf,
    "grad_fn": lambda self, x: x.grad_fn is not None and x.detach().grad_fn is None,
    "gradients are on": lambda self, x: torch.is_grad_enabled(),
}


@every_axis
@pytest.mark.parametrize("name", ANSWERED)
def test_whether_autograd_follows_is_answered(name, axis):
    for mode in MODES:
        assert_exact(when(ANSWERED[name]), axis, mode)


def hooked(self, x):
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda grad: grad.clamp(-0.3, 0.3))
    return y


@every_axis
def test_a_hook_on_a_value_runs_in_its_part(axis):
    for mode in MODES:
        assert_exact(hooked, axis, mode)


def test_a_hook_on_a_value_of_the_module_s_own_forward_is_refused():
    class Own(nn.Sequential):
        def forward(self, x):
            return self[3](hooked(self, self[1](self[0](x))))

    net = Own(*built(None)).double()
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    with pytest.raises(ValueError, match="register_hook is called, which is no function of values in '' "):
        net(tiles("batch"))


@every_axis
@pytest.mark.parametrize("name", ["_version", "retains_grad", "grad", "_base"])
def test_what_else_autograd_knows_is_refused_by_name(name, axis):
    _, net = pair(lambda self, x: x if getattr(x, name) else x.clamp(-4, 4), axis, "lean")
    with pytest.raises(ValueError, match=rf"'2' \(Middle\) must not ask what autograd does .* a read of {name}"):
        net(tiles(axis))


def test_what_hangs_on_the_tiles_gradient_is_refused_where_nothing_before_is_trained():
    _, net = pair(when(lambda self, x: x.requires_grad), "batch", "lean")
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2' \(Middle\) must not ask what autograd does .* read of requires_grad"):
        net(tiles("batch"))


@every_axis
def test_where_a_value_lies_in_memory_its_part_asks_in_every_chunk(axis):
    for asked in (lambda self, x: x.data_ptr(), lambda self, x: x.untyped_storage().nbytes()):
        assert_exact(when(asked), axis, "lean")


STRIDES = {
    "is_contiguous": when(lambda self, x: x.is_contiguous()),
    "stride": when(lambda self, x: x.stride(1) == 1),
    "as_strided": lambda self, x: x.as_strided(x.size(), x.stride()),
    "view": lambda self, x: (x.view(len(x), -1) if x.is_contiguous() else x.reshape(len(x), -1)).view(x.shape),
}


@every_axis
@pytest.mark.parametrize("name", STRIDES)
def test_a_layout_that_comes_later_is_asked_anew(name, axis):
    plain, net = pair(STRIDES[name], axis, "lean")
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        x = tiles(axis, 60.0).to(memory_format=layout)
        for one, other in zip(step(net, x), step(plain, x), strict=True):
            assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp_min(1e-3)


def test_inference_mode_is_told_as_in_the_call():
    run = lambda self, x: x.clamp(-4, 4) if torch.is_inference_mode_enabled() else x  # noqa: E731
    plain, net = pair(run, "batch", "lean")
    told = torch.is_inference_mode_enabled
    for context in (torch.inference_mode, torch.no_grad):
        for large in (1.0, 60.0):
            with context():
                assert torch.allclose(net(tiles("batch", large)), plain(tiles("batch", large)), rtol=1e-9, atol=1e-12)
    assert torch.is_inference_mode_enabled is told


@pytest.mark.parametrize("asked", ["requires_grad", "grad_fn", "is_leaf", "gradients are on"])
def test_a_module_without_graph_that_does_another_thing_without_gradients_is_refused(asked):
    torch.manual_seed(0)
    middle = Middle(when(ANSWERED[asked]))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), middle, nn.Conv2d(4, 2, 3)).double()
    for mode in MODES:
        net = copy.deepcopy(plain)
        partition_layers(net, PartitionPolicy(mode=mode, chunk_size=3))
        if mode == "keep":
            for one, other in zip(step(net, tiles("batch", 60.0)), step(plain, tiles("batch", 60.0)), strict=True):
                assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp_min(1e-3)
            continue
        for count in (2, 7):  # one chunk, and several
            with pytest.raises(ValueError, match=r"'2' \(Middle\) must do the same with and without gradients"):
                net(tiles("batch")[:count])
        with torch.no_grad():
            assert torch.allclose(net(tiles("batch", 60.0)), plain(tiles("batch", 60.0)), rtol=1e-9)


def test_a_hook_on_a_value_is_no_other_operation():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), Middle(hooked), nn.Conv2d(4, 2, 3)
    ).double()
    for mode in MODES:
        net = copy.deepcopy(plain)
        partition_layers(net, PartitionPolicy(mode=mode, chunk_size=3))
        for one, other in zip(step(net, tiles("batch")), step(plain, tiles("batch")), strict=True):
            assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp_min(1e-3)


def test_what_stands_beside_the_tiles_is_asked():
    """It requires no gradient, and a forward may ask whether it does."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, mask):
            y = self.norm(self.conv(x))
            return y if mask.requires_grad or not mask.is_leaf else y * mask

    torch.manual_seed(0)
    plain, x, mask = Masked().double(), tiles("batch"), torch.rand(1, 4, 1, 1, dtype=torch.float64)
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    torch.testing.assert_close(net(x, mask), plain(x, mask), rtol=0, atol=1e-12)
