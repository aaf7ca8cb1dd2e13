"""Mutations of `HostStore`: each takes away one thing that keeps copies and computing apart, and must be noticed.

Text of a method is replaced, in memory only. Where the store's source is changed, adapt the texts here.
"""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType

from ds_wsi.partition.execution import host_store as staging
from ds_wsi.partition.execution.host_store import HostStore


@dataclass(frozen=True)
class Mutation:
    """One change.

    Args:
        name: what is missing.
        method: a method of `HostStore`.
        old, new: text of the method, and what takes its place.
        schedules: those of `lane.SCHEDULES` under which it must be noticed.
    """

    name: str
    method: str
    old: str
    new: str
    schedules: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "put does not wait for the computing stream",
        "put",
        "self._out.wait_stream(torch.cuda.current_stream(self.device))",
        "pass",
        ("late_writes", "sanitizer"),
    ),
    Mutation(
        "put does not wait for the copy back of the block's last tensor",
        "put",
        "self._out.wait_event(event)",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "put does not keep the tensor until it is sent",
        "put",
        "self._hold_until_sent(ticket, flat)",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "the computing stream does not wait for the oldest copy out",
        "_hold_until_sent",
        "torch.cuda.current_stream(self.device).wait_event(ready)",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "prefetch does not wait for the computing stream",
        "prefetch",
        "self._back.wait_stream(torch.cuda.current_stream(self.device))",
        "pass",
        ("late_writes", "sanitizer"),
    ),
    Mutation(
        "prefetch does not wait for the copy out",
        "prefetch",
        "self._back.wait_event(ticket.ready)",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "get does not wait for the copy back",
        "get",
        "torch.cuda.current_stream(self.device).wait_event(ticket.arrived)",
        "pass",
        ("late_copies", "sanitizer"),
    ),
    Mutation(
        "get lets go of tensors that were sent later",
        "get",
        "self._leaving[0][0].number <= ticket.number",
        "True",
        ("late_copies",),
    ),
    Mutation(
        "release does not wait for a copy back that nobody got",
        "give_up",
        "ticket.stream.wait_event(ticket.arrived)",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "the disk's thread does not wait for the copies of the block's last tensor",
        "_read",
        "event.synchronize()",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "the disk's thread does not wait for the copy out",
        "_write_now",
        "ready.synchronize()",
        "pass",
        ("late_copies",),
    ),
    Mutation(
        "bring does not wait for the computing stream",
        "bring",
        "self._back.wait_stream(stream)",
        "pass",
        ("late_writes", "sanitizer"),
    ),
)


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The store with a mutation, inside.

    Raises:
        AssertionError: the text is not there, once: the table is older than the store.
    """
    original = getattr(HostStore, mutation.method)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutation.old) == 1, f"{mutation.method} must contain, once: {mutation.old}"
    names: dict[str, FunctionType] = {}
    exec(source.replace(mutation.old, mutation.new), vars(staging), names)
    setattr(HostStore, mutation.method, names[mutation.method])
    try:
        yield
    finally:
        setattr(HostStore, mutation.method, original)
