"""Error feedback loses nothing: what is sent and what is kept are what came in, bit by bit."""

import pytest
import torch

from ds_wsi.compression.residual import Residuals, clip_scale, fold
from ds_wsi.compression.topk import top_k
from ds_wsi.compression.wire import Section, decode, encode, round_values

NAMES, NUMELS = ("a", "b", "c"), (40, 1, 23)
D = sum(NUMELS)


def gradients(steps, d=D):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(d, generator=generator) for _ in range(steps)]


def whole(residuals, prefix="residual."):
    state = residuals.state_dict()
    return torch.cat([state.get(prefix + name, torch.zeros(n)) for name, n in zip(NAMES, NUMELS, strict=True)])


def send(residuals, gradient, k, values="fp32"):
    """A step of one rank; returns what a receiver decodes, dense."""
    pending = residuals.accumulate(NAMES, NUMELS, gradient)
    indices = top_k(pending.corrected, k)
    message = encode([Section(0, D, indices, pending.corrected[indices])], step=0, values=values)
    (section,) = decode(message).sections
    residuals.commit(pending, section.indices, section.values)
    dense = torch.zeros(D)
    dense[slice(None) if section.indices is None else section.indices] = section.values
    return dense


@pytest.mark.parametrize("k", [1, 6, D])
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
def test_sent_and_residual_are_input_and_old_residual(values, k):
    residuals = Residuals()
    for gradient in gradients(5):
        old = whole(residuals)
        sent = send(residuals, gradient, k, values)
        # At an entry that is sent the residual is the rounding of c, which float32 holds exactly.
        assert torch.equal(sent + whole(residuals), gradient + old)
        assert torch.equal(sent.count_nonzero(), torch.tensor(k))
        if values == "fp32":
            assert (whole(residuals) * sent == 0).all()


def test_what_is_too_large_for_fp16_is_sent_in_parts():
    residuals = Residuals()
    gradient = torch.zeros(D).index_fill_(0, torch.tensor([3]), 100_000.0)
    first = send(residuals, gradient, 1, "fp16")
    second = send(residuals, torch.zeros(D), 1, "fp16")
    assert (first + second)[3] == 65504 + round_values(torch.tensor(34496.0), "fp16")


def test_keeping_everything_is_dense():
    residuals = Residuals()
    for gradient in gradients(3):
        assert torch.equal(send(residuals, gradient, D), gradient)
        assert not whole(residuals).any()


def test_momentum_correction_is_a_written_out_loop():
    """DGC, Algorithm 4, entry by entry in Python."""
    momentum, k = 0.5, 4  # products with 0.5 are exact, so a fused multiply-add gives the same bits
    residuals = Residuals(momentum)
    u, v = [0.0] * D, [0.0] * D
    for gradient in gradients(6):
        for i, g in enumerate(gradient.tolist()):
            u[i] = torch.tensor(momentum * u[i] + g, dtype=torch.float32).item()
            v[i] = torch.tensor(v[i] + u[i], dtype=torch.float32).item()
        largest = sorted(range(D), key=lambda i: (-abs(v[i]), i))[:k]
        expected = [v[i] if i in largest else 0.0 for i in range(D)]
        for i in largest:
            u[i] = v[i] = 0.0
        assert send(residuals, gradient, k).tolist() == expected
        assert whole(residuals).tolist() == v
        assert whole(residuals, "velocity.").tolist() == u


def test_momentum_correction_of_everything_is_sgd_with_momentum():
    residuals, weight = Residuals(0.5), torch.zeros(D, requires_grad=True)
    optimizer, replica = torch.optim.SGD([weight], lr=1.0, momentum=0.5), torch.zeros(D)
    for gradient in gradients(4):
        weight.grad = gradient
        optimizer.step()
        pending = residuals.accumulate(NAMES, NUMELS, gradient)
        replica -= pending.corrected
        residuals.commit(pending, None, pending.corrected)
        assert torch.equal(replica, weight)


def test_what_is_sent_whole_keeps_its_velocity():
    residuals = Residuals(0.5)
    indices = torch.tensor([0, 40, *range(41, 64)])
    for _ in range(2):
        pending = residuals.accumulate(NAMES, NUMELS, torch.ones(D))
        residuals.commit(pending, indices, pending.corrected[indices], whole=[(41, 64)])
    assert pending.corrected[:2].tolist() == [0, 2.5]
    assert whole(residuals, "velocity.").tolist() == [0.0] + [1.5] * 39 + [0.0] + [1.5] * 23


def test_an_overflow_leaves_no_trace():
    residuals = Residuals(0.9)
    send(residuals, gradients(1)[0], 5)
    before = residuals.state_dict()
    pending = residuals.accumulate(NAMES, NUMELS, torch.full((D,), float("nan")))
    assert pending.corrected.isnan().all()
    assert all(torch.equal(before[key], tensor) for key, tensor in residuals.state_dict().items())


