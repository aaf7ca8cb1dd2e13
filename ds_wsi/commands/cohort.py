"""The cohort that a command works on: the options that name it, and what they name."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.runtime.choices import PRECISIONS, precision_words
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import comma_separated
from ds_wsi.runtime.shards import Shard, local_index, parse_shard, shard_of
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.training.options import add_local_rank, add_shared_options, spellings

if TYPE_CHECKING:
    import torch

    from ds_wsi.bags.bag import FailureLog
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.bags.manifest import Manifest
    from ds_wsi.bags.slide_policy import SlidePolicy
    from ds_wsi.bags.target_columns import TargetColumns
    from ds_wsi.models import SlideModel

STORE = "folder that `ds-wsi tile --store` wrote: tiles are read from it (default: none, the slides are read)"
TILING_OPTIONS = ("tile_size_px", "mpp", "min_tissue_fraction", "tissue", "shrink")
OF_EVALUATION = ("min_tissue_fraction", "tissue")  # those that may differ from a model's own
SLIDE_OPTIONS = ("slide_mpp", "tissue_masks", "masks_in_bounds", "skip_bad_slides")


def add_cohort_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add what names the slides: their manifest, its classes, and what their files do not tell."""
    parser.add_argument(
        "--manifest", required=required, help="CSV (or JSON, Parquet, saved dataset) of slides: see docs/tables.md"
    )
    parser.add_argument(
        "--classes",
        help="names of the classes in the order of the model's outputs, comma-separated, such as normal,tumor "
        "(default: the model's, or the labels of the manifest, sorted)",
    )
    add_shared_options(parser, (*SLIDE_OPTIONS, "slide_reader"))
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="this is process I of N, from 1, that share the slides and the folder: each begins with its own and goes "
        "on with those that nobody works on (default: what torchrun, accelerate launch, srun or a Slurm array says)",
    )
    add_local_rank(parser)


def add_prediction_options(parser: argparse.ArgumentParser, *, need_manifest: bool) -> None:
    """Add what every command that runs a model over slides takes, those of `add_cohort_options` among them."""
    add_cohort_options(parser, required=need_manifest)
    parser.add_argument(*spellings("output_dir"), required=True, help="folder of the results")
    parser.add_argument(*spellings("tiles_dir"), help="folder of the tiles' coordinates (default: in --output_dir)")
    parser.add_argument(*spellings("tile_store"), default="", help=STORE)
    text = "number of processes that read tiles (default: 1)"
    parser.add_argument(*spellings("dataloader_num_workers"), type=int, default=1, help=text)
    add_shared_options(parser, ("max_failed_fraction", "read_timeout"))
    parser.add_argument("--device", help="device that computes, such as cuda or cpu (default: cuda where there is one)")
    text = "precision in which the encoder computes (default: no, float32)"
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help=text)


def classes_of(options: argparse.Namespace) -> tuple[str, ...] | None:
    """The names given with --classes."""
    return comma_separated(options.classes) if options.classes else None


def labels_of(options: argparse.Namespace) -> str:
    """What a command that works on slides alone does with labels: none, unless --classes asks for their check."""
    return "required" if options.classes else "unused"


def shard_from(options: argparse.Namespace) -> Shard:
    """The place of this process among those that share the slides: see `shard_of`."""
    return shard_of(options.shard)


def tiling_of(options: argparse.Namespace, tiling: TilingPolicy) -> TilingPolicy:
    """The policy with what the options say of it."""
    return replace(tiling, **{name: value for name, value in vars(options).items() if name in TILING_OPTIONS})


def slides_of(
    options: argparse.Namespace,
    tiling: TilingPolicy,
    classes: Sequence[str] | None,
    labels: str,
    choose: "Callable[[Manifest], Manifest] | None" = None,
    columns: "TargetColumns | None" = None,
) -> "Cohort":
    """The cohort of slides that the options name.

    Args:
        options: parsed.
        tiling: the policy.
        classes, labels, choose, columns: see `load_cohort`.

    Raises:
        ManifestError: lists everything that is wrong with it.
    """
    from ds_wsi.bags.cohort import load_cohort
    from ds_wsi.bags.target_columns import ONE_CLASS

    return load_cohort(
        options.manifest,
        tiling,
        tiles_dir=options.tiles_dir or Path(options.output_dir) / "tiles",
        classes=classes,
        slide_mpp=options.slide_mpp,
        need_splits=False,
        labels=labels,
        columns=columns or ONE_CLASS,
        choose=choose,
        slides=slide_policy_of(options),
        shard=shard_from(options),
    )


