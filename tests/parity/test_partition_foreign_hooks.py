"""Hooks, ties and replaced tensors of parameters, and hooks on modules: as in the plain module, or refused by name."""

import copy
import functools
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from foreign_call_cases import (
    NORMS,
    Net,
    assert_same,
    assert_same_state,
    build,
    differs,
    every_mode,
    every_mode_and_norm,
    every_norm,
    gradient_of,
    pair,
    step,
    tiles,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from ds_wsi.partition import PartitionPolicy, partition_layers

TENSOR_HOOKS = {
    "scaled": lambda grad: grad * 1.5,
    "shrunk": lambda grad: grad * 0.1,
    "clamped": lambda grad: grad.clamp(-1e-2, 1e-2),
    "masked": lambda grad: grad * (torch.arange(grad.numel()).view_as(grad) % 2),
    "normed": lambda grad: grad / (grad.norm() + 1e-3),
    "rounded": lambda grad: (grad * 50).round() / 50 + grad**3,
}


@every_mode_and_norm
@pytest.mark.parametrize("hook", TENSOR_HOOKS)
def test_a_parameters_hook_runs_once_on_the_whole_gradient(hook, mode, norm):
    calls = []

    def change(net):
        for name, parameter in net.named_parameters():
            parameter.register_hook(lambda grad, name=name: calls.append(name) or TENSOR_HOOKS[hook](grad))

    plain, parted, _ = pair(norm, mode, change)
    step(parted, tiles())
    assert sorted(calls) == sorted(name for name, _ in parted.named_parameters())
    parted.zero_grad()
    if norm == "bn":
        parted.load_state_dict(plain.state_dict())
    calls.clear()
    step(plain, tiles())
    # Of a bias before a norm the gradient is rounding alone, of which a quotient makes anything.
    skipped = {"c1.bias", "c2.bias"} if norm == "bn" and hook in ("normed", "rounded") else set()
    step(parted, tiles())
    for (name, other), one in zip(plain.named_parameters(), parted.parameters(), strict=True):
        if name not in skipped:
            assert (one.grad - other.grad).abs().max() <= 1e-8, name


class Tied(Net):
    """One weight in two convolutions, one parameter in a list that nobody registers, and a bare one."""

    def __init__(self, norm):
        super().__init__(norm)
        self.c4 = nn.Conv2d(8, 8, 3, padding=1)
        self.c4.weight = self.c2.weight
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x):
        x = self.act(self.n1(self.c1(x)))
        return self.c3(self.act(self.n2(self.c2(x)) + self.c4(x) * self.scale)).mean((2, 3))


@every_mode_and_norm
def test_tied_weights_have_one_alias_and_one_gradient(mode, norm):
    plain, parted, _ = pair(norm, mode, lambda net: net.c2.weight.register_hook(lambda grad: grad * 0.1), kind=Tied)
    assert parted.c4.weight is parted.c2.weight
    assert_same(plain, parted)
    assert parted.c4.weight is parted.c2.weight
    assert all(isinstance(parameter, nn.Parameter) for parameter in parted.parameters())