def test_residuals_are_found_by_name_in_other_buckets():
    residuals, gradient = Residuals(), gradients(1)[0]
    send(residuals, gradient, 5)
    old = whole(residuals)
    pending = residuals.accumulate(("c", "a"), (23, 40), torch.zeros(63))
    assert torch.equal(pending.corrected, torch.cat([old[41:], old[:40]]))
    residuals.commit(pending, None, pending.corrected.clone())
    assert not whole(residuals)[:40].any()
    assert torch.equal(whole(residuals)[40:41], old[40:41])


def test_a_gradient_is_not_changed_and_may_be_half():
    residuals, gradient = Residuals(), gradients(1)[0].half()
    before = gradient.clone()
    pending = residuals.accumulate(NAMES, NUMELS, gradient)
    residuals.commit(pending, torch.tensor([0]), pending.corrected[:1])
    assert torch.equal(gradient, before)
    assert pending.corrected.dtype == torch.float32
    full = gradients(1)[0]
    pending = residuals.accumulate(NAMES, NUMELS, full)
    residuals.commit(pending, None, pending.corrected)
    assert torch.equal(full, gradients(1)[0])


def test_a_loaded_state_continues_as_if_never_left(tmp_path):
    from safetensors.torch import load_file, save_file

    one, two = Residuals(0.9), Residuals(0.9)
    steps = gradients(6)
    for gradient in steps[:3]:
        send(one, gradient, 5)
    save_file(one.state_dict(), tmp_path / "residuals.safetensors")
    two.load_state_dict(load_file(tmp_path / "residuals.safetensors"))
    for gradient in steps[3:]:
        assert torch.equal(send(one, gradient, 5), send(two, gradient, 5))


def test_folding_keeps_what_the_ranks_owe():
    ranks = [Residuals() for _ in range(4)]
    for rank, gradient in zip(ranks, gradients(4), strict=True):
        send(rank, gradient, 5)
    owed = sum(whole(rank) for rank in ranks) / 4
    folded = fold([rank.state_dict() for rank in ranks])
    fewer = [Residuals(), Residuals()]
    for rank in fewer:
        rank.load_state_dict(folded)
    assert torch.equal(sum(whole(rank) for rank in fewer) / 2, owed)


def test_clipping_is_before_the_residual_and_by_ranks():
    gradient = gradients(1)[0]
    norm = gradient.norm().item()
    assert clip_scale(gradient, norm * 2.01, 4).item() == 1
    assert clip_scale(gradient, norm, 4).item() == pytest.approx(0.5, rel=1e-6)
    assert clip_scale(torch.zeros(3), 1.0, 1).item() == 1
    residuals = Residuals()
    scale = clip_scale(gradient, norm / 2, 1)
    pending = residuals.accumulate(NAMES, NUMELS, gradient, scale=scale)
    assert torch.equal(pending.corrected, gradient * scale)
    for wrong in (float("nan"), float("inf")):
        assert clip_scale(torch.tensor([1.0, wrong]), 1.0, 1).isnan()


def refused():
    residuals = Residuals()
    residuals.commit(residuals.accumulate(("a",), (2,), torch.ones(2)), torch.tensor([0]), torch.ones(1))
    state = residuals.state_dict()
    yield lambda: Residuals(1.0), r"momentum must be in \[0, 1\), got 1.0"
    yield lambda: residuals.accumulate(("a",), (3,), torch.ones(3)), r"3 values after 2 \(a\). HINT"
    yield lambda: residuals.accumulate(("a",), (2,), torch.ones(3)), r"2 values of 1 names, got \(3,\)"
    yield lambda: residuals.accumulate(("a", "a"), (1, 1), torch.ones(2)), r"names of their own"
    yield lambda: Residuals(0.9).load_state_dict(state), r"same kind of momentum, got 0 velocities of 1"
    yield lambda: residuals.load_state_dict({"other": torch.ones(1)}), r"got \['other'\]"
    yield lambda: residuals.load_state_dict({"residual.a": torch.ones(1).half()}), r"flat float32"
    yield lambda: fold([]), r"states to fold"
    yield lambda: fold([state, {}]), r"same parameters on every rank"


@pytest.mark.parametrize(("call", "said"), list(refused()))
def test_wrong_use_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def trained_loss(step):
    """Mean loss of least squares after 300 steps whose gradient went through `step`."""
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(200, D, generator=generator), torch.randn(D, generator=generator)
    y, w = x @ truth, torch.zeros(D)
    for _ in range(300):
        w -= 0.02 * step(x.T @ (x @ w - y) / len(x))
    return ((x @ w - y) ** 2).mean().item() / (y**2).mean().item()


def test_the_feedback_trains_where_the_papers_misprint_does_not():
    """Printed Algorithm 1 sets `residual <- 0` at every step, so only entries that are large at once ever move."""
    kept, forgotten = Residuals(), Residuals()

    def misprint(gradient):
        forgotten.load_state_dict({})
        return send(forgotten, gradient, 1)

    dense, fed_back, printed = (
        trained_loss(lambda g: g),
        trained_loss(lambda g: send(kept, g, 1)),
        trained_loss(misprint),
    )
    assert dense < 0.01
    assert fed_back < 0.01
    assert printed > 10 * fed_back
