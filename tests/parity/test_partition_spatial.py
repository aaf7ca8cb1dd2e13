"""One large image in blocks of rows equals the image at once: random stacks of layers, partitions and modes."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn
from torch.nn import functional as F

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES

TOLERANCE = 1e-10  # relative, in float64: sums over blocks round differently from sums over images

FLOOR = 1e-2  # what is smaller is compared absolutely: some gradients are zero but for rounding


class Residual(nn.Module):
    def __init__(self, body, shortcut):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        out = self.body(x)
        out += self.shortcut(x)
        return out


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        # Not by permuting: torch 2.15's own batch_norm has wrong gradients on a CPU for one image whose gradient lies
        # in another layout than the image, and then the plain module is the one that is wrong.
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) / (var + self.eps).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]


@st.composite
def convolutions(draw, channels_in, channels_out, same=False):
    kernel, dilation = (draw(st.integers(1, 5)) for _ in range(2)) if not same else (draw(st.sampled_from((1, 3))), 1)
    dilation = min(dilation, 3)
    groups = draw(st.sampled_from((1, 2)))
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    if same:
        padding, stride = draw(st.sampled_from(((kernel - 1) // 2, "same"))), 1
    else:
        limit = 2 if mode != "zeros" else 4
        padding, stride = draw(st.integers(0, limit)), draw(st.integers(1, 3))
    return nn.Conv2d(
        channels_in,
        channels_out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


@st.composite
def norms(draw, channels):
    kind = draw(st.sampled_from(("batch", "batch", "batch_plain", "cumulative", "group", "instance", "layer", "none")))
    return {
        "batch": lambda: nn.BatchNorm2d(channels),
        "batch_plain": lambda: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
        "cumulative": lambda: nn.BatchNorm2d(channels, momentum=None),
        "group": lambda: nn.GroupNorm(2, channels),
        "instance": lambda: nn.InstanceNorm2d(
            channels, affine=draw(st.booleans()), track_running_stats=draw(st.booleans())
        ),
        "layer": lambda: LayerNorm2d(channels),
        "none": nn.Identity,
    }[kind]()


@st.composite
def pools(draw):
    kernel = draw(st.integers(1, 4))
    options = {
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, kernel // 2)),
        "ceil_mode": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return nn.MaxPool2d(kernel, dilation=draw(st.integers(1, 2)), **options)
    return nn.AvgPool2d(kernel, count_include_pad=draw(st.booleans()), **options)


@st.composite
def stacks(draw):
    """A module on images of 4 channels, and whether its head needs the whole image."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("conv", "conv", "residual", "pool", "point")))
        if kind == "conv":
            layers += [draw(convolutions(4, 4)), draw(norms(4)), nn.ReLU(inplace=draw(st.booleans()))]
        elif kind == "residual":
            body = nn.Sequential(
                draw(convolutions(4, 4, same=True)),
                draw(norms(4)),
                nn.SiLU(),
                draw(convolutions(4, 4, same=True)),
                draw(norms(4)),
            )
            shortcut = nn.Identity() if draw(st.booleans()) else nn.Sequential(nn.Conv2d(4, 4, 1), draw(norms(4)))
            layers += [Residual(body, shortcut), nn.ReLU(inplace=True)]
        elif kind == "pool":
            layers.append(draw(pools()))
        else:
            layers += [draw(norms(4)), nn.GELU()]
    if draw(st.booleans()):
        layers += [nn.AdaptiveAvgPool2d(draw(st.integers(1, 2))), nn.Flatten(), nn.LazyLinear(3)]
    return nn.Sequential(*layers)


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max().clamp_min(FLOOR)).item() if one.numel() else 0.0


