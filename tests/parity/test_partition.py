"""A partitioned encoder equals the plain one on a bag of tiles: outputs, gradients, running statistics, in float64."""

import copy
import gc

import pytest
import timm
import torch
from partition_cases import TOLERANCE, assert_same, assert_same_state, build, gradient_of, relative, step, tiles
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.graph.norm import NormSite
from ds_wsi.partition.graph.segments import tile_ranges
from ds_wsi.partition.policy import MODES
from ds_wsi.stacking import stack_bags

NETWORKS = {
    "resnet18": {},
    "resnet18 of whole width": {"channels": (64, 128, 256, 512)},
    "resnet50": {},
    "convnext_tiny": {"dims": (96, 192, 384, 768)},
    "vit_tiny_patch16_224": {"img_size": 32},
}
LARGE = ("resnet18 of whole width", "resnet50", "convnext_tiny")
DEEP = 12  # tiles: with fewer, BatchNorm over the last stage's one pixel a tile is ill-conditioned


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in NETWORKS])
def test_every_mode_equals_the_plain_encoder(name, mode, train):
    plain = build(name.split()[0], **NETWORKS[name]).train(train)
    x = tiles(DEEP if name.startswith("resnet18") else 6)
    # Recomputing ResNet-50's 53 norms, each from the input, takes long: two chunks instead of three.
    sizes = (4, 5) if name.startswith("resnet18") else (3,) if (name, mode) != ("resnet50", "recompute") else (4,)
    expected = None
    for size in sizes:
        partitioned = copy.deepcopy(plain)
        reference = copy.deepcopy(plain)
        expected = step(reference, x)
        partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=size))
        assert_same(reference, partitioned, expected, step(partitioned, x))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_bags_of_one_tile_add_up(mode):
    """The class token's gradient is a part of the positions' then: in one memory, each would get the other's."""
    plain = build("vit_tiny_patch16_224", img_size=32, depth=2)
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=3))
    bags = tiles(4).split([1, 2, 1])
    for model in (plain, partitioned):
        for bag in bags:
            model(bag).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), partitioned.parameters(), strict=True):
        assert relative(other.grad, one.grad) < TOLERANCE, name


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
def test_a_large_image_in_blocks_equals_the_whole(mode, train):
    plain = build("resnet18").train(train)
    x = tiles(2, 75)[:, :, :, :64]
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, axis="spatial", chunk_size=2))
    expected = step(plain, x)
    assert_same(plain, partitioned, expected, step(partitioned, x))


def test_the_check_sees_statistics_by_chunk_and_a_missing_correction(monkeypatch):
    plain, x = build("resnet18"), tiles(DEEP)
    by_chunk = copy.deepcopy(plain)
    expected = step(copy.deepcopy(plain), x)[0]
    assert relative(torch.cat([by_chunk(part) for part in x.split(4)]).detach(), expected) > 1e-3
    checked, partitioned = copy.deepcopy(plain), copy.deepcopy(plain)
    partition_layers(checked, PartitionPolicy(mode="lean", chunk_size=4))
    partition_layers(partitioned, PartitionPolicy(mode="lean", chunk_size=4), check=False)
    monkeypatch.setattr(NormSite, "correct", lambda self, moments, z, grad: grad)
    with pytest.raises(ValueError, match=r"ResNet must be computed in a partition as it is alone, got .* gradient"):
        checked(x.clone().requires_grad_())
    reference = copy.deepcopy(plain)
    of_reference, results = step(reference, x), step(partitioned, x)
    assert relative(results[0], of_reference[0]) <= TOLERANCE
    assert relative(results[1], of_reference[1]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_before_a_backward_and_gradients_that_add_up(mode):
    plain = build("resnet18")
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=4))
    for module in (plain, partitioned):
        first, second = module(tiles(DEEP, seed=3)), module(tiles(DEEP + 3, seed=4))
        second.backward(gradient_of(second))
        first.backward(gradient_of(first))
    assert_same_state(plain, partitioned)


