"""Modules that keep, hold or write state in their forward: exact in a partition, or refused by name."""

import copy
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_module_cases import Middle, assert_exact, build, every_norm, kinds_of_modes, parted, refusal, step, tiles
from torch import nn


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
    """EEGNet's convolution, that bounds its weights' norm before each use."""

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
