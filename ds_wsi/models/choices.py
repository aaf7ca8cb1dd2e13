"""What can be chosen of a model, by name; help pages need no torch for it."""

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