def step(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    # Squared with weights: a plain sum after a norm has a gradient of zero.
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    ((out + weights).square() * weights).sum().backward()
    return out.detach(), x.grad


def assert_same_step(plain, partitioned, x):
    expected, results = step(plain, x), step(partitioned, x)
    for name, one, other in zip(("output", "input gradient"), results, expected, strict=True):
        assert relative(one, other) <= TOLERANCE, name
    scale = max([FLOOR, *(parameter.grad.abs().max() for parameter in plain.parameters())])
    for (name, other), one in zip(plain.named_parameters(), partitioned.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= TOLERANCE * scale, name
    for (name, other), one in zip(plain.named_buffers(), partitioned.buffers(), strict=True):
        assert relative(one.double(), other.double()) <= TOLERANCE, name


@settings(
    max_examples=520,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=(Phase.generate,),
    report_multiple_bugs=True,
)
@given(
    module=stacks(),
    mode=st.sampled_from(MODES),
    train=st.booleans(),
    batch=st.integers(1, 2),
    height=st.integers(9, 40),
    width=st.integers(9, 14),
    chunk=st.integers(1, 12),
)
def test_a_random_stack_in_random_blocks_equals_the_whole(module, mode, train, batch, height, width, chunk):
    torch.manual_seed(0)
    x = torch.randn(batch, 4, height, width, dtype=torch.float64)
    module = module.double().train(train)
    try:
        finite = module(x).isfinite().all()
    except (RuntimeError, ValueError):
        finite = False
    assume(finite)  # it shrinks the image to nothing, to one value per channel, or pools padding alone
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            part.reset_running_stats()
            part.running_mean.normal_()
    plain = copy.deepcopy(module)
    partition_layers(module, PartitionPolicy(mode=mode, axis="spatial", chunk_size=chunk))
    assert_same_step(plain, module, x)


def test_what_rows_cannot_be_cut_through_is_refused_by_name():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    partition_layers(module, PartitionPolicy(mode="lean", axis="spatial"))
    with pytest.raises(ValueError, match=r"got 0 \(AdaptiveAvgPool2d\): it is not known to work on rows"):
        module(torch.randn(1, 4, 16, 16))


def test_a_block_that_reads_only_padding_still_corrects_the_norm_before_it():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, padding=4), nn.BatchNorm2d(4)
    ).double()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode="recompute", axis="spatial", chunk_size=3))
    assert_same_step(plain, partitioned, torch.randn(1, 4, 9, 9, dtype=torch.float64))


class Positioned(nn.Module):
    """A map of positions by row is added to the images."""

    def __init__(self, shape):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.position = nn.Parameter(torch.randn(shape))
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)) + self.position)


@pytest.mark.parametrize("shape", [(1, 4, 20, 20), (4, 20, 1), (20, 20), (1, 4, 1, 20), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("mode", ["lean", "recompute", "keep", "checkpoint"])
def test_a_parameter_with_rows_of_its_own(mode, shape):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Positioned(shape)).double()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, axis="spatial", chunk_size=3))
    assert_same_step(plain, partitioned, torch.randn(1, 3, 20, 20, dtype=torch.float64))


def test_a_layer_norm_over_whole_images_in_a_class_of_another_name():
    class WholeNorm2d(nn.LayerNorm):
        pass

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), WholeNorm2d([4, 20, 20]), nn.Conv2d(4, 4, 1)).double()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode="lean", axis="spatial", chunk_size=3))
    assert_same_step(plain, partitioned, torch.randn(1, 3, 20, 20, dtype=torch.float64))


class Padded(nn.Module):
    def forward(self, x):
        return F.pad(x, (1, 1, 2, 0))


