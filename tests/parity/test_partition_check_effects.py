"""The check refuses by name what a forward writes or draws beside its output, and outputs that are no tiles'."""

import copy
import random

import numpy as np
import pytest
import torch
from check_cases import Net, both, call, group_norm, modes, refusal, tiles
from torch import nn
from torch.nn.utils import parametrizations


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- refused: state written in forward


class Average(nn.Module):
    """Keeps a running mean of what it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(1))

    def forward(self, x):
        with torch.no_grad():
            self.ema.mul_(0.9).add_(0.1 * x.mean())
        return x


class Attribute(Average):
    """The same in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        del self.ema
        self.ema = torch.zeros(1, dtype=torch.float64)


class Count(Average):
    def __init__(self):
        super().__init__()
        self.ema = torch.zeros((), dtype=torch.long)

    def forward(self, x):
        self.ema += 1
        return x


@modes
@both
@pytest.mark.parametrize("kind", [Average, Attribute, Count])
def test_a_buffer_written_in_forward_is_named_or_written_as_alone(kind, norm, mode):
    plain = Net(norm, kind()).double()
    parted = copy.deepcopy(plain)
    said = refusal(parted, mode)
    if said:
        assert f"'middle' ({kind.__name__}) must not write its buffer 'ema' in forward" in said
    else:
        plain(tiles())
        assert torch.allclose(plain.middle.ema.double(), parted.middle.ema.double())


@both
def test_a_written_buffer_is_named_beside_dropout(norm):
    with pytest.raises(ValueError, match=r"'middle.1' \(Average\) must not write its buffer 'ema' in forward"):
        call(Net(norm, nn.Sequential(nn.Dropout(0.3), Average())).double())


@modes
@both
def test_instance_norm_with_running_statistics_is_named_or_exact(norm, mode):
    plain = Net(norm, nn.InstanceNorm2d(8, affine=True, track_running_stats=True)).double()
    parted = copy.deepcopy(plain)
    said = refusal(parted, mode)
    if said:
        assert "'middle' (InstanceNorm2d) must not write its buffer 'running_mean' in forward" in said
    else:
        plain(tiles())
        assert torch.allclose(plain.middle.running_var, parted.middle.running_var)


def spectral(module, kind):
    for name in ("c2", "c3"):
        kind(getattr(module, name))
    return module


@modes
@both
@pytest.mark.parametrize(
    "kind",
    [parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.weight_norm, nn.utils.weight_norm],
    ids=["spectral", "spectral_hook", "weight", "weight_hook"],
)
def test_a_weight_computed_in_forward_is_refused_or_exact(kind, norm, mode):
    torch.manual_seed(0)
    plain, parted = spectral(Net(norm).double(), kind), spectral(Net(norm).double(), kind)
    parted.load_state_dict(plain.state_dict())
    try:
        said = refusal(parted, mode)
    except RuntimeError as error:  # a trace that copies parametrized layers
        said = str(error)
    if said:
        assert any(words in said for words in ("must not write its buffer", "must be computed", "Serialization"))
        return
    expected = plain(tiles())
    expected.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), parted.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-10), name
    for (name, one), other in zip(plain.named_buffers(), parted.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-7), name


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * self.n


class CountsOnly(Counts):
    def forward(self, x):
        self.n += 1
        return x


class CountsInADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = {"calls": 0}

    def forward(self, x):
        self.n["calls"] += 1
        return x * (1 + self.n["calls"])


class Alternates(Counts):
    def forward(self, x):
        self.n = not self.n
        return x if self.n else -x


@modes
@both
@pytest.mark.parametrize("kind", [Counts, CountsOnly, CountsInADict, Alternates])
def test_an_attribute_that_every_forward_changes_is_named(kind, norm, mode):
    net = Net(norm, kind()).double()
    before = copy.deepcopy(net.middle.n)
    with pytest.raises(ValueError, match=rf"'middle' \({kind.__name__}\) must not change its attribute 'n' in forward"):
        call(net, mode=mode)
    if mode == "recompute":  # the other modes' plans are made of a trace, before
        assert net.middle.n == before


# ------------------------------------------------------------------------------------------ refused: other generators


class Numpy(nn.Module):
    def forward(self, x):
        return x * float(np.random.uniform(0.5, 1.5))


class Python(nn.Module):
    def forward(self, x):
        return x * random.uniform(0.5, 1.5)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers = torch.Generator()

    def forward(self, x):
        return x * torch.rand(len(x), 1, 1, 1, generator=self.numbers, dtype=x.dtype)


NUMBERS = torch.Generator()


class Hidden(nn.Module):
    def forward(self, x):
        return x * torch.rand(len(x), 1, 1, 1, generator=NUMBERS, dtype=x.dtype)


class OwnNumpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def forward(self, x):
        return x * float(self.numbers.uniform(0.5, 1.5))


@both
@pytest.mark.parametrize("mode", ["lean", "recompute"])
@pytest.mark.parametrize("kind", [Numpy, Python, Own, Hidden, OwnNumpy])
def test_draws_that_no_replay_repeats_are_refused(kind, norm, mode):
    net = Net(norm, kind()).double()
    states = np.random.get_state()[1].copy(), random.getstate(), NUMBERS.get_state()
    said = refusal(net, mode)
    assert "must draw from torch's default generators" in said or "must be traceable" in said
    if mode == "recompute":  # the other modes' plans are made of a trace, before
        assert np.array_equal(states[0], np.random.get_state()[1])
        assert states[1] == random.getstate()
        assert torch.equal(states[2], NUMBERS.get_state())


# ------------------------------------------------------------------------------------------------ refused: outputs


@pytest.mark.parametrize("shape", ["scalar", "transposed", "rows of all"])
def test_an_output_without_tiles_is_refused(shape):
    class Odd(Net):
        def forward(self, x):
            f = super().forward(x)
            return {"scalar": f.sum(), "transposed": f.T, "rows of all": f.flatten()[:-1]}[shape]

    with pytest.raises(ValueError, match="must have tiles on its first axis, got"):
        call(Odd(group_norm).double())


class TenFeatures(Net):
    def forward(self, x):
        return torch.cat([super().forward(x), super().forward(x)[:, :4]], dim=1).T


def test_a_transposed_output_whose_rows_the_tiles_divide_is_refused():
    with pytest.raises(ValueError, match=r"must have tiles on its first axis, got \[10, 4\] for 4"):
        call(TenFeatures(group_norm).double())


class Halves(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


@pytest.mark.parametrize("mode", ["lean", "recompute"])
def test_an_input_changed_in_place_is_refused(mode):
    x = tiles()
    module = nn.Sequential(nn.Identity(), Halves(), Net(group_norm)).double()
    with pytest.raises(ValueError, match=r"'1' \(Halves\) must not change the partition's input in place"):
        call(module, x, mode=mode)
    assert torch.equal(x, tiles())