class Recurrent(nn.Module):
    """torch's recurrent layers keep their weights in a list; and a parameter in a list of the module's own."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), NORMS[norm](8)
        self.rnn, self.last = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 4)
        self.held = [self.last.bias]

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return F.linear(self.rnn(x)[0].mean(1), self.last.weight) + self.held[0]


@every_mode
def test_parameters_that_are_held_outside_of_the_registry(mode):
    calls = []
    # Copies of a list hold copies of what it holds: here of the module's own parameter.
    plain, parted, _ = pair("gn", mode, kind=Recurrent)
    parted.rnn.weight_hh_l0.register_hook(lambda grad: calls.append(1))
    assert_same(plain, parted)
    assert len(calls) == 1


def test_a_hook_that_runs_on_every_chunk_is_seen():
    plain = build()
    plain.c2.weight.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    expected = copy.deepcopy(plain)
    step(plain, tiles())
    step(expected, tiles())
    assert differs(expected.c2.weight.grad, plain.c2.weight.grad.clamp(-1e-2, 1e-2)) > 1e-3


@every_mode_and_norm
def test_functional_call_gives_its_tensors_their_gradients(mode, norm):
    plain, parted, _ = pair(norm, mode)
    gradients = {}
    for key, net in (("plain", plain), ("parted", parted)):
        given = {name: (1.5 * value.detach()).requires_grad_() for name, value in net.named_parameters()}
        x = tiles().requires_grad_()
        out = torch.func.functional_call(net, given, x)
        gradients[key] = torch.autograd.grad(out, [x, *given.values()], gradient_of(out))
        assert all(value.grad is None for value in net.parameters())
        # Not a leaf, and only some: what is given may be computed, as a learner's step is.
        some = {name: 1.5 * value for name, value in net.named_parameters() if name.startswith(("c2", "n2"))}
        step(net, tiles(), lambda module, x, some=some: torch.func.functional_call(module, some, x))
    for one, other in zip(gradients["parted"], gradients["plain"], strict=True):
        assert (one - other).abs().max() <= 1e-9
    assert_same_state(plain, parted)
    assert_same(plain, parted)


@every_mode
def test_functional_call_gives_its_buffers_to_backward(mode):
    plain, parted, _ = pair("bn", mode)
    for net in (plain, parted):
        net.n1.eval()
    given = {"n1.running_var": torch.full((8,), 3.0, dtype=torch.float64)}
    assert_same(plain, parted, call=lambda module, x: torch.func.functional_call(module, given, x))


@every_mode_and_norm
def test_a_parameter_that_is_replaced_before_backward_is_not_the_calls(mode, norm):
    plain, parted, _ = pair(norm, mode)
    for net in (plain, parted):
        out, old = net(tiles()), net.c2.weight
        net.c2.weight = nn.Parameter(torch.ones_like(old))
        out.backward(gradient_of(out))
        assert net.c2.weight.grad is None
        net.c2.weight = old
    assert_same_state(plain, parted)


@pytest.mark.parametrize("mode", ["lean", "keep", "recompute"])
def test_threads_that_train_one_module_leave_its_parameters_in_place(mode):
    _, parted, _ = pair("gn", mode)
    before = [id(parameter) for parameter in parted.parameters()]
    threads = [threading.Thread(target=lambda: [step(parted, tiles()) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [id(parameter) for parameter in parted.parameters()] == before
    expected = build("gn")
    for _ in range(20):
        step(expected, tiles())
    assert differs(parted.c2.weight.grad, expected.c2.weight.grad) <= 1e-9


@every_mode
def test_a_norm_whose_gamma_is_computed_and_one_without_beta(mode):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2 + weight**2

    def change(net):
        parametrize.register_parametrization(net.n1, "weight", Half())
        net.n2 = nn.BatchNorm2d(8, bias=False).double() if "bias" in _options(nn.BatchNorm2d) else net.n2

    plain, parted, _ = pair("bn", mode, change)
    assert_same(plain, parted)


def _options(kind):
    return inspect.signature(kind).parameters


# -------------------------------------------------------------------------------------------------- hooks on modules

INNER_HOOKS = {
    "a forward hook": lambda part: part.register_forward_hook(lambda module, args, out: out * 1.5),
    "a forward pre-hook": lambda part: part.register_forward_pre_hook(lambda module, args: None),
    "a backward hook": lambda part: part.register_full_backward_hook(lambda module, below, above: None),
    "a backward pre-hook": lambda part: part.register_full_backward_pre_hook(lambda module, above: None),
}


@every_mode_and_norm
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", INNER_HOOKS)
def test_a_hook_inside_is_refused_by_name(kind, when, mode, norm):
    parted = build(norm)
    if when == "before":
        hook = INNER_HOOKS[kind](parted.n1)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    if when == "after":
        parted(tiles())
        hook = INNER_HOOKS[kind](parted.n1)
    for context in (torch.enable_grad, torch.no_grad):
        with pytest.raises(ValueError) as caught, context():
            parted(tiles())
        assert str(caught.value) == (
            f"a hook inside a partition must be on the partitioned module itself, got {kind} on 'n1'. "
            'HINT: mode "native" while you look.'
        )
    hook.remove()
    parted(tiles())


@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_hooks_inside_are_refused():
    class Looks:
        def __call__(self, module, args, out):
            return None

    for register in (
        lambda net: net.c1.register_forward_hook(lambda *a, **k: None, with_kwargs=True, always_call=True),
        lambda net: net.c1.register_forward_hook(Looks()),
        lambda net: net.c1.register_forward_hook(functools.partial(lambda tag, *args: None, "tag")),
        lambda net: net.c1.register_backward_hook(lambda *args: None),
        lambda net: nn.modules.module.register_module_forward_hook(lambda *args: None),
        lambda net: nn.modules.module.register_module_full_backward_hook(lambda *args: None),
    ):
        _, parted, _ = pair("bn", "lean")
        hook = register(parted)
        with pytest.raises(ValueError, match="a hook inside a partition must be on the partitioned module itself"):
            parted(tiles())
        hook.remove()
        parted(tiles())


@every_norm
def test_native_runs_hooks_as_they_are(norm):
    calls = []

    def change(net):
        net.n1.register_forward_hook(lambda module, args, out: calls.append(len(out)) or out * 1.5)

    plain, parted, _ = pair(norm, "native", change)
    assert_same(plain, parted)
    assert calls == [7, 7]


@every_mode_and_norm
def test_hooks_on_the_module_itself_run_as_in_the_plain_one(mode, norm):
    calls = []

    def change(net):
        net.register_forward_pre_hook(lambda module, args: calls.append("before") or (args[0] * 2,))
        net.register_forward_hook(lambda module, args, out: calls.append("after") or out * 1.5)
        net.register_full_backward_hook(lambda module, below, above: calls.append("back") or (below[0] * 3,))
        net.register_full_backward_pre_hook(lambda module, above: calls.append("above") or (above[0] * 2,))

    plain, parted, _ = pair(norm, mode, change)
    assert_same(plain, parted)
    assert sorted(calls) == sorted(["before", "after", "back", "above"] * 2)


def test_a_profiler_may_look():
    _, parted, _ = pair("gn", "lean")
    with FlopCounterMode(display=False) as counter:
        step(parted, tiles())
    assert counter.get_total_flops() > 0