def slides_at(options: argparse.Namespace, cohort: "Cohort", tiling: TilingPolicy, mpps: Sequence[float]) -> "Cohort":
    """The cohort that `slides_of` gave, tiled at the other magnifications of a model too; of one it stays as it is.

    Raises:
        ValueError: a tile store, which holds tiles of one resolution.
    """
    from ds_wsi.bags.cohort import tile_manifest
    from ds_wsi.bags.scales import tile_scales

    if mpps and options.tile_store:
        raise ValueError(
            "--tile_store must not be given for a model of several magnifications, because a store holds tiles of one, "
            f"got {options.tile_store}. HINT: leave it out, the slides are read."
        )
    tilings = [replace(tiling, mpp=mpp) for mpp in mpps] or [tiling]
    of_slides = {"slide_mpp": options.slide_mpp, "slides": slide_policy_of(options), "shard": shard_from(options)}
    folder = options.tiles_dir or Path(options.output_dir) / "tiles"
    return tile_scales(
        cohort, tilings, folder, lambda some, policy, kept: tile_manifest(some, policy, tiles_dir=kept, **of_slides)
    )


def slide_policy_of(options: argparse.Namespace) -> "SlidePolicy":
    """How the options want slides opened."""
    from ds_wsi.bags.slide_policy import SlidePolicy

    return SlidePolicy(
        options.tissue_masks, options.masks_in_bounds, options.skip_bad_slides, reader=options.slide_reader
    )


def tell_left_out(cohort: "Cohort", directory: str | Path) -> None:
    """List the slides that were left out, on the screen and in the folder of the results."""
    from ds_wsi.bags.slide_policy import tell_skipped, write_skipped

    write_skipped(directory, cohort.skipped)
    tell_skipped(cohort.skipped, cohort.n_slides + len(cohort.skipped))


def tile_reading_of(options: argparse.Namespace, cohort: "Cohort") -> "tuple[ReadPolicy, FailureLog]":
    """How the options want the cohort's tiles read, and where failures go.

    Raises:
        ValueError: a tile store that does not fit the cohort, or one for a cohort of features.
    """
    from ds_wsi.bags.bag import FailureLog
    from ds_wsi.bags.packing import require_store

    policy = replace(
        ReadPolicy(),
        workers=options.dataloader_num_workers,
        tile_store=options.tile_store,
        max_failed_fraction=options.max_failed_fraction,
        slide_reader=options.slide_reader,
        timeout_s=options.read_timeout,
    )
    if policy.tile_store and cohort.in_dim is not None:
        raise ValueError(f"--tile_store must not be given with --features_dir, got {policy.tile_store}")
    if policy.tile_store:
        require_store(policy.tile_store, [part.entry for part in cohort.parts()], cohort.tile_grids)
    return policy, FailureLog(cohort.manifest.slides, cohort.grids, policy.max_failed_fraction)


def device_of(options: argparse.Namespace) -> "torch.device":
    """The device given, else this process's GPU, or one that it shares, where there is one.

    Raises:
        ValueError: none of torch's, or one that is not there.
    """
    import torch

    from ds_wsi.evaluation.validator import require_device

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if name == "cuda" else 0
    if count > 1:  # else Slurm shows each task its own GPU alone
        name = f"cuda:{local_index() % count}"
        torch.cuda.set_device(name)  # what is made without naming a device is made there too
    return require_device(name, "--device")


def placed(model: "SlideModel", options: argparse.Namespace) -> "SlideModel":
    """The model on the device that is given, its encoder in the precision that is given."""
    from ds_wsi.models import NoEncoder

    model.evaluation_precision = options.precision
    device = device_of(options)
    if isinstance(model.encoder, NoEncoder):
        if options.precision != "no":
            logger.warning("--precision: without effect, a model of features has no encoder")
        return model.to(device)
    logger.info("encoder in %s on %s (--precision)", precision_words(options.precision), device)
    return model.to(device)
