"""What callers and other code do around a partitioned module: as the plain module in float64, or refused by name."""

import copy
import functools
import inspect
import os
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ds_wsi.norms.population import takes_population, track
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.module.restored import Restored
from ds_wsi.partition.policy import MODES

TOLERANCE = 1e-10
NORMS = {"bn": nn.BatchNorm2d, "gn": lambda channels: nn.GroupNorm(1, channels)}
KEEPS_GRAPHS = ("keep", "offload")

every_mode = pytest.mark.parametrize("mode", MODES)
every_norm = pytest.mark.parametrize("norm", NORMS)
# Without BatchNorm a module is one operation, which is held as a graph or run again: a mode of each kind is enough.
EVERYTHING = os.environ.get("DS_WSI_ALL_LAYOUTS") == "1"
MODES_AND_NORMS = [
    (mode, norm) for norm in NORMS for mode in MODES if EVERYTHING or norm == "bn" or mode in ("keep", "lean")
]
every_mode_and_norm = pytest.mark.parametrize(("mode", "norm"), MODES_AND_NORMS)


class Net(nn.Module):
    """Two residual convolutions, and a last one whose result backward does not need."""

    def __init__(self, norm="bn"):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), NORMS[norm](8)
        self.act, self.c3 = nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x):
        x = self.act(self.n1(self.c1(x)))
        return self.c3(self.act(self.n2(self.c2(x)) + x)).mean((2, 3))


def build(norm="bn", kind=Net):
    torch.manual_seed(0)
    net = kind(norm).double()
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return net


def tiles(count=7, side=12, seed=1):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(norm, mode, change=lambda net: None, *, kind=Net, axis="batch"):
    """The plain module and the partitioned one, each changed in the same way before."""
    plain = build(norm, kind)
    parted = copy.deepcopy(plain)
    for net in (plain, parted):
        change(net)
    handle = partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3, axis=axis))
    return plain, parted, handle


def gradient_of(out):
    return torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))


def step(module, x, call=None):
    x = x.clone().requires_grad_()
    out = module(x) if call is None else call(module, x)
    out.backward(gradient_of(out))
    return out.detach(), x.grad


def differs(one, other):
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


def assert_same(plain, parted, x=None, call=None):
    """A step of each: outputs, the input's gradient, the parameters' and the buffers."""
    x = tiles() if x is None else x
    for name, one, other in zip(("output", "input"), step(parted, x, call), step(plain, x, call), strict=True):
        assert differs(one, other) <= TOLERANCE, name
    assert_same_state(plain, parted)