class Computed(nn.Module):
    """A convolution whose weight no layer holds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight * 2, padding=1)


WITHOUT_A_RULE = {
    "convolution": lambda: Conv2dSame(4, 4, 3, stride=2),
    "maximum": lambda: MaxPool2dSame(3, 2),
    "mean": lambda: AvgPool2dSame(3, 2),
    "padding": Padded,
    "computed weight": Computed,
}


@pytest.mark.parametrize("layer", WITHOUT_A_RULE)
def test_a_layer_whose_rows_follow_no_rule_gets_the_whole_image(layer):
    torch.manual_seed(0)
    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(1, 4)):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, WITHOUT_A_RULE[layer](), nn.Conv2d(4, 4, 1)).double()
        partitioned = copy.deepcopy(plain)
        partition_layers(partitioned, PartitionPolicy(mode="lean", axis="spatial", chunk_size=3))
        assert_same_step(plain, partitioned, torch.randn(1, 3, 21, 12, dtype=torch.float64))


def told(layer, **attributes):
    """The layer with attributes that were set after its construction."""
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


FORMS = {
    "pool list": lambda kind: kind([3, 2]),
    "pool tuple of one": lambda kind: kind((2,)),
    "pool list of one": lambda kind: kind([2], [1], (1,)),
    "pool lists": lambda kind: kind([3, 3], [2, 1], [1, 0], ceil_mode=True),
    "pool stride later": lambda kind: told(kind(3), stride=None),
    "pool empty stride": lambda kind: kind([3, 2], ()),
    "pool padding later": lambda kind: told(kind(3), stride=(1,), padding=[1, 1]),
}
POOLS = {"maximum": nn.MaxPool2d, "mean": nn.AvgPool2d}
LAYERS = {f"{name}, {form}": (lambda k=kind, f=form: FORMS[f](k)) for name, kind in POOLS.items() for form in FORMS} | {
    "mean over what is inside": lambda: nn.AvgPool2d([3, 2], 2, [1, 1], count_include_pad=False),
    "mean with a divisor": lambda: nn.AvgPool2d((3,), [2], divisor_override=2),
    "maximum, dilated": lambda: nn.MaxPool2d([2], 1, dilation=(2,)),
    "conv lists": lambda: nn.Conv2d(4, 4, [3, 1], stride=[2, 1], padding=[1, 0]),
    "conv tuples of one": lambda: nn.Conv2d(4, 4, 3, stride=(2,), padding=(1,), dilation=(2,)),
    "conv numbers later": lambda: told(nn.Conv2d(4, 4, 3), stride=2, padding=1, dilation=2),
    "conv word later": lambda: told(nn.Conv2d(4, 4, 3), padding="same"),
    "conv number for a word": lambda: told(nn.Conv2d(4, 4, 3, padding="same"), padding=0),
    # Other modes pad by what the constructor was given, whatever `padding` says since.
    "conv reflects as built": lambda: told(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), padding=(2, 2)),
    "conv reflects later": lambda: told(nn.Conv2d(4, 4, 3, padding=1), padding_mode="reflect"),
    "conv with zeros later": lambda: told(nn.Conv2d(4, 4, 3, padding_mode="circular"), padding_mode="zeros", padding=2),
    "conv of another kernel": lambda: told(
        nn.Conv2d(4, 4, 3, padding=2), weight=nn.Parameter(torch.randn(4, 4, 5, 5)), kernel_size=(7, 7)
    ),
    "GroupNorm without beta": lambda: nn.GroupNorm(2, 4, bias=False),
    "GroupNorm without gamma": lambda: told(nn.GroupNorm(2, 4), weight=None, bias=nn.Parameter(torch.randn(4))),
    "InstanceNorm without beta": lambda: nn.InstanceNorm2d(4, affine=True, bias=False),
    "InstanceNorm without gamma": lambda: told(
        nn.InstanceNorm2d(4, affine=True), weight=None, bias=nn.Parameter(torch.randn(4))
    ),
    "BatchNorm without beta": lambda: nn.BatchNorm2d(4, bias=False),
    "BatchNorm without gamma": lambda: told(nn.BatchNorm2d(4), weight=None, bias=nn.Parameter(torch.randn(4))),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_read_in_every_form_that_torch_takes(layer):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), LAYERS[layer](), nn.Conv2d(4, 4, 3, padding=1)).double()
    for mode in ("lean", "recompute"):
        partitioned = copy.deepcopy(plain)
        partition_layers(partitioned, PartitionPolicy(mode=mode, axis="spatial", chunk_size=3), check=False)
        plain.zero_grad()
        assert_same_step(copy.deepcopy(plain), partitioned, torch.randn(1, 3, 20, 15, dtype=torch.float64))


def test_a_weight_of_another_kernel_in_the_place_of_one_reads_other_rows():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=2)).double()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode="lean", axis="spatial", chunk_size=3))
    x = torch.randn(1, 3, 20, 15, dtype=torch.float64)
    assert_same_step(plain, partitioned, x)
    weight = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for module in (plain, partitioned):
        module.zero_grad()
        module[2].weight = nn.Parameter(weight.clone())
    assert_same_step(plain, partitioned, x)
