"""Modules that keep, write, decide or draw in their forward: exact in a partition, or refused by name."""

import copy
import enum
import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ds_wsi.partition import PartitionPolicy, partition_layers

TILES, CHUNK = 7, 3
NORMS = {"bn": nn.BatchNorm2d, "gn": lambda channels: nn.GroupNorm(1, channels)}
every_norm = pytest.mark.parametrize("norm", NORMS)
kinds_of_modes = pytest.mark.parametrize(("norm", "mode"), [("bn", "recompute"), ("bn", "lean"), ("gn", "keep")])
MODES = ("keep", "lean", "recompute")


class Middle(nn.Module):
    """A statement of the test's, and what it needs."""

    def __init__(self, run, **held):
        super().__init__()
        self.run = run
        for key, value in held.items():
            setattr(self, key, value)

    def forward(self, x):
        return self.run(self, x)


class Net(nn.Module):
    """A module between convolutions and norms."""

    def __init__(self, norm, middle):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](8)
        self.middle = middle
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), NORMS[norm](8)
        self.c3 = nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x):
        x = self.middle(self.n1(self.c1(x)))
        return self.c3((self.n2(self.c2(x)) + x).relu()).mean((2, 3))


def build(norm, middle):
    torch.manual_seed(0)
    return Net(norm, middle()).double()


def tiles(count=TILES, side=8, seed=1):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(net, x):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    out = net(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad


def parted(net, mode, chunk=CHUNK, **policy):
    partition_layers(net, PartitionPolicy(mode=mode, chunk_size=chunk, **policy))
    return net


def assert_same(plain, net, x=None, tolerance=1e-9):
    x = tiles() if x is None else x
    for one, other in zip(step(net, x), step(plain, x), strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    scale = max(grad.to_dense().abs().max() for grad in grads.values() if grad is not None)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None), name
        if grads[name] is not None:
            assert (parameter.grad.to_dense() - grads[name].to_dense()).abs().max() <= tolerance * scale, name
    for (name, one), other in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance), name


def assert_exact(norm, mode, middle, chunk=CHUNK, calls=1, change=None):
    plain, net = build(norm, middle), parted(build(norm, middle), mode, chunk)
    for number in range(calls):
        for one in (plain, net):
            if change is not None and number:
                change(one.middle, number)
            one.zero_grad()
        assert_same(plain, net)


def refusal(norm, mode, middle, x=None, chunk=CHUNK):
    net = parted(build(norm, middle), mode, chunk)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        step(net, tiles() if x is None else x)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name  # a refused module is as it was
    return str(caught.value)


# -------------------------------------------------------------------------------------- what a forward leaves behind


def kept(where):
    def run(self, x):
        where(self, x * 2)
        return x.tanh()

    return run


def store(self, name, value):
    self.__dict__[name] = value


def hooked(self, x):
    y = x.tanh()
    if y.requires_grad:
        y.register_hook(lambda grad: store(self, "grad_of_y", grad))
    return y


class Meter:
    """Somebody's own counter."""

    def __init__(self):
        self.n, self.values = 0, []


KEEPS = {
    "feature": lambda: Middle(kept(lambda self, x: store(self, "last", x.detach()))),
    "over another": lambda: Middle(kept(lambda self, x: store(self, "last", x)), last=None),
    "auxiliary loss": lambda: Middle(kept(lambda self, x: store(self, "aux", x.square().mean()))),
    "dict": lambda: Middle(kept(lambda self, x: self.held.update(a=x.detach())), held={}),
    "list": lambda: Middle(kept(lambda self, x: self.held.append(x.detach().mean())), held=[]),
    "deque": lambda: Middle(kept(lambda self, x: self.held.append(x.detach().mean())), held=deque(maxlen=5)),
    "nested": lambda: Middle(kept(lambda self, x: self.held["a"].append(x.mean())), held={"a": []}),
    "meter": lambda: Middle(kept(lambda self, x: self.held.values.append(x.mean())), held=Meter()),
    "growing buffer": lambda: _with_buffer(
        kept(lambda self, x: setattr(self, "held", torch.cat([self.held, x.detach().mean((0, 2, 3))[None]])))
    ),
    "beside dropout": lambda: Middle(lambda self, x: (store(self, "last", x), F.dropout(x, 0.3))[1]),
}


