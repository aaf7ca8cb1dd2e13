"""Slide aggregators (MIL pooling): each takes a StackedBags of features and returns a SlideOutput."""

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature

from torch import nn

from ds_wsi.models.aggregators.abmil import layer_widths
from ds_wsi.models.choices import AGGREGATORS as HOMES
from ds_wsi.models.own import AGGREGATOR, check_options, find_own, installed, is_own
from ds_wsi.models.own_parts import GIVEN, build_own_aggregator
from ds_wsi.runtime.contracts import needs_labels, order_matters
from ds_wsi.targets.choices import CLASSIFICATION

AGGREGATORS: dict[str, Callable[..., nn.Module]] = {
    name: getattr(import_module(f"{__name__}.{module}"), kind) for name, (module, kind) in HOMES.items()
}
WIDTHS = "embed"
MAY_BE_ZERO = ("masked",)  # of the whole numbers among the options


def build_aggregator(name: str, in_dim: int, num_classes: int, **options: float | str) -> nn.Module:
    """Build an aggregator by name for features [N, in_dim] and logits [B, num_classes].

    One logit, `num_classes=1`, is for a loss of your own: `F.binary_cross_entropy_with_logits(logits.squeeze(1),
    labels.float())`, a hazard, a regression. `stack_loss`, and what trains with it, take two classes or more.

    Args:
        name: a key of `AGGREGATORS`; or `module:Class` of your own, or what an installed package calls its aggregator
            (entry points `ds_wsi.aggregators`).
        in_dim: width of the features.
        num_classes: width C of the logits.
        options: arguments of the aggregator's own constructor, by name; what is not given is its original's.

    Raises:
        ValueError: an unknown name or option, an option of another type than its default, sizes that are not
            positive, or one logit of an aggregator whose own loss is over classes.
    """
    check_aggregator(name, options)
    if in_dim < 1 or num_classes < 1:
        raise ValueError(f"in_dim and num_classes must be >= 1, got {in_dim} and {num_classes}")
    if name not in AGGREGATORS:
        return build_own_aggregator(name, find_own(name, AGGREGATOR), in_dim, num_classes, options)
    if num_classes == 1 and needs_labels(AGGREGATORS[name]):
        others = [key for key, kind in AGGREGATORS.items() if not needs_labels(kind)]
        raise ValueError(
            f"num_classes must be at least 2 for {name}, whose own loss is a cross-entropy over classes, got 1. "
            f"HINT: num_classes=2, or one logit of {', '.join(others)}."
        )
    if WIDTHS in options:
        options[WIDTHS] = str(options[WIDTHS])
    return AGGREGATORS[name](in_dim, num_classes, **options)


def require_serves(name: str, kind: str, built: nn.Module | None = None) -> None:
    """Refuse an aggregator whose own loss is over classes for a task that has none.

    Args:
        name: a key of `AGGREGATORS`, or a name of own code.
        kind: the task's.
        built: the aggregator itself, which own code is asked by.

    Raises:
        ValueError: names the aggregators that serve the task.
    """
    asked = AGGREGATORS.get(name, built)
    if asked is not None and kind != CLASSIFICATION and needs_labels(asked):
        others = [key for key, aggregator in AGGREGATORS.items() if not needs_labels(aggregator)]
        raise ValueError(
            f"--aggregator of --task {kind} must be one of {', '.join(others)}, got {name}, whose own loss is over "
            f"classes. HINT: --aggregator {'gated_abmil' if 'gated_abmil' in others else others[0]}."
        )


def require_unordered(name: str, what: str, built: nn.Module | None = None) -> None:
    """Refuse an aggregator that takes a bag's order for places on a slide, for bags that have no such order.

    Args:
        name: a key of `AGGREGATORS`, or a name of own code.
        what: the option that makes such bags, with its value.
        built: the aggregator itself, which own code is asked by.

    Raises:
        ValueError: names the aggregators that may take its place.
    """
    asked = AGGREGATORS.get(name, built)
    if asked is not None and order_matters(asked):
        others = [key for key, aggregator in AGGREGATORS.items() if not order_matters(aggregator)]
        raise ValueError(
            f"--aggregator of {what} must be one of {', '.join(others)}, got {name}, which takes tiles that follow "
            "each other in a bag for neighbours on one slide. HINT: --aggregator gated_abmil."
        )


def check_aggregator(name: str, options: Mapping[str, float | str]) -> None:
    """Refuse what `build_aggregator` would refuse of a name and options, before anything is built.

    Raises:
        ValueError: see there.
    """
    if name not in AGGREGATORS:
        if not is_own(name, AGGREGATOR):
            names = ", ".join((*AGGREGATORS, *installed(AGGREGATOR)))
            raise ValueError(f"aggregator must be one of {names}, or MODULE:CLASS of your own, got {name!r}")
        check_options(name, find_own(name, AGGREGATOR), options, GIVEN)
        return
    parameters = signature(AGGREGATORS[name]).parameters.values()
    defaults = {entry.name: entry.default for entry in parameters if entry.default is not Parameter.empty}
    for key, value in options.items():
        if key not in defaults:
            raise ValueError(f"options of {name} must be of {', '.join(defaults)}, got {key!r}")
        kind = type(defaults[key])
        if key == WIDTHS and type(value) in (int, str):  # one width is typed as a number
            layer_widths(str(value))
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name}'s {key} must be of type {kind.__name__}, as {defaults[key]}, got {value!r}")
        least = 0 if key in MAY_BE_ZERO else 1
        if kind is int and int(value) < least:
            raise ValueError(f"{name}'s {key} must be >= {least}, got {value}")
