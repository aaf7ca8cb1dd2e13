import copy
import random

import pytest
import timm
import torch
from paper_cases import CPU, INPUTS, check, lively, run
from timm.layers import BatchNormAct2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_wsi.norms.population import Moments
from ds_wsi.partition.execution import paper
from ds_wsi.partition.execution.paper import apply_paper


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
        assert all(device == ("cuda" if size <= stop_bytes else "cpu") for device, size in places)


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
