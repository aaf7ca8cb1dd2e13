import copy
import inspect
import io
import pickle
import random

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_wsi.norms.population import Moments
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.execution import paper
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
    found = {"output": out.detach(), "input gradient": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": buffer for name, buffer in module.named_buffers()}


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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return lively(timm.create_model("resnet18", num_classes=0))


@pytest.mark.parametrize("stop_bytes", [0, 50_000], ids=["all", "early"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("axis", INPUTS)
def test_resnet18_equals_the_plain_module(resnet, axis, training, stop_bytes):
    shape, chunk = INPUTS[axis]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(resnet.train(training), x, axis, chunk, stop_bytes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("axis", INPUTS)
def test_random_convolutions(axis):
    draw, tried = random.Random(0), 0
    while tried < 150:
        k, d, groups = (
            (draw.randint(1, 7), draw.randint(1, 5)),
            (draw.randint(1, 3), draw.randint(1, 2)),
            draw.randint(1, 2),
        )
        s, p = (
            (draw.randint(1, 3), draw.randint(1, 3)),
            draw.choice(["same", "valid", (draw.randint(0, 6), draw.randint(0, 3))]),
        )
        shape = (draw.randint(1, 4), 4, draw.randint(1, 19), draw.randint(5, 12))
        s = (1, 1) if p == "same" else s
        pads = (0, 0) if p == "valid" else p
        if p != "same" and any(shape[2 + i] + 2 * pads[i] < d[i] * (k[i] - 1) + 1 for i in range(2)):
            continue
        tried += 1
        conv = nn.Conv2d(4, 6, k, s, p, d, groups, bias=draw.random() < 0.5).double()
        check(conv, torch.randn(shape, dtype=torch.float64), axis, draw.randint(1, 4))


NORMS = {
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "stateless": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "plain": lambda: nn.BatchNorm2d(5, affine=False),
    "with activation": lambda: BatchNormAct2d(5),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("axis", INPUTS)
@pytest.mark.parametrize("kind", NORMS)
def test_batch_norm_variants_over_two_calls(kind, axis, training):
    norm = lively(nn.Sequential(NORMS[kind]())).train(training)
    norm[0].num_batches_tracked is None or norm[0].num_batches_tracked.fill_(3)
    twice = nn.Sequential(norm, nn.Hardswish(), norm)  # one layer used twice: two updates, one sum of gradients
    check(twice, torch.randn(7, 5, 9, 4, dtype=torch.float64) * 2 + 1, axis, 2)


track = paper.track


def running(leaf, mean, unbiased_var):  # Algorithm 2, line 10, as it is printed
    track(leaf, mean, unbiased_var)
    mean.copy_(leaf.running_mean)


WRONG = {
    "biased running variance": (Moments, "unbiased_var", Moments.var, "buffer bn1.running_var"),
    "running statistics": (paper, "track", running, "output"),
    "two updates": (paper, "track", lambda *args: (track(*args), track(*args)), "buffer bn1.running_mean"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_with_statistics_would_be_caught(resnet, monkeypatch, mistake):
    owner, name, wrong, where = WRONG[mistake]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=f"{where}: relative error"):
        check(resnet.train(), torch.randn(6, 3, 32, 32, dtype=torch.float64), "batch", 4)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        images = [arg.shape for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4]
        self.shapes.setdefault(func.overloadpacket, []).append(images)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("axis", INPUTS)
def test_convolutions_and_norms_see_sub_tensors_only(resnet, axis):
    shape, chunk = INPUTS[axis]
    big = copy.deepcopy(resnet).train()
    apply_paper(big, device=CPU, axis=axis, chunk=chunk)
    with Calls() as calls:
        run(big, torch.randn(shape, dtype=torch.float64))
    aten = torch.ops.aten
    forward, backward, statistics = (
        calls.shapes[op] for op in (aten.convolution, aten.convolution_backward, aten.batch_norm_update_stats)
    )
    halo = 0 if axis == "batch" else (2 - 1) * (chunk - 1) + 7 - 1  # stride 2, kernel 7
    for image, *_ in (*forward, *backward, *statistics):
        assert image[0 if axis == "batch" else 2] <= chunk + halo
    for dy, _, _ in backward:
        assert dy[0 if axis == "batch" else 2] <= chunk
    assert len(backward) == len(forward) > 20


def test_undo_restores_and_state_dict_keeps_its_keys(resnet):
    model = copy.deepcopy(resnet).eval()
    x, keys = torch.randn(3, 3, 32, 32, dtype=torch.float64), list(model.state_dict())
    expected = model(x)
    undo = apply_paper(model, device=CPU, axis="batch", chunk=2)
    assert list(model.state_dict()) == keys
    assert [name for name, part in model.named_modules() if "forward" in part.__dict__][:3] == ["", "conv1", "bn1"]
    with pytest.raises(ValueError, match="undo the earlier partition"):
        apply_paper(model, device=CPU, axis="batch", chunk=2)
    undo()
    undo()
    assert not any("forward" in part.__dict__ for part in model.modules())
    assert torch.equal(model(x), expected)


def test_frozen_parts_and_inference():
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    check(model, x, "spatial", 2)
    apply_paper(model, device=CPU, axis="batch", chunk=2)
    with torch.no_grad():
        assert model(x).grad_fn is None
    model(x)[0].sum().backward()  # an image without a gradient
    given = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert given == ["1.bias", "3.weight", "3.bias"]


def test_autocast_of_the_forward_holds_in_the_backward():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    big, x = copy.deepcopy(plain), torch.randn(6, 3, 16, 16)
    apply_paper(big, device=CPU, axis="batch", chunk=2)
    outs = []
    for model in (plain, big):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(model(x))
        outs[-1].float().square().sum().backward()
    assert outs[1].dtype == outs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outs[1], outs[0], rtol=0.03, atol=0.03)
    assert big[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(big[3].weight.grad, plain[3].weight.grad, rtol=0.03, atol=0.5)


@pytest.mark.parametrize("stop_bytes", [0, 100_000, 700_000, 10**9])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet26d"])
def test_maps_meet_in_one_place(name, stop_bytes):
    # Fake tensors know of a device that this machine lacks, and refuse operations across two.
    with FakeTensorMode():
        with torch.device("cuda"):
            model = timm.create_model(name, num_classes=3)
        apply_paper(model, device=torch.device("cuda"), axis="batch", chunk=3, stop_bytes=stop_bytes)
        places = []
        for block in (model.conv1, model.maxpool, model.layer1[0].act2, model.layer3[-1], model.layer4[-1]):
            block.register_forward_hook(lambda *call: places.append((call[2].device.type, call[2].nbytes)))
        out = model(torch.randn(7, 3, 64, 64, device="cpu"))
        assert out.device.type == "cuda"
        assert all(place == ("cuda" if size <= stop_bytes else "cpu") for place, size in places)


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(4, 4, 3), lambda: nn.BatchNorm2d(4)], ids=["conv", "norm"])
def test_gradients_arrive_where_their_tensors_are(layer):
    with FakeTensorMode():
        with torch.device("cuda"):
            layer = layer()
        apply_paper(layer, device=torch.device("cuda"), axis="spatial", chunk=3)
        out = layer(torch.randn(2, 4, 9, 8, device="cpu", requires_grad=True))
        # The node itself: autograd's engine would ask for the driver of the device.
        gradients = [grad for grad in out.grad_fn.apply(torch.ones_like(out)) if grad is not None]
    assert [gradient.device.type for gradient in gradients] == ["cpu", "cuda", "cuda"]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
            r"padding_mode must .* got 'reflect' \(layer 0\.0\).*HINT",
        ),
        (nn.SyncBatchNorm(3), r"got SyncBatchNorm \(layer 0\.0\).*HINT"),
        (timm.layers.Conv2dSame(3, 3, 3), r"got Conv2dSame \(layer 0\.0\).*HINT"),
        (nn.MultiheadAttention(4, 2), r"got 'in_proj_weight' \(module 0\.0, MultiheadAttention\).*HINT"),
    ],
)
def test_unsupported_layers_are_named(layer, words):
    model = nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=words):
        apply_paper(model, device=CPU, axis="batch", chunk=1)
    assert not any("forward" in part.__dict__ for part in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": "rows"}, "axis must be .* got 'rows'"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"stop_bytes": -1}, "stop_bytes must be at least 0, got -1"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        apply_paper(nn.Conv2d(1, 1, 1), **{"device": CPU, "axis": "batch", "chunk": 1} | options)


def test_impossible_inputs_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    apply_paper(model, device=CPU, axis="spatial", chunk=4)
    for shape, words in (
        ((1, 3, 2, 9), "as high as the kernel"),
        ((3, 9, 9), "must be .N, C, H, W."),
        ((1, 3, 3, 3), "got 1"),
    ):
        with pytest.raises(ValueError, match=f"{words}.*HINT"):
            model(torch.randn(shape))


# ------------------------------------------------------------------------------- what is read of a layer, and when


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
    place = kind.split("'")[0]
    words = rf"must have the forward of torch's .* got {type(layer).__name__} \(layer {place}\).*HINT"
    if when == "before":
        with pytest.raises(ValueError, match=words):
            paired("batch", **{place: layer})
        return
    _, parted, _ = paired("batch")
    parted.get_submodule(place).__class__ = type(layer)
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
