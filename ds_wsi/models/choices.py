"""What can be chosen of a model, by name; help pages need no torch for it."""

from ds_wsi.models.own import AGGREGATOR, installed, is_own

BAGS = ("slide", "patient")  # what a bag is of
FEATURES = ("pooled", "flattened", "cls_mean")  # what leaves an encoder
# Name -> module of `ds_wsi.models.aggregators`, and class.
AGGREGATORS = {
    "abmil": ("abmil", "ABMIL"),
    "gated_abmil": ("abmil", "GatedABMIL"),
    "mean": ("pooling", "MeanMIL"),
    "max": ("pooling", "MaxMIL"),
    "clam_sb": ("clam", "CLAMSB"),
    "clam_mb": ("clam", "CLAMMB"),
    "dsmil": ("dsmil", "DSMIL"),
    "dtfd": ("dtfd", "DTFD"),
    "transmil": ("transmil", "TransMIL"),
    "acmil": ("acmil", "ACMIL"),
    "rrtmil": ("rrtmil", "RRTMIL"),
    "abmilx": ("abmilx", "ABMILX"),
}


class AggregatorNames(tuple[str, ...]):
    """The names above as an option's choices, which takes own code's too: see `ds_wsi.models.own`."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and is_own(name, AGGREGATOR))

    def found(self) -> list[str]:
        """Further names, of installed packages; a look at each of them, so for an error alone."""
        return sorted(installed(AGGREGATOR).keys() - set(self))