def assert_same_state(plain, parted):
    for (name, other), (_, one) in zip(plain.named_parameters(), parted.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            # A bias before a norm has a gradient of zero, which rounds.
            scale = other.grad.abs().max().clamp_min(1e-3)
            assert (one.grad - other.grad).abs().max() <= TOLERANCE * scale, name
    for (name, other), (_, one) in zip(plain.named_buffers(), parted.named_buffers(), strict=True):
        assert differs(one.double(), other.double()) <= TOLERANCE, name


# ---------------------------------------------------------------------------- hooks on parameters, and their tensors

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
    found = {}
    for key, net in (("plain", plain), ("parted", parted)):
        given = {name: (1.5 * value.detach()).requires_grad_() for name, value in net.named_parameters()}
        x = tiles().requires_grad_()
        out = torch.func.functional_call(net, given, x)
        found[key] = torch.autograd.grad(out, [x, *given.values()], gradient_of(out))
        assert all(value.grad is None for value in net.parameters())
        # Not a leaf, and only some: what is given may be computed, as a learner's step is.
        some = {name: 1.5 * value for name, value in net.named_parameters() if name.startswith(("c2", "n2"))}
        step(net, tiles(), lambda module, x, some=some: torch.func.functional_call(module, some, x))
    for one, other in zip(found["parted"], found["plain"], strict=True):
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


# -------------------------------------------------------------------------------------------------- version counters

CHANGED = "modified by an inplace operation"


@every_mode_and_norm
@pytest.mark.parametrize("what", ["input", "weight", "normed"])
def test_what_backward_reads_again_must_not_change(what, mode, norm):
    _, parted, _ = pair(norm, mode)
    # One row a tile more than what offload leaves on the device: of what it has copied nothing can change.
    x = tiles(side=8 if mode == "offload" else 12)
    out = parted(x)
    with torch.no_grad():
        target = {"input": x, "weight": parted.c2.weight, "normed": parted.n2.weight}[what]
        target.mul_(1.1)
    name = {"input": "the input", "weight": r"parameter 'c2.weight'", "normed": r"parameter 'n2.weight'"}[what]
    with pytest.raises(RuntimeError, match=f"{CHANGED}: .*which is {name}.*version"):
        out.backward(gradient_of(out))


@pytest.mark.parametrize("mode", ["lean", "recompute", "checkpoint", "stream"])
def test_the_sentence_is_autograds_with_the_name(mode):
    _, parted, _ = pair("bn", mode)
    out = parted(tiles())
    with torch.no_grad():
        parted.c2.weight.mul_(1.1).add_(1)
    version = parted.c2.weight._version
    with pytest.raises(RuntimeError) as caught:
        out.backward(gradient_of(out))
    assert str(caught.value) == (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[torch.DoubleTensor [8, 8, 3, 3]], which is parameter 'c2.weight', is at version {version}; expected version "
        f"{version - 2} instead."
    )


@every_mode
def test_one_buffer_refilled_for_the_next_bag(mode):
    plain, parted, _ = pair("bn", mode)
    for net in (plain, parted):
        x = tiles(side=8)
        first = net(x)
        x.copy_(tiles(side=8, seed=5))
        second = net(x)
        second.backward(gradient_of(second))
        with pytest.raises(RuntimeError, match=CHANGED):
            first.backward(gradient_of(first))


@every_mode
def test_a_buffer_that_backward_reads_again(mode):
    class Placed(Net):
        def __init__(self, norm):
            super().__init__(norm)
            self.register_buffer("place", torch.rand(8, 1, 1))

        def forward(self, x):
            x = self.act(self.n1(self.c1(x))) * self.place
            return self.c3(self.n2(self.c2(x))).mean((2, 3))

    for change in (lambda net: net.place.mul_(2), lambda net: net.n2.running_var.mul_(2)):
        _, parted, _ = pair("bn", mode, kind=Placed)
        parted.n2.eval()
        out = parted(tiles(side=8))
        change(parted)
        with pytest.raises(RuntimeError, match=CHANGED):
            out.backward(gradient_of(out))


@every_mode_and_norm
def test_what_backward_does_not_read_may_change(mode, norm):
    """Two calls in flight, whose norms write running statistics; an input that nothing trainable reads; .data."""
    plain, parted, _ = pair(norm, mode)
    for net in (plain, parted):
        net.c1.requires_grad_(False)
        net.n1.eval().requires_grad_(False)
        x = tiles()
        with torch.no_grad():
            between = net.act(net.n1(net.c1(x)))
        del between
        first, second = net(x), net(tiles(seed=4))
        second.backward(gradient_of(second))
        first.backward(gradient_of(first))
    assert_same_state(plain, parted)


@every_mode
def test_inference_tensors_count_no_versions(mode):
    _, parted, _ = pair("gn", mode)
    with torch.inference_mode():
        x = tiles()
    parted.c1.requires_grad_(False)  # autograd saves no inference tensor
    if mode in KEEPS_GRAPHS:
        parted.eval()
    out = parted(x.clone())
    out.backward(gradient_of(out))


# --------------------------------------------------------------------------------------- wrappers, parts, and removal


@every_norm
def test_a_wrapper_set_over_the_partition_is_not_lost(norm):
    _, parted, handle = pair(norm, "lean")
    ours = parted.forward
    parted.forward = functools.wraps(ours.original)(lambda x: ours(x) * 2)
    wrapper, hooks = parted.forward, dict(parted._forward_pre_hooks)
    with pytest.raises(ValueError, match=r"got 'Net.forward' set over it \(Net\)"):
        handle.remove()
    assert parted.forward is wrapper
    assert parted._forward_pre_hooks == hooks
    assert handle.forward is ours
    with pytest.raises(ValueError, match="partitioned twice"):
        partition_layers(parted, PartitionPolicy(mode="lean", chunk_size=3))
    parted.forward = ours
    handle.remove()
    assert "forward" not in parted.__dict__
    assert not parted._forward_pre_hooks
    assert_same(build(norm), parted)


def test_a_wrapper_over_a_layer_of_the_papers_mode_is_not_lost():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double()
    handle = partition_layers(net, PartitionPolicy(mode="paper", chunk_size=3))
    theirs = net[0].forward
    net[0].forward = lambda x: theirs(x) * 2
    with pytest.raises(ValueError, match=r"set over it \(layer 0\)"):
        handle.remove()
    assert "forward" in net[1].__dict__
    net[0].forward = theirs
    handle.remove()
    assert "forward" not in net[1].__dict__


@every_mode_and_norm
def test_a_part_that_is_partitioned_is_named(mode, norm):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = build(norm), nn.Linear(6, 4).double()

        def forward(self, x):
            return self.b(self.a(x))

    sentence = (
        r"Blocks must not hold a partitioned part, got 'a'. HINT: handle.remove\(\) of 'a' first, "
        "or partition parts side by side."
    )
    policy = PartitionPolicy(mode=mode, chunk_size=3)
    blocks = Blocks()
    inner = partition_layers(blocks.a, policy)
    with pytest.raises(ValueError, match=sentence):
        partition_layers(blocks, policy)
    ours = blocks.a.forward
    blocks.a.forward = lambda x: ours(x)
    with pytest.raises(ValueError, match=sentence):
        partition_layers(blocks, policy)
    blocks.a.forward = ours
    inner.remove()
    partition_layers(blocks, policy)
    partition_layers(blocks.a, policy)  # nobody tells the inner one
    with pytest.raises(ValueError, match=sentence):
        blocks(tiles())


# --------------------------------------------------------------------------------------------------- copies of it

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


class Scaled(Net):
    def __init__(self, norm="bn"):
        super().__init__(norm)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("mode", [*MODES, "paper", "native"])
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_parts_of_its_own(how, axis, mode):
    plain, parted, handle = pair("bn", mode, axis=axis, kind=Scaled)
    assert_same(plain, parted)
    ours, theirs = COPIES[how](plain), COPIES[how](parted)
    for net in (ours, theirs):
        net.scale = 2.0
        with torch.no_grad():
            net.c2.weight.mul_(1.5)
    assert_same(ours, theirs)
    handle.remove()
    assert_same(ours, theirs)
    assert_same(plain, parted)


@pytest.mark.parametrize("mode", [*MODES, "paper", "native"])
@pytest.mark.parametrize("axis", ["batch", "spatial"])
def test_a_shallow_copy_is_exact_while_it_holds_the_same_and_else_refused(axis, mode):
    plain, parted, handle = pair("bn", mode, axis=axis, kind=Scaled)
    ours, theirs = copy.copy(plain), copy.copy(parted)
    assert_same(ours, theirs)
    theirs.scale = 2.0  # the partition computes with the module that was partitioned
    sentence = r"a shallow copy of a partitioned Scaled must hold what that one holds, got another 'scale'.*HINT"
    with pytest.raises(ValueError, match=sentence):
        theirs(tiles())
    theirs.scale = 1.0
    assert_same(ours, theirs)
    theirs.eval()
    with pytest.raises(ValueError, match="got another 'training'"):
        theirs(tiles())
    handle.remove()
    assert not parted._forward_pre_hooks


@every_mode
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("checks", [True, False])
def test_an_activation_that_a_norm_holds_is_its_owners_to_call(checks, axis, mode):
    class Told(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act, self.drop = nn.SiLU(), nn.Hardtanh()

    plain = build()
    plain.n1 = Told(8).double()
    parted = copy.deepcopy(plain)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3, axis=axis), check=checks)
    assert_same(plain, parted)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, SyncBatchNormAct])
