"""What happens to a module between calls, and between forward and backward, and calls of odd forms."""

import copy

import pytest
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES

SHAPES = {"batch": (7, 3, 9, 9), "spatial": (2, 3, 17, 11)}
every_axis = pytest.mark.parametrize("axis", SHAPES)


class Middle(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def built(middle=None, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 4, 3, padding=1), norm(4), middle or nn.ReLU(), nn.Conv2d(4, 2, 3)
    return nn.Sequential(*parts).double()


def parted(plain, axis, mode="lean", **policy):
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode=mode, axis=axis, chunk_size=3, **policy))
    return net


def tiles(axis):
    return torch.randn(SHAPES[axis], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_axis
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("native", "paper")])
def test_freezing_between_forward_and_backward(mode, axis):
    plain = built()
    plain[3].bias.requires_grad_(False)
    net = parted(plain, axis, mode)
    for module in (net, plain):
        out = module(tiles(axis))
        module[0].requires_grad_(False)
        module[1].bias.requires_grad_(False)
        module[3].bias.requires_grad_()
        out.square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12), name


IMAGE_NORMS = {"group": lambda channels: nn.GroupNorm(2, channels), "instance": nn.InstanceNorm2d}


@pytest.mark.parametrize("norm", IMAGE_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_bags_do_not_matter_to_norms_over_images(norm, training):
    plain = built(norm=IMAGE_NORMS[norm]).train(training)
    net = parted(plain, "spatial", bn_population="bag")
    x = torch.randn(5, 3, 17, 11, dtype=torch.float64)
    for module in (net, plain):
        bags = {"cu_seqlens": torch.tensor([0, 2, 5])} if module is net else {}
        module.zero_grad()
        module.out = module(x, **bags)
        module.out.square().sum().backward()
    assert torch.allclose(net.out, plain.out, rtol=1e-9, atol=1e-12)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_several_bags_in_space_are_refused_where_a_batchnorm_takes_their_statistics():
    bags = torch.tensor([0, 2, 5])
    x = torch.randn(5, 3, 17, 11, dtype=torch.float64)
    words = r"must be called with one bag where BatchNorm takes its statistics, got 2 bags for '1' \(BatchNorm2d\)"
    with pytest.raises(ValueError, match=words):
        parted(built(), "spatial", bn_population="bag")(x, cu_seqlens=bags)
    untracked = built(norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=words):
        parted(untracked, "spatial")(x, cu_seqlens=bags)
    plain = built().eval()
    assert torch.allclose(parted(plain, "spatial", bn_population="bag")(x, cu_seqlens=bags), plain(x), rtol=1e-9)


@every_axis
def test_a_module_that_returns_its_input(axis):
    for plain in (nn.Sequential(nn.Identity()), nn.Sequential(), nn.Sequential(nn.Dropout(0.5)).eval()):
        net = parted(plain, axis)
        x = tiles(axis).requires_grad_()
        out = net(x)
        assert torch.equal(out, x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert torch.equal(gradient, 2 * x)


KEPT = {
    "tuple": (lambda x: tuple(x.shape[2:]), (9, 9), (17, 11)),
    "list": (lambda x: list(x.shape[2:]), [9, 9], [17, 11]),
    "size": (lambda x: x.shape[2:], torch.Size([9, 9]), torch.Size([17, 11])),
    "dict": (lambda x: {"h": x.shape[2]}, {"h": 9}, {"h": 17}),
    "number": (lambda x: x.shape[2], 9, 17),
}


@every_axis
@pytest.mark.parametrize("name", KEPT)
def test_a_size_that_a_forward_keeps_is_there_after_the_call(name, axis):
    read, of_tiles, of_images = KEPT[name]

    def run(self, x):
        self.hw = read(x)
        return x.tanh()

    plain = built(Middle(run))
    net = parted(plain, axis)
    for _ in range(2):
        assert torch.allclose(net(tiles(axis)), plain(tiles(axis)), rtol=1e-9)
        assert net[2].hw == (of_tiles if axis == "batch" else of_images)
        assert type(net[2].hw) is type(plain[2].hw)


def test_a_kept_size_that_is_another_in_the_next_call_is_refused_by_name():
    net = parted(built(Middle(lambda self, x: (setattr(self, "hw", x.shape[2:]), x)[1])), "spatial")
    net(tiles("spatial"))
    with pytest.raises(ValueError, match=r"'2' \(Middle\) must not change its attribute 'hw'"):
        net(tiles("spatial")[:, :, :11])