def _with_buffer(run):
    middle = Middle(run)
    middle.register_buffer("held", torch.zeros(0, 8))
    return middle


@kinds_of_modes
@pytest.mark.parametrize("kind", KEEPS)
def test_tensors_that_a_forward_keeps_are_refused_by_name(kind, norm, mode):
    said = refusal(norm, mode, KEEPS[kind])
    assert "'middle' (Middle) must not " in said
    assert any(word in said for word in ("last", "aux", "held")), said


def test_a_gradient_that_a_hook_keeps_is_refused_by_name():
    said = refusal("gn", "lean", lambda: Middle(hooked))
    assert "'middle' (Middle) must not keep what it computes of the tiles, got its attribute 'grad_of_y'" in said


def table(self, x):
    if x.shape[-1] not in self.held:
        self.held[x.shape[-1]] = torch.arange(x.shape[-1], dtype=x.dtype) / 8
    return x + self.held[x.shape[-1]]


def sizes(self, x):
    self.height, self.width = x.shape[2:]
    return x * self.height


@kinds_of_modes
@pytest.mark.parametrize("middle", [lambda: Middle(table, held={}), lambda: Middle(sizes)], ids=["table", "sizes"])
def test_what_does_not_depend_on_the_tiles_may_be_kept(middle, norm, mode):
    assert_exact(norm, mode, middle, calls=2)


@every_norm
def test_sizes_that_a_forward_keeps_are_there_afterwards(norm):
    net = parted(build(norm, lambda: Middle(sizes)), "lean")
    for side in (8, 8, 10):
        net.middle.__dict__.pop("height", None), net.middle.__dict__.pop("width", None)
        step(net, tiles(side=side))
        assert (net.middle.height, net.middle.width) == (side, side)


def counting(self, x):
    self.held.n += 1
    return x


COUNTS = {
    "object": lambda: Middle(counting, held=Meter()),
    "namespace": lambda: Middle(counting, held=SimpleNamespace(n=0)),
    "deque": lambda: Middle(lambda self, x: (self.held.append(1), x)[1], held=deque()),
    "beside dropout": lambda: Middle(lambda self, x: (self.held.append(1), F.dropout(x, 0.3))[1], held=deque()),
    **{
        kind.__name__: lambda kind=kind: Middle(
            lambda self, x: (self.held.update(n=self.held.get("n", 0) + 1), x)[1], held=kind()
        )
        for kind in (OrderedDict,)
    },
    "Counter": lambda: Middle(lambda self, x: (self.held.update(["n"]), x)[1], held=Counter()),
    "defaultdict": lambda: Middle(
        lambda self, x: (self.held.__setitem__("n", self.held["n"] + 1), x)[1], held=defaultdict(int)
    ),
}


@kinds_of_modes
@pytest.mark.parametrize("kind", COUNTS)
def test_counters_in_containers_are_refused_by_name_and_stay(kind, norm, mode):
    net = parted(build(norm, COUNTS[kind]), mode)
    before = copy.deepcopy(vars(net.middle.held) if hasattr(net.middle.held, "__dict__") else net.middle.held)
    with pytest.raises(ValueError, match=r"'middle' \(Middle\) must not change its attribute .held"):
        step(net, tiles())
    after = vars(net.middle.held) if hasattr(net.middle.held, "__dict__") else net.middle.held
    assert after == before or (kind == "defaultdict" and dict(after) == {})


# ------------------------------------------------------------------------------------------- what is no parameter


