"""A module that is run to look at it, and is afterwards what it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ds_wsi.partition.graph.unrecorded import ForbiddenError
from ds_wsi.partition.module.holdings import attributes_of, containers_of, plain_attributes_since, refill
from ds_wsi.partition.module.restored import foreign_generators, mark, own_generators


@contextmanager
def untouched(module: nn.Module) -> Iterator[dict[tuple[str, str], Any]]:
    """Every part's attributes are afterwards what they were, and all generators but torch's where they were.

    Yields:
        (part, name) -> value of the numbers, flags and strings, and short containers of them, that were not there
        before: filled at the end.

    Raises:
        ForbiddenError: a number, flag or string has another value, or one of these generators has moved.
    """
    generators = [*foreign_generators(), *own_generators(module)]
    states = [generator.read() for generator in generators]
    parts = list(module.named_modules())
    before = [
        (
            dict(part.__dict__),
            {key: dict(part.__dict__[key]) for key in _TABLES},
            dict(attributes_of(part)),
            containers_of(part),
        )
        for _, part in parts
    ]
    made: dict[tuple[str, str], Any] = {}
    try:
        yield made
        for generator, state in zip(generators, states, strict=True):
            if mark(generator.read()) != mark(state):
                raise ForbiddenError(
                    f"{type(module).__name__} must draw from torch's default generators, got draws of "
                    f"{generator.name}. HINT: torch.rand."
                )
        for (name, part), (attributes, _, plain, _) in zip(parts, before, strict=True):
            made.update(((name, key), value) for key, value in plain_attributes_since(part, attributes))
            for key, value in attributes_of(part):
                old = plain.get(key)
                if old is not None and value is not None and value != old:
                    raise ForbiddenError(
                        f"{name!r} ({type(part).__name__}) must not change its attribute {key!r} in forward, got "
                        f"{old!r} -> {value!r}. HINT: keep it out of the partition."
                    )
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.write(state)
        for (_, part), (attributes, tables, _, containers) in zip(parts, before, strict=True):
            for container, content in containers:
                refill(container, content)
            for key in set(part.__dict__) - set(attributes):
                del part.__dict__[key]
            part.__dict__.update(attributes)
            for key, table in tables.items():
                present = part.__dict__[key]
                if [(name, id(item)) for name, item in present.items()] != [
                    (name, id(item)) for name, item in table.items()
                ]:
                    present.clear()
                    present.update(table)


_TABLES = ("_parameters", "_buffers", "_modules")
