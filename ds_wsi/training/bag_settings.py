"""Settings of what a bag holds: patients, magnifications; what must not be given with them."""

from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.training.settings import TrainSettings


def require_bag_settings(settings: TrainSettings) -> None:
    """Refuse settings of bags that contradict each other, before an engine is started.

    Raises:
        ValueError: names the option and what it may be.
    """
    data, reading, mpp = settings.data, settings.policies.reading, settings.policies.tiling.mpp
    if data.joined_by:
        from ds_wsi.models.aggregators import require_unordered  # here, because help pages need no torch

        require_unordered(settings.model.aggregator, data.joined_by)
    if data.scale_ratio and len(data.scale_ratio) != len(data.mpps):
        raise ValueError(
            f"--scale_ratio must have a number for each of --mpps, {len(data.mpps)}, got {len(data.scale_ratio)}. "
            "HINT: --mpps 0.5,2.0 --scale_ratio 4:1."
        )
    if data.scale_ratio and reading.tiles_per_slide is None and reading.tiles_per_bag is None:
        raise ValueError(
            "--scale_ratio must be given with a number of tiles that are drawn, got all. HINT: --tiles_per_slide 512."
        )
    if settings.model.scale_embedding and not data.mpps:
        raise ValueError("--scale_embedding must be given with --mpps, got none. HINT: --mpps 0.5,2.0.")
    if not data.mpps:
        return
    if mpp not in (TilingPolicy().mpp, *data.mpps):
        raise ValueError(f"--mpp must not be given with --mpps, got {mpp:g}. HINT: leave it out.")
    if reading.tile_store:
        raise ValueError(
            f"--tile_store must not be given with --mpps, because a store holds tiles of one resolution, got "
            f"{reading.tile_store}. HINT: leave it out, the slides are read."
        )