OUTER = nn.Parameter(torch.full((8, 1, 1), 0.5, dtype=torch.float64))


def hidden(how):
    conv = nn.Conv2d(8, 8, 1).double()
    if how == "list":
        return Middle(lambda self, x: self.held[0](x), held=[conv])
    if how == "dict":
        return Middle(lambda self, x: self.held["a"](x), held={"a": conv})
    if how == "object":
        middle = Middle(lambda self, x: self.held(x))
        object.__setattr__(middle, "held", conv)
        return middle
    if how == "parameters":
        return Middle(lambda self, x: x * self.held[0], held=[nn.Parameter(torch.ones(8, 1, 1).double())])
    if how == "tensor":
        return Middle(lambda self, x: x * self.held, held=torch.ones(8, 1, 1).double().requires_grad_())
    if how == "closure":
        return Middle(lambda self, x: x * OUTER)
    middle = Middle(lambda self, x: x * self.held)
    middle.register_buffer("held", torch.ones(8, 1, 1).double())
    return middle


@kinds_of_modes
@pytest.mark.parametrize("how", ["list", "dict", "object", "parameters", "tensor", "closure", "buffer"])
def test_what_is_trained_and_no_parameter_is_refused(how, norm, mode):
    net = build(norm, lambda: hidden(how))
    if how == "buffer":
        net.middle.held.requires_grad_()
    who = "'' .Net." if how == "closure" else "'middle' .Middle."
    with pytest.raises(ValueError, match=f"{who} must hold what it trains as parameters, got "):
        step(parted(net, mode), tiles())


@every_norm
def test_what_is_hidden_and_frozen_is_exact(norm):
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 8, 1).double().requires_grad_(False)
    assert_exact(norm, "lean", lambda: Middle(lambda self, x: self.held[0](x), held=[conv]))