def test_the_stand_in_of_a_synchronised_norm_calls_what_its_class_calls(kind):
    norm = kind(3).double()
    norm.act = nn.SiLU()
    plain = nn.BatchNorm2d(3).double()
    x = tiles()
    with Restored(norm, torch.device("cpu")):
        found = norm(x)
    expected = plain(x)
    assert differs(found, norm.act(expected) if kind is SyncBatchNormAct else expected) <= TOLERANCE
    assert type(norm) is kind


# ---------------------------------------------------------------------------------------- what autograd does around it

ONCE = "must be differentiated once and in reverse, got "


@every_mode_and_norm
@pytest.mark.parametrize("through", ["grad", "loss"])
def test_a_gradient_has_no_gradient(through, mode, norm):
    _, parted, _ = pair(norm, mode)
    x = tiles().requires_grad_()
    out = parted(x)
    # `out.sum()`: what flows in needs no gradient itself, and yet the result depends on the parameters.
    target = out.sum() if through == "loss" else (out**2).sum()
    (grad,) = torch.autograd.grad(target, x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match=ONCE + "create_graph"):
        grad.square().sum().backward()


@every_mode_and_norm
def test_a_first_gradient_under_create_graph_is_exact(mode, norm):
    plain, parted, _ = pair(norm, mode)
    for net in (plain, parted):
        out = net(tiles())
        out.backward(gradient_of(out), create_graph=True)
    assert_same_state(plain, parted)
    for net in (plain, parted):
        net.zero_grad()  # or they would keep their graphs


