"""What a row of the table of private names says, and the versions whose source was looked at."""

from typing import NamedTuple

# Package -> the oldest and the newest release whose source was looked at.
SEEN = {
    "torch": ("2.11.0", "2.14.1"),
    "deepspeed": ("0.19.0", "0.19.8"),
    "accelerate": ("1.10.0", "1.15.0"),
    "transformers": ("4.57.1", "5.24.0"),
}


class SeamError(ValueError):
    """An installed package lacks a private name that ds_wsi uses; names it, the versions and the remedy."""


class Seam(NamedTuple):
    """A private name.

    Attributes:
        name: `module:path` is what is imported and looked up. `module:*.name` is an attribute that the module gives to
            instances, which no class tells: there the module's text must have the name.
        use: what needs it: `check_seams` checks the rows of a use together.
        purpose: what it is used for, in words.
        places: packages of ds_wsi that may write it.
        takes: names of its parameters, where ds_wsi calls or replaces it.
        optional: whether there is an older way, at the place where it is used, where it is missing.
        since: the oldest version that has it; empty: the oldest of `SEEN`.
    """

    name: str
    use: str
    purpose: str
    places: tuple[str, ...] = ()
    takes: tuple[str, ...] | None = None
    optional: bool = False
    since: str = ""

    @property
    def package(self) -> str:
        """The distribution."""
        return self.name.partition(":")[0].partition(".")[0]

    @property
    def leaf(self) -> str:
        """What is written in the source: the last part of the name."""
        return self.name.rpartition(":")[2].rpartition(".")[2]

    @property
    def dotted(self) -> str:
        """The name in words of an error."""
        return self.name.replace(":*.", " > ").replace(":", ".")
