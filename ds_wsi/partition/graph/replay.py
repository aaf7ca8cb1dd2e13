"""Random numbers of a call, drawn again where its operations are computed again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_wsi.runtime.seeding import generator_states, set_generator_states


class Random:
    """Random numbers of each operation and chunk: drawn once, drawn again in every replay.

    Only operations that were seen to move a generator are recorded: 5 kB each on a CPU.
    """

    def __init__(self, device: torch.device, *, replayable: bool = True) -> None:
        self.device, self.replayable = device, replayable
        self.states: dict[Any, list[Tensor]] = {}
        self.quiet: set[Any] = set()

    def read(self) -> list[Tensor]:
        """The states of the generators that an operation could draw from."""
        return generator_states(self.device)

    def write(self, states: list[Tensor]) -> None:
        """Set them."""
        set_generator_states(states, self.device)

    def call(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()` with the random numbers that it drew the first time it was called under `key`."""
        if not self.replayable or key in self.quiet:
            return compute()
        if key in self.states:
            ambient = self.read()
            self.write(self.states[key])
            try:
                return compute()
            finally:
                self.write(ambient)
        before = self.read()
        out = compute()
        if all(map(torch.equal, before, self.read())):
            self.quiet.add(key)
        else:
            self.states[key] = before
        return out
