"""Settings of a run on features: what must not be given with them, and what has no effect on them."""

from dataclasses import fields

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.features import FeatureFile, read_about
from ds_wsi.runtime.log import logger
from ds_wsi.training.settings import ModelSettings, TrainSettings

OF_THE_AGGREGATOR = ("aggregator", "dropout", "aggregator_options", "allow_code", "scale_embedding")
OF_SLIDES = ("slide_mpp", "tissue_masks", "masks_in_bounds", "skip_bad_slides")  # of the data
OF_TILES = ("tiling", "augment", "partition", "norm")  # policies


def check_feature_settings(settings: TrainSettings) -> None:
    """Refuse what contradicts training on features, and log what has no effect on them; nothing without them.

    Raises:
        ValueError: options of an encoder, or a tile store; names them.
    """
    if settings.data.features_dir is None:
        return
    refused = [
        entry.name
        for entry in fields(ModelSettings)
        if entry.name not in OF_THE_AGGREGATOR and getattr(settings.model, entry.name) != entry.default
    ]
    if settings.policies.reading.tile_store:
        refused.append("tile_store")
    if refused:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in refused)} must not be given with --features_dir, which trains an "
            "aggregator without an encoder. HINT: leave them out, or train on slides."
        )
    unused = [name for name in OF_TILES if _differs(settings, name)]
    unused += [name for name in OF_SLIDES if getattr(settings.data, name)]
    if settings.optim.layer_decay != 1:
        unused.append("layer_decay")
    if settings.run.eval_precision != "no":
        unused.append("eval_precision")
    if unused:
        logger.warning("%s: without effect on features", ", ".join(unused))


def encoder_of_features(cohort: Cohort) -> str | None:
    """The encoder, and what tells its weights, as `ds-wsi features` wrote them into every file; else None."""
    encoders = set()
    for part in cohort.parts():
        file = part.grid
        assert isinstance(file, FeatureFile)
        about = read_about(file.path) if file.path.suffix == ".safetensors" else {}
        encoders.add(about.get("encoder"))
        if None in encoders or len(encoders) > 1:
            return None
    return encoders.pop() if encoders else None


def _differs(settings: TrainSettings, policy: str) -> bool:
    if policy == "tiling" and settings.data.manifest is None:
        return False  # the demo's own
    return getattr(settings.policies, policy) != getattr(TrainSettings().policies, policy)