@every_mode_and_norm
def test_transforms_of_torch_func_are_refused(mode, norm):
    _, parted, _ = pair(norm, mode)
    x = tiles()
    values = {name: value.detach() for name, value in parted.named_parameters()}

    def loss(given, x):
        return torch.func.functional_call(parted, given, x).sum()

    for call in (
        lambda: torch.func.grad(loss)(values, x),
        lambda: torch.func.vmap(parted)(x[None]),
        lambda: torch.func.vjp(parted, x),
        lambda: torch.func.jvp(parted, (x,), (x,)),
        lambda: torch.func.jacrev(parted)(x),
        lambda: torch.func.functionalize(parted)(x),
        lambda: torch.func.linearize(parted, x),
    ):
        with pytest.raises(RuntimeError, match=ONCE):
            call()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=ONCE + "forward mode"):
            parted(dual)
        with torch.no_grad(), pytest.raises(RuntimeError, match=ONCE + "forward mode"):
            parted(dual)
        assert parted(x).shape == (7, 6)  # beside it


@every_mode
def test_several_gradients_at_once_are_refused(mode):
    _, parted, _ = pair("gn", mode)
    x = tiles().requires_grad_()
    out = parted(x)
    with pytest.raises(RuntimeError, match=ONCE + "several gradients"):
        torch.autograd.grad(out, x, torch.eye(6, dtype=x.dtype)[:, None].expand(6, 7, 6), is_grads_batched=True)


def _save_on_cpu():
    return torch.autograd.graph.save_on_cpu()


def _identity_hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor)


@every_mode_and_norm
@pytest.mark.parametrize("hooks", [_save_on_cpu, _identity_hooks])
def test_hooks_on_saved_tensors_around_a_call(hooks, mode, norm):
    plain, parted, _ = pair(norm, mode)

    def call(module, x):
        with hooks():
            return module(x)

    if mode == "offload" and hooks is _save_on_cpu:
        assert_same(plain, parted, call=call)
        return
    with pytest.raises(RuntimeError) as caught, hooks():
        parted(tiles())
    assert str(caught.value) == (
        "no hooks on saved tensors may be set around a partitioned module, got some (save_on_cpu?). "
        'HINT: mode "offload" does the same.'
    )


@every_mode_and_norm
def test_hooks_on_saved_tensors_where_nothing_is_saved(mode, norm):
    plain, parted, _ = pair(norm, mode)
    with torch.no_grad(), _save_on_cpu():
        assert differs(parted.eval()(tiles()), plain.eval()(tiles())) <= TOLERANCE
    for net in (plain, parted):
        out = net.train()(tiles())
        with _save_on_cpu():  # around backward alone: plain autograd saves nothing there
            out.backward(gradient_of(out))
    assert_same_state(plain, parted)


@every_mode_and_norm
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_it_keeps_its_own_sentence(reentrant, mode, norm):
    _, parted, _ = pair(norm, mode)
    x = tiles().requires_grad_()
    with pytest.raises(RuntimeError, match=r"must not be called inside torch\.utils\.checkpoint"):
        checkpoint(parted, x, use_reentrant=reentrant).sum().backward()


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


# ------------------------------------------------------------------------------ weights that are computed in forward


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@every_mode_and_norm
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("kind", ["parametrized", "hook", "orthogonal", "pruned"])
def test_computed_weights(kind, axis, mode, norm):
    apply = {
        "parametrized": parametrizations.weight_norm,
        "hook": nn.utils.weight_norm,
        "orthogonal": parametrizations.orthogonal,
        "pruned": lambda part: prune.random_unstructured(part, "weight", 0.3),
    }[kind]

    def change(net):
        torch.manual_seed(3)
        apply(net.c2)
        apply(net.c3)
        for parameter in net.parameters():
            parameter.data.mul_(1.1)  # a weight that was computed when it was applied is stale now

    if kind == "orthogonal" and mode not in ("lean", "keep"):
        pytest.skip("as weight_norm; two modes will do")
    plain, parted, _ = pair(norm, mode, change, axis=axis)
    x = tiles() if axis == "batch" else tiles(2, 21)[:, :, :, :13]
    assert_same(plain, parted, x)


