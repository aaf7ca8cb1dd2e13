"""What callers write between forward and backward, and what autograd does around a call."""

import pytest
import torch
from foreign_call_cases import (
    KEEPS_GRAPHS,
    TOLERANCE,
    Net,
    assert_same,
    assert_same_state,
    differs,
    every_mode,
    every_mode_and_norm,
    gradient_of,
    pair,
    tiles,
)
from torch.utils.checkpoint import checkpoint

CHANGED = "modified by an inplace operation"


@every_mode_and_norm
@pytest.mark.parametrize("what", ["input", "weight", "normed"])
def test_what_backward_reads_again_must_not_change(what, mode, norm):
    _, parted, _ = pair(norm, mode)
    # One row per tile more than what offload leaves on the device: of what it has copied nothing can change.
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
