"""What the paper's partition reads of a layer and when, and how its module is called."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from paper_cases import INPUTS, close, lively, run
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.execution import paper


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """A convolution that no norm hides, and one in the place of every kind of layer."""

    def __init__(self, conv=None, norm=None):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), norm or nn.BatchNorm2d(4)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2, 1)
        self.conv, self.last = conv or nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x, scale=1.0):
        return self.last(self.conv(self.pool(self.act(self.norm(self.stem(x)))))) * scale


class Named(Net):
    def forward(self, x):
        x = self.pool(input=self.act(input=self.norm(input=self.stem(input=x))))
        return self.last(input=self.conv(input=x))


def paired(axis, net=Net, **layers):
    """The module alone, and in mode "paper"."""
    plain = lively(net(**layers))
    parted = copy.deepcopy(plain)
    return plain, parted, partition_layers(parted, PartitionPolicy(mode="paper", axis=axis, chunk_size=2))


def images(axis):
    return torch.randn((7, 3, 9, 9) if axis == "batch" else (2, 3, 17, 11), dtype=torch.float64)


def same(plain, parted, x):
    for module in (plain, parted):
        module.zero_grad()
    expected, actual = run(plain, x), run(parted, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name].double(), value.double(), name)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module)), "save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("axis", INPUTS)
def test_a_copy_computes_with_layers_of_its_own(axis, how):
    plain, parted, handle = paired(axis)
    x = images(axis)
    same(plain, parted, x)
    averages = [COPIES[how](module) for module in (plain, parted)]  # as of weights in training
    with torch.no_grad():
        for module in averages:
            for parameter in module.parameters():
                parameter.mul_(1.5)
    same(*averages, x)
    same(plain, parted, x)  # the statistics of each are its own
    for module in averages:
        module.eval()
        module.conv.stride = (2, 2)
    same(*averages, x)
    handle.remove()
    same(plain, parted, x)
    same(*averages, x)
    assert all("forward" in part.__dict__ for part in (averages[1], averages[1].conv))


CHANGES = {
    "dilated as for segmentation": ("conv", {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)}),
    "one number for both": ("conv", {"stride": 2, "dilation": 1, "padding": 0}),
    "a tuple of one": ("conv", {"stride": (2,), "padding": (2,)}),
    "a list": ("conv", {"stride": [2, 1], "padding": [0, 2]}),
    "same": ("conv", {"padding": "same"}),
    "valid": ("conv", {"padding": "valid"}),
    "no bias": ("conv", {"bias": None}),
    "another kernel": ("conv", {"weight": nn.Parameter(torch.linspace(-1, 1, 400).view(4, 4, 5, 5).double())}),
    "a kernel that nobody reads": ("conv", {"kernel_size": (7, 7)}),
    "groups": ("conv", {"groups": 2, "weight": nn.Parameter(torch.linspace(-1, 1, 72).view(4, 2, 3, 3).double())}),
    "eps": ("norm", {"eps": 0.5}),
    "cumulative": ("norm", {"momentum": None}),
    "no gamma": ("norm", {"weight": None}),
    "no tracking": ("norm", {"track_running_stats": False}),
    "pool": ("pool", {"kernel_size": [3, 2], "stride": 2}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("axis", INPUTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_layer_is_told_is_read_at_the_call(when, axis, change):
    layer, told = CHANGES[change]

    def tell(module):
        for name, value in told.items():
            setattr(module.get_submodule(layer), name, copy.deepcopy(value))

    plain, parted, handle = paired(axis)
    if when == "before":
        handle.remove()
        tell(parted)
        partition_layers(parted, PartitionPolicy(mode="paper", axis=axis, chunk_size=2))
    else:
        same(plain, parted, images(axis))
        tell(parted)
    tell(plain)
    same(plain, parted, images(axis))


@pytest.mark.parametrize("axis", INPUTS)
def test_backward_is_of_what_forward_read(axis):
    plain, parted, _ = paired(axis)
    gradients = []
    x = images(axis)
    for module in (plain, parted):
        out = module(x)
        module.conv.stride, module.conv.padding, module.norm.eps = (2, 2), (0, 0), 0.5
        out.square().sum().backward()
        gradients.append(module.stem.weight.grad)
    close(gradients[1], gradients[0], "gradient")


def of_others():
    """Layers of others whose classes have the names of torch's."""

    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class BatchNorm2d(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class _BatchNorm(BatchNorm2d):
        pass

    return {
        "conv": Conv2d(4, 4, 3, padding=1),
        "conv's own step": Standardized(4, 4, 3, padding=1),
        "norm": BatchNorm2d(4),
        "norm's child": _BatchNorm(4),
    }


@pytest.mark.parametrize("kind", of_others())
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_of_others_is_refused_whatever_its_class_is_called(kind, when):
    layer = of_others()[kind]
    layer_name = kind.split("'")[0]
    words = rf"must have the forward of torch's .* got {type(layer).__name__} \(layer {layer_name}\).*HINT"
    if when == "before":
        with pytest.raises(ValueError, match=words):
            paired("batch", **{layer_name: layer})
        return
    _, parted, _ = paired("batch")
    parted.get_submodule(layer_name).__class__ = type(layer)
    with pytest.raises(ValueError, match=words):
        parted(images("batch"))


def test_another_padding_mode_is_refused_when_it_comes_later():
    _, parted, _ = paired("spatial")
    parted.conv.padding_mode = "circular"
    with pytest.raises(ValueError, match=r"padding_mode must .* got 'circular' \(layer conv\)"):
        parted(images("spatial"))


class Told(nn.BatchNorm2d):
    """Holds what its owner calls."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act, self.drop = nn.SiLU(), nn.Hardtanh(-0.5, 0.5)


@pytest.mark.parametrize("axis", INPUTS)
def test_an_activation_that_a_norm_holds_is_its_owners_to_call(axis):
    plain, parted, _ = paired(axis, norm=Told(4))
    same(plain, parted, images(axis))
    for module in (plain, parted):
        module.eval()
    same(plain, parted, images(axis))


def test_computed_weights_are_computed_once_a_call():
    plain, parted, _ = paired("batch")
    for module in (plain, parted):
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(module.conv)  # each call is one step of a power iteration
        nn.utils.parametrizations.weight_norm(module.stem)
    for _ in range(2):
        same(plain, parted, images("batch"))


# ---------------------------------------------------------------------------------------------- how it is called


@pytest.mark.parametrize("axis", INPUTS)
@pytest.mark.parametrize(
    "call",
    [
        lambda module, x: module(x=x),
        lambda module, x: module(x, 2.0),
        lambda module, x: module(scale=2.0, x=x),
        lambda module, x: torch.compile(nn.Sequential(module, nn.Tanh()), backend="eager")(x),
        lambda module, x: torch.compile(module, backend="eager")(x),
        lambda module, x: module(x[:0]),
    ],
    ids=["keyword", "scale", "keywords", "compiled caller", "compiled", "empty"],
)
def test_it_is_called_as_the_module_alone(call, axis):
    plain, parted, _ = paired(axis)
    x = images(axis)
    assert inspect.signature(parted.forward) == inspect.signature(plain.forward)
    assert inspect.signature(parted.conv.forward) == inspect.signature(plain.conv.forward)
    expected, actual = call(plain, x), call(parted, x)
    if expected.numel():
        close(actual, expected, "output")
    for out in (expected, actual):
        out.square().sum().backward()
    for (name, one), other in zip(parted.named_parameters(), plain.parameters(), strict=True):
        if expected.numel():
            close(one.grad, other.grad, name)


@pytest.mark.parametrize("axis", INPUTS)
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda module, x: module([x]), ValueError, r"tiles of a partitioned Net must be a tensor .* got a list"),
        (lambda module, x: module(x, cu_seqlens=torch.tensor([0, 2])), ValueError, r"got cu_seqlens \(Net\).*HINT"),
        (lambda module, x: module(x, prepare=abs), ValueError, r"got prepare \(Net\).*HINT"),
        (lambda module, x: module(y=x), TypeError, "missing a required argument: 'x'"),
        (
            lambda module, x: torch.autograd.grad(
                torch.autograd.grad(module(x).square().sum(), x, create_graph=True)[0].sum(), x
            ),
            RuntimeError,
            "differentiated once and in reverse, got create_graph",
        ),
        (
            lambda module, x: torch.func.grad(lambda y: module(y).sum())(x.detach()),
            RuntimeError,
            "once and in reverse, got a transform of torch.func",
        ),
        (lambda module, x: torch.func.jvp(module, (x,), (x,)), RuntimeError, "once and in reverse, got"),
        (lambda module, x: torch.vmap(module, randomness="same")(x[None]), RuntimeError, "once and in reverse, got"),
        (
            lambda module, x: torch.autograd.grad(y := module(x), x, torch.stack([y, y]), is_grads_batched=True),
            RuntimeError,
            "got several gradients at once",
        ),
    ],
    ids=["list", "bounds", "prepare", "name", "create_graph", "grad", "jvp", "vmap", "batched"],
)
def test_what_it_cannot_be_asked_is_said_in_the_words_of_the_other_modes(call, error, words, axis):
    _, parted, _ = paired(axis)
    with pytest.raises(error, match=words):
        call(parted, images(axis).requires_grad_())


@pytest.mark.parametrize("axis", INPUTS)
def test_layers_that_are_given_their_input_by_name(axis):
    plain, parted, _ = paired(axis, Named)
    same(plain, parted, images(axis))


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(3), nn.ReLU])
def test_a_layer_alone_and_a_wrapped_module_get_their_forwards_back(layer):
    plain = layer().double()
    parted = copy.deepcopy(plain)
    x = images("batch")
    handle = partition_layers(parted, PartitionPolicy(mode="paper", chunk_size=2))
    with pytest.raises(ValueError, match="must not be partitioned twice"):
        partition_layers(parted, PartitionPolicy(mode="paper", chunk_size=2))
    same(plain, parted, x)
    handle.remove()
    assert "forward" not in parted.__dict__

    whole = nn.Sequential(parted)
    below = whole.forward = lambda x: whole[0](x) * 2
    handle = partition_layers(whole, PartitionPolicy(mode="paper", chunk_size=2))
    close(whole(x), plain(x) * 2, "output")
    handle.remove()
    assert whole.__dict__["forward"] is below


def test_norms_that_ranks_share_are_refused(monkeypatch):
    """Each rank would normalise alone, and a rank whose maps are small would wait for the others for ever."""
    shared = {nn.BatchNorm2d: "the ranks"}
    monkeypatch.setattr(paper, "population_group", lambda leaf, in_training: shared.get(type(leaf)))
    with pytest.raises(ValueError, match=r'of one process in mode "paper", got BatchNorm2d that is shared among ranks'):
        partition_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), PartitionPolicy(mode="paper"))