@every_mode_and_norm
def test_the_cache_of_parametrized_weights_is_not_the_chunks(mode, norm):
    plain, parted, _ = pair(norm, mode, lambda net: parametrizations.weight_norm(net.c2))
    for net in (plain, parted):
        with parametrize.cached():
            step(net, tiles())
            assert parametrize._cache_enabled == 1
    assert_same_state(plain, parted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("apply", [nn.utils.weight_norm, parametrizations.weight_norm])
@every_mode
def test_computed_weights_of_the_module_itself(apply, mode):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3).double()
    parted = copy.deepcopy(plain)
    apply(plain), apply(parted)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    assert_same(plain, parted)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@every_mode_and_norm
@pytest.mark.parametrize("apply", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_is_refused_in_training_and_exact_in_evaluation(apply, mode, norm):
    plain, parted, _ = pair(norm, mode, lambda net: (torch.manual_seed(3), apply(net.c2), apply(net.c3)))
    with pytest.raises(
        ValueError, match=r"'c2' \(.*Conv2d\) must not write its buffer '.*_u' in forward, got spectral_norm in"
    ):
        parted(tiles())
    for net in (plain, parted):
        net.c2.eval(), net.c3.eval()
    assert_same(plain, parted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_hook_that_computes_a_norms_weight_is_refused():
    _, parted, _ = pair("bn", "lean", lambda net: nn.utils.weight_norm(net.n1))
    with pytest.raises(ValueError, match=r"BatchNorm must have torch's or timm's own forward.*layer 'n1'"):
        parted(tiles())
    parted.eval()(tiles())


@every_mode_and_norm
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_convolution_with_a_forward_of_its_own(when, mode, norm):
    """The last one too, whose result backward does not need; patched before the partition or after a call."""

    def change(net):
        for conv in (net.c1, net.c3):
            conv.forward = lambda x, own=conv.forward: own(x * x) * 2

    if when == "before":
        plain = build(norm)
        parted = copy.deepcopy(plain)
        change(plain), change(parted)
        partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    else:
        plain, parted, _ = pair(norm, mode)
        assert_same(plain, parted)
        change(plain), change(parted)
        plain.zero_grad(), parted.zero_grad()
    assert_same(plain, parted)


@every_mode
@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("checks", [True, False])
def test_a_convolution_whose_own_step_somebody_replaced(checks, axis, mode):
    """As is done for images without a seam."""

    def change(net):
        for conv in (net.c2, net.c3):  # the last one's result backward does not need
            conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    plain = build()
    parted = copy.deepcopy(plain)
    change(plain), change(parted)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3, axis=axis), check=checks)
    assert_same(plain, parted)