class UsedTwice(nn.Module):
    """A block that runs twice in one forward, and a parameter that is read without a module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.scale = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        x = self.block(x) * self.scale + x
        return self.block(x).mean((2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_used_twice(mode):
    torch.manual_seed(0)
    plain = UsedTwice().double()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=4))
    assert_same(plain, partitioned, step(plain, tiles(10, 8)), step(partitioned, tiles(10, 8)))


class Norms(nn.Module):
    """BatchNorm in its variants, on the input itself too; two norms of one tensor; dropout between them."""

    def __init__(self):
        super().__init__()
        self.input_norm = nn.BatchNorm2d(3, momentum=None)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.one = nn.BatchNorm2d(6, affine=False)
        self.two = nn.BatchNorm2d(6, track_running_stats=False)
        self.last = nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.conv(self.input_norm(x))
        x = self.one(x) + torch.sigmoid(self.two(x))
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
def test_norms_without_affine_or_statistics_and_norms_of_the_input(mode, train):
    torch.manual_seed(0)
    plain = Norms().double().train(train)
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=4))
    assert_same(plain, partitioned, step(plain, tiles(10, 8)), step(partitioned, tiles(10, 8)))


@pytest.mark.parametrize("mode", MODES)
def test_frozen_stem_and_frozen_affine_receive_nothing_and_cost_nothing(mode):
    plain = build("resnet18")
    plain.conv1.requires_grad_(False)
    plain.bn1.requires_grad_(False)
    plain.layer2[0].bn1.requires_grad_(False)
    plain.layer3.requires_grad_(False)
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=4))
    x = tiles(DEEP)
    for module in (plain, partitioned):  # an input without gradient, as in training
        out = module(x)
        out.backward(gradient_of(out))
    assert_same_state(plain, partitioned)


def test_without_gradient_nothing_is_kept_and_statistics_stay(monkeypatch):
    plain = build("resnet18").eval()
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(chunk_size=4))
    before = copy.deepcopy(partitioned.state_dict())
    with torch.no_grad():
        assert relative(partitioned(tiles(DEEP)), plain(tiles(DEEP))) <= TOLERANCE
    assert all(torch.equal(before[key], value) for key, value in partitioned.state_dict().items())
    assert partitioned(tiles(0)).shape == (0, plain.num_features)


@pytest.mark.parametrize(
    ("mode", "population"), [("auto", "bag"), ("lean", "bag"), ("lean", "stack"), ("recompute", "stack")]
)
def test_a_slide_model_of_stacked_bags_has_the_population_of_the_policy(population, mode):
    encoder, aggregator = build("resnet10t"), build_aggregator("gated_abmil", 128, 2).double()
    bags = stack_bags([torch.randint(0, 255, (n, 3, 32, 32), dtype=torch.uint8) for n in (7, 11, 26)])
    plain = SlideModel(copy.deepcopy(encoder), copy.deepcopy(aggregator))
    parted = SlideModel(copy.deepcopy(encoder), copy.deepcopy(aggregator))
    policy = PartitionPolicy(mode=mode, chunk_size=4, bn_population=population, gpu_budget_bytes=66 * 2**20)
    partition_layers(parted.encoder, policy)
    if population == "bag":
        expected = plain(bags)
    else:
        expected = plain.aggregator(bags.with_values(plain.encoder(plain.normalise(bags.values))))
    result = parted(bags)
    assert relative(result.logits, expected.logits) <= TOLERANCE
    for output in (expected, result):
        output.logits.square().sum().backward()
    assert_same_state(plain, parted)


def test_removed_it_is_the_plain_module_again():
    module = build("resnet18")
    keys, forward = module.state_dict().keys(), module.forward
    handle = partition_layers(module, PartitionPolicy(mode="lean"))
    assert module.state_dict().keys() == keys
    with pytest.raises(ValueError, match="must not be partitioned twice"):
        partition_layers(module, PartitionPolicy())
    handle.remove()
    handle.remove()
    assert module.forward == forward
    assert "forward" not in module.__dict__
    partition_layers(module, PartitionPolicy(mode="lean")).remove()


def test_a_plan_survives_json_and_copies_of_the_module():
    module = build("resnet18")
    plan = plan_partition(
        module, (DEEP, 3, 32, 32), PartitionPolicy(mode="checkpoint", chunk_size=4), dtype=torch.float64
    )
    assert PartitionPlan.from_section(plan.to_section()) == plan
    plain = copy.deepcopy(module)
    partition_layers(module, plan)
    partitioned = copy.deepcopy(module)
    x = tiles(DEEP)
    assert_same(plain, partitioned, step(plain, x), step(partitioned, x))


def test_a_second_backward_and_a_second_tensor_are_refused():
    module = build("resnet18")
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=4))
    out = module(tiles(DEEP))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward must run once"):
        out.sum().backward()
    with pytest.raises(TypeError, match="positional argument"):
        module(tiles(2), tiles(2))


class CheckpointsItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def test_checkpointing_around_and_inside_is_refused():
    module = build("resnet18")
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=4))
    with pytest.raises(RuntimeError, match=r"must not be called inside torch\.utils\.checkpoint"):
        checkpoint(module, tiles(DEEP), use_reentrant=False)
    out = checkpoint(module, tiles(DEEP).requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"must not be called inside torch\.utils\.checkpoint"):
        out.sum().backward()
    flagged = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    flagged.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="must not checkpoint itself inside a partition"):
        partition_layers(flagged, PartitionPolicy(mode="recompute"))
    inner = CheckpointsItself()
    partition_layers(inner, PartitionPolicy(mode="recompute", chunk_size=2))
    with pytest.raises(RuntimeError, match="must not checkpoint inside a partition"):
        inner(torch.randn(4, 4)).sum().backward()


def test_one_value_a_channel_and_an_untraceable_module_are_refused_by_name():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    module = Branches()
    partition_layers(module, PartitionPolicy(mode="lean"))
    with pytest.raises(ValueError, match="Branches must be a graph of operations"):
        module(torch.randn(4, 3, 2, 2))
    norm = nn.Sequential(nn.BatchNorm1d(3))
    partition_layers(norm, PartitionPolicy(mode="lean"))
    with pytest.raises(ValueError, match="must see more than one value per channel"):
        norm(torch.randn(1, 3))


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_nothing_is_left_after_a_step_nor_after_a_forward_without_backward(mode):
    module = build("resnet18")
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=4))
    step(module, tiles(DEEP))
    gc.collect()
    assert module.forward._store.held_bytes == 0
    output = module(tiles(DEEP))
    assert module.forward._store.held_bytes > 0
    del output
    gc.collect()
    assert module.forward._store.held_bytes == 0


@pytest.mark.parametrize(
    ("bag", "size", "expected"),
    [
        ((0, 7), 3, [(0, 3), (3, 5), (5, 7)]),  # no tile is left alone
        ((5, 9), 3, [(5, 7), (7, 9)]),
        ((0, 8), 3, [(0, 3), (3, 6), (6, 8)]),
        ((0, 6), 3, [(0, 3), (3, 6)]),
        ((0, 5), 2, [(0, 2), (2, 4), (4, 5)]),  # a chunk has at most two
        ((0, 3), 1, [(0, 1), (1, 2), (2, 3)]),
        ((4, 5), 3, [(4, 5)]),
        ((4, 4), 3, []),
    ],
)
def test_a_bag_is_cut_into_chunks_of_which_none_is_a_lone_remainder(bag, size, expected):
    assert tile_ranges(bag, size) == expected


class _Transposed(torch.autograd.Function):
    """The identity whose gradient of one tile comes with channels last and a stride of tiles that says nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        _, channels, height, _ = grad.shape
        if grad.shape[0] > 1:
            return grad
        strides = (channels, 1, channels * height, channels)
        return grad.new_empty(grad.numel()).as_strided(grad.shape, strides).copy_(grad)


class TransposedHead(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 32, 4, 4), nn.BatchNorm2d(32))

    def forward(self, x):
        return _Transposed.apply(super().forward(x)).square().mean((2, 3))


def test_one_more_tile_than_the_chunks_hold_is_exact_whatever_the_strides_of_its_gradient():
    torch.manual_seed(0)
    plain = TransposedHead().double().eval()
    nn.init.uniform_(plain[1].running_var, 0.5, 2)
    partitioned = copy.deepcopy(plain)
    partition_layers(partitioned, PartitionPolicy(mode="lean", chunk_size=3), check=False)
    x = tiles(7, side=8)
    assert_same(plain, partitioned, step(plain, x), step(partitioned, x))