class MaxNorm(nn.Conv2d):
    """As EEGNet's."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


def written(change):
    def run(self, x):
        with torch.no_grad():
            change(self.w)
        return x * self.w

    return lambda: Middle(run, w=nn.Parameter(torch.rand(8, 1, 1) + 0.5))


def replaced(self, x):
    self.w = nn.Parameter(self.w.detach() * 0.9)
    return x * self.w.detach()


WRITES = {
    "in place": written(lambda w: w.mul_(0.9)),
    "normalised": written(lambda w: w.copy_(F.normalize(w, dim=0))),
    "data": written(lambda w: w.data.clamp_(0.6, 0.7)),
    "a view": written(lambda w: w[0].zero_()),
    "out": written(lambda w: torch.mul(w, 0.5, out=w)),
    "max norm": lambda: MaxNorm(8, 8, 1),
    "embedding": lambda: Middle(
        lambda self, x: x + self.held(torch.arange(8)).view(8, 1, 1), held=nn.Embedding(8, 1, max_norm=0.1)
    ),
    "replaced": lambda: Middle(replaced, w=nn.Parameter(torch.rand(8, 1, 1))),
}


@kinds_of_modes
@pytest.mark.parametrize("kind", WRITES)
def test_a_parameter_that_a_forward_writes_is_refused_by_name_and_stays(kind, norm, mode):
    said = refusal(norm, mode, WRITES[kind])
    name = {"embedding": "'middle.held' (Embedding)", "max norm": "'middle' (MaxNorm)"}.get(kind, "'middle' (Middle)")
    assert f"{name} must not write its parameter" in said


# --------------------------------------------------------------------------------------------------- conditions


def of_number(condition):
    return lambda: Middle(lambda self, x: x * 2 if condition(len(x)) else x)


def guarded(self, x):
    try:
        return x.view(TILES, -1).view_as(x) * 2
    except RuntimeError:
        return x


BY_NUMBER = {
    "more than five": of_number(lambda count: count > 5),
    "more than six": of_number(lambda count: count > 6),
    "odd": of_number(lambda count: count % 2),
    "this many": of_number(lambda count: count == TILES),
    "view": lambda: Middle(guarded),
    "the later ones": lambda: Middle(lambda self, x: torch.cat([x[:5], 2 * x[5:]])),
}


@kinds_of_modes
@pytest.mark.parametrize("kind", BY_NUMBER)
def test_a_condition_on_the_number_of_tiles_is_refused(kind, norm, mode):
    said = refusal(norm, mode, BY_NUMBER[kind])
    assert "any number of tiles" in said or "'middle' (Middle)" in said


def test_a_condition_on_many_tiles_is_refused_although_few_are_tried():
    said = refusal("bn", "lean", of_number(lambda count: count > 50), tiles(60, side=5), chunk=20)
    assert "must do the same with any number of tiles, got 10 operations for 4 and 11 for 1001" in said


@pytest.mark.parametrize("first", [7, 2])
def test_a_later_bag_of_another_size_is_looked_at_too(first):
    net = parted(build("bn", of_number(lambda count: count == 3)), "lean")
    step(net, tiles(first))
    with pytest.raises(ValueError, match="must do the same with any number of tiles"):
        step(net, tiles(3))


BY_VALUE = {
    "mean": lambda self, x: x * 2 if x.mean() > 0.02 else x,
    "largest": lambda self, x: x / 2 if x.max() > 50 else x,
    "item": lambda self, x: x * (1 if x[-1].mean().item() > -9 else 2),
    "any": lambda self, x: x * 2 if (x > 40).any() else x,
    "equal": lambda self, x: x if torch.equal(x[0], x[1]) else -x,
}


@pytest.mark.parametrize("kind", BY_VALUE)
def test_a_condition_on_the_tiles_values_is_refused_whatever_they_are(kind):
    assert "'middle' (Middle) must " in refusal("gn", "lean", lambda: Middle(BY_VALUE[kind]))
    assert "'middle' (Middle)" in refusal("bn", "lean", lambda: Middle(BY_VALUE[kind]))


def asserts(self, x):
    assert torch.isfinite(x).all()
    return x


INDEPENDENT = {
    "assertion": asserts,
    "guard": lambda self, x: x.nan_to_num() if x.isnan().any() else x,
    "a loop": lambda self, x: torch.stack([tile * 2 for tile in x]),
    "a condition by tile": lambda self, x: torch.stack([2 * tile if tile.mean() > 0 else tile for tile in x]),
}


@pytest.mark.parametrize("mode", ["keep", "lean"])
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_conditions_that_do_not_couple_tiles_are_exact(kind, mode):
    assert_exact("gn", mode, lambda: Middle(INDEPENDENT[kind]))


# ---------------------------------------------------------------------------------- contexts, gradients, 16 bits


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
        (out, grad), (wanted, wanted_grad) = step(net, tiles().float()), step(plain, tiles().float())
    tolerance = 1e-5 if "enabled" in inner else 2e-2
    assert (out - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (grad - wanted_grad).abs().max() <= tolerance * wanted_grad.abs().max()
    if "enabled" in inner:
        short = copy.deepcopy(plain)
        short.context = {"dtype": torch.bfloat16}
        assert (step(short, tiles().float())[0] - wanted).abs().max() > 1e-3 * wanted.abs().max(), (
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


# ------------------------------------------------------------------------------------------------------------ draws


class Noise(nn.Module):
    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


class Noisy(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight + 0.1 * torch.randn_like(self.weight), self.bias)


def parametrized(kind=nn.Conv2d):
    part = kind(8, 8, 1)
    parametrize.register_parametrization(part, "weight", Noise())
    return part


def patched():
    part = nn.Conv2d(8, 8, 1)
    part.forward = lambda x: type(part).forward(part, x) * torch.rand(len(x), 1, 1, 1, dtype=x.dtype)
    return part


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(8, 8)
        parametrize.register_parametrization(self.part, "weight", Noise())

    def forward(self, x):
        return self.part(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("middle", [parametrized, lambda: Noisy(8, 8, 1), Linear, patched])
def test_layers_that_draw_draw_the_same_in_backward(middle, mode):
    net = parted(build("bn", middle), mode)
    x, direction = tiles(), tiles(seed=3)
    slope = (step(net, x)[1] * direction).sum().item()
    outs = []
    for sign in (1, -1):
        out = step(net, x + sign * 1e-6 * direction)[0]
        outs.append((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().item())
    assert slope == pytest.approx((outs[0] - outs[1]) / 2e-6, rel=1e-4, abs=1e-6)


@every_norm
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_mixing_at_a_distance_is_named_beside_dropout(distance, norm):
    said = refusal(norm, "lean", lambda: Middle(lambda self, x: F.dropout(x, 0.2) + x.roll(distance, 0)))
    assert "'middle' (Middle) must treat tiles independently" in said


def test_a_seed_in_the_forward_is_refused():
    def run(self, x):
        torch.manual_seed(3)
        return x + torch.randn(8, 1, 1, dtype=x.dtype)

    for mode in ("lean", "recompute"):
        assert "must not seed torch's generators in forward" in refusal("bn", mode, lambda: Middle(run))


# ---------------------------------------------------------------------------------------------------- the next call


class Level(enum.Enum):
    LOW, HIGH = 1.0, 3.0


def setter(name, *values):
    return lambda middle, number: setattr(middle, name, values[(number - 1) % len(values)])


CHANGED = {
    "namespace": (
        lambda s, x: x * s.held.n,
        lambda: SimpleNamespace(n=2.0),
        lambda m, i: setattr(m.held, "n", 2.0 + i),
    ),
    "tensor in a dict": (
        lambda s, x: x * s.held["t"],
        lambda: {"t": torch.tensor(2.0)},
        lambda m, i: m.held.update(t=torch.tensor(2.0 + i)),
    ),
    "tensor in place": (lambda s, x: x * s.held[0], lambda: [torch.tensor(2.0)], lambda m, i: m.held[0].mul_(2)),
    "function": (lambda s, x: s.held(x), lambda: torch.sin, setter("held", torch.tanh, torch.cos)),
    "functions": (lambda s, x: s.held[0](x), lambda: [torch.sin], setter("held", [torch.tanh], [torch.cos])),
    "nested": (lambda s, x: x * s.held[0][1][0], lambda: [[1, [2]]], lambda m, i: m.held[0][1].__setitem__(0, 2 + i)),
    "set": (lambda s, x: x * max(s.held), lambda: {1}, lambda m, i: m.held.add(1 + i)),
    "numpy": (
        lambda s, x: x * float(s.held),
        lambda: np.float64(2),
        lambda m, i: setattr(m, "held", np.float64(2 + i)),
    ),
    "array": (lambda s, x: x * float(s.held[0]), lambda: np.array([2.0]), lambda m, i: m.held.__setitem__(0, 2.0 + i)),
    "long list": (lambda s, x: x * s.held[70], lambda: [1.0] * 99, lambda m, i: m.held.__setitem__(70, 2.0 + i)),
    "enum": (lambda s, x: x * s.held.value, lambda: Level.LOW, setter("held", Level.HIGH, Level.LOW)),
    "dtype": (lambda s, x: x.to(s.held).double(), lambda: torch.float32, setter("held", torch.float64)),
    "hidden module": (lambda s, x: s.held[0](x), lambda: [nn.Sigmoid()], setter("held", [nn.Tanh()], [nn.SiLU()])),
}


@pytest.mark.parametrize("mode", ["lean", "recompute"])
@pytest.mark.parametrize("kind", CHANGED)
def test_what_a_part_holds_may_change_between_calls(kind, mode):
    run, held, change = CHANGED[kind]
    assert_exact("bn", mode, lambda: Middle(run, held=held()), calls=3, change=change)


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
