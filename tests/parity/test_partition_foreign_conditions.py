"""Modules that decide or draw in their forward: exact in a partition, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from foreign_module_cases import (
    MODES,
    TILES,
    Middle,
    assert_exact,
    build,
    every_norm,
    kinds_of_modes,
    parted,
    refusal,
    step,
    tiles,
)
from torch import nn
from torch.nn.utils import parametrize


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