# ------------------------------------------------------------------------------- norms whose statistics stand still


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@every_mode
@pytest.mark.parametrize("axis", ["batch", "spatial"])
def test_running_statistics_that_are_not_tracked_any_more(axis, mode, train):
    """`track_running_stats` switched off while they are there, on before and after; and never any."""

    def change(net):
        net.n1.running_mean.normal_(generator=torch.Generator().manual_seed(4))
        net.n1.running_var.fill_(2.0)
        net.n1.track_running_stats = False
        net.n2 = nn.BatchNorm2d(8, track_running_stats=False).double()

    plain, parted, _ = pair("bn", mode, change, axis=axis)
    before = plain.n1.running_mean.clone()
    x = tiles() if axis == "batch" else tiles(2, 21)
    for net in (plain, parted):
        net.train(train)
    assert_same(plain, parted, x)
    assert torch.equal(parted.n1.running_mean, before)
    assert parted.n1.num_batches_tracked == 0
    for net in (plain, parted):
        net.n1.track_running_stats = True
        net.zero_grad()
    assert_same(plain, parted, x)
    assert torch.equal(parted.n1.running_mean, before) is not train


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("mode", ["lean", "recompute", "keep"])
def test_an_instance_norms_running_statistics_move_as_torchs_do(mode, tracks, train):
    def change(net):
        net.n1 = nn.InstanceNorm2d(8, affine=True, track_running_stats=True).double()
        net.n1.track_running_stats = tracks

    plain, parted, _ = pair("gn", mode, change, axis="spatial")
    for net in (plain, parted):
        net.train(train)
    assert_same(plain, parted, tiles(2, 21))


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_the_rules_of_a_norm_are_torchs(kind, train, has, tracks):
    norm = kind(3, track_running_stats=has).train(train)
    norm.track_running_stats = tracks
    theirs = copy.deepcopy(norm)
    z = torch.randn(6, 3) if kind is nn.BatchNorm1d else torch.randn(6, 3, 2, 2)
    out = theirs(z)
    axes = [axis for axis in range(z.dim()) if axis != 1]
    mean, var = z.mean(axes), z.var(axes)
    assert takes_population(norm) == bool(out.mean(axes).abs().max() < 1e-5)
    track(norm, mean, var)
    for one, other in zip(norm.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- torch.compile


class Top(nn.Module):
    """A model that holds an encoder, for `torch.compile`."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(6, 2).double()
        nn.init.constant_(self.head.weight, 0.3)
        nn.init.constant_(self.head.bias, 0.1)

    def forward(self, x):
        return self.head(torch.tanh(self.encoder(x * 2.0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@every_norm
@pytest.mark.parametrize("mode", ["lean", "recompute", "offload", "native"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_that_holds_a_partitioned_encoder(backend, mode, norm, capfd):
    if backend == "inductor" and mode in ("offload", "native"):
        pytest.skip("the compiler sees the same graph")
    torch._dynamo.reset()
    plain, parted, _ = pair(norm, mode)
    plain, parted = Top(plain), Top(parted)
    compiled = torch.compile(parted, backend=backend)
    for _ in range(2):
        assert_same(plain, parted, call=lambda module, x: compiled(x) if module is parted else module(x))
    for net in (plain, parted):
        net.eval()
    with torch.no_grad():
        assert differs(compiled(tiles(5)), plain(tiles(5))) <= 1e-9
    assert "Exception ignored" not in capfd.readouterr().err


COMPILED = {
    "in place": lambda net: net.compile(backend="eager"),
    "convolutions": lambda net: (net.c2.compile(backend="eager"), net.c3.compile(backend="eager")),
    "wrapped convolution": lambda net: setattr(net, "c3", torch.compile(net.c3, backend="eager")),
    "wrapped norm": lambda net: setattr(net, "n2", torch.compile(net.n2, backend="eager")),
    "container": lambda net: (setattr(net, "c2", nn.Sequential(net.c2)), net.c2.compile(backend="eager")),
    "wrapped container": lambda net: setattr(net, "c2", torch.compile(nn.Sequential(net.c2), backend="eager")),
}


@every_mode_and_norm
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_parts(what, mode, norm):
    torch._dynamo.reset()
    plain = build(norm)
    parted = copy.deepcopy(plain)
    COMPILED[what](parted)
    partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3))
    for one, other in zip(step(parted, tiles()), step(plain, tiles()), strict=True):
        assert differs(one, other) <= TOLERANCE
    for one, other in zip(parted.parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-9


@every_mode_and_norm
def test_a_compiled_module_is_partitioned_through(mode, norm):
    torch._dynamo.reset()
    plain = build(norm)
    parted = copy.deepcopy(plain)
    compiled = torch.compile(parted, backend="eager")
    handle = partition_layers(compiled, PartitionPolicy(mode=mode, chunk_size=3))
    assert handle.module is parted
    assert_same(plain, parted, call=lambda module, x: compiled(x) if module is parted else module(x))
    handle.remove()
    plain.zero_grad(), parted.zero_grad()
    assert_same(plain, parted, call=lambda module, x: compiled(x) if module is parted else module(x))


# --------------------------------------------------------------------------------------------- plans of such modules


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    "change",
    [
        lambda net: nn.utils.weight_norm(net.c2),
        lambda net: parametrizations.weight_norm(net.c2),
        lambda net: net.c2.compile(backend="eager"),
        lambda net: setattr(net, "c2", torch.compile(net.c2, backend="eager")),
    ],
    ids=["hook", "parametrized", "compiled", "wrapped"],
)
def test_a_plan_of_computed_weights_and_compiled_parts(change):
    torch._dynamo.reset()
    plain = build("gn")
    parted = copy.deepcopy(plain)
    change(plain), change(parted)
    step(plain, tiles()), step(parted, tiles())  # a weight that is no leaf
    partition_layers(parted, PartitionPolicy(mode="auto", gpu_budget_bytes=200_000))
    plain.zero_grad(), parted.zero_grad()
    assert_same(plain, parted)
