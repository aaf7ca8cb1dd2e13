"""The console command `ds-wsi`: parse, then call.

A user's mistake ends with one message and exit status 2; everything else keeps its traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_wsi.bags.bag import ReadPolicy
from ds_wsi.bags.datasets import DATASETS
from ds_wsi.config import read_section
from ds_wsi.models.features import FEATURES
from ds_wsi.partition.policy import POLICY_MODES, PartitionPolicy
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.log import logger, rank, setup_logging
from ds_wsi.runtime.units import parse_bytes
from ds_wsi.slides.demo import make_demo
from ds_wsi.slides.tiling import TilingPolicy
from ds_wsi.training.compare import COMPARED
from ds_wsi.training.dataset_options import (
    add_protocol_options,
    add_reading_options,
    add_split_options,
    reading_of,
    splitting_of,
)
from ds_wsi.training.options import add_train_options, settings_from, spellings, tiles_or_all

TILING_OPTIONS = ("tile_size_px", "mpp", "min_tissue_fraction")

if TYPE_CHECKING:
    import torch

    from ds_wsi.bags.bag import FailureLog
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.evaluation.protocol import EvaluationProtocol


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    setup_logging()
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        # ManifestError, SlideError and every refused setting are ValueErrors, written for the user.
        logger.error("%s", error)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser("ds-wsi", description="End-to-end training of whole-slide-image models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = _command(commands, "demo", run_demo, "make the demo cohort; --compare trains on it with and without encoder")
    demo.add_argument(*spellings("demo_dir"), default="runs/demo_slides", help="where the slides go")
    demo.add_argument(
        "--compare",
        nargs="?",
        const=COMPARED,
        metavar="AGGREGATORS",
        help=f"train end to end and with a frozen encoder, print both; comma-separated (without a value {COMPARED})",
    )
    demo.add_argument(*spellings("output_dir"), default="runs/demo_compare", help="of the runs of --compare")
    demo.add_argument("--seed", type=int, default=0, help="of the first run of --compare (default: 0)")
    demo.add_argument("--seeds", type=int, default=1, help="runs of each aggregator and kind (default: 1)")
    _manifest_options(_command(commands, "manifest", run_manifest, "write the manifest of a public dataset"))
    tile = _command(commands, "tile", run_tile, "write each slide's tile coordinates")
    _cohort_options(tile)
    _policy_options(tile, TilingPolicy, TILING_OPTIONS)
    tile.add_argument(*spellings("output_dir"), required=True, help="one file a slide is written there")
    tile.add_argument("--export", choices=("clam", "trident"), help="write that project's h5 files beside ours")
    for project in ("clam", "trident"):
        tile.add_argument(
            *spellings(f"import_{project}"), metavar="DIR", help=f"take coordinates from {project.upper()}'s h5 files"
        )
    tile.add_argument("--store", metavar="DIR", help="also pack the tiles there, for training with --tile_store DIR")
    tile.add_argument(*spellings("jpeg_quality"), type=int, default=90, help="of packed tiles (default: 90)")
    tile.add_argument("--verify", action="store_true", help="check the tiles that are packed, pack damaged slides anew")
    tile.add_argument("--workers", type=int, default=1, help="threads")
    plan = _command(commands, "plan", run_plan, "plan the partition of an encoder: modes, memory and time")
    _plan_options(plan)
    train = _command(commands, "train", run_train, "train a slide model")
    add_train_options(train)
    _dry_run_option(train)
    protocol = commands.add_parser("protocol", help="train a dataset's splits and seeds, and print their table")
    datasets = protocol.add_subparsers(required=True, metavar="DATASET", dest="dataset")
    for dataset in DATASETS:
        launcher = _command(
            datasets, dataset, run_protocol, f"the papers' experiments on {dataset}: see --list_presets"
        )
        add_protocol_options(launcher, dataset)
        add_train_options(launcher)
        _dry_run_option(launcher)
    evaluate = _command(commands, "evaluate", run_evaluate, "evaluate an exported model on a cohort")
    _model_options(evaluate)
    evaluate.add_argument("--split", default="test", help="of the manifest, or `all` (default: test)")
    evaluate.add_argument(*spellings("eval_tiles"), type=tiles_or_all, help="random tiles of each slide (default: all)")
    evaluate.add_argument(*spellings("eval_runs"), type=int, default=1, help="draws of them (default: 1)")
    evaluate.add_argument(*spellings("eval_seed"), type=int, default=0, help="of the draws (default: 0)")
    evaluate.add_argument(*spellings("dataset_name"), help="in tables of runs (default: the manifest's name)")
    heatmap = _command(commands, "heatmap", run_heatmap, "draw an exported model's attention over slides")
    _model_options(heatmap)
    heatmap.add_argument(*spellings("slide_ids"), help="comma-separated (default: all of the manifest)")
    _comparison_options(
        _command(commands, "compare", run_compare, "compare two runs' predictions of the same slides"),
        _command(commands, "report", run_report, "tables of many runs, as CSV, Markdown, LaTeX and HTML"),
    )
    for trained in (evaluate, heatmap):
        trained.add_argument(*spellings("features_dir"), help="of a model of features: a file a slide")
    _features_options(_command(commands, "features", run_features, "write each slide's features"))
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _manifest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=sorted(DATASETS), help="which")
    parser.add_argument(*spellings("data_dir"), required=True, help="the folder into which it was unpacked")
    parser.add_argument("--output", required=True, help="the CSV to write; of several splits one each, numbered")
    add_reading_options(parser)
    add_split_options(parser)


def _dry_run_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *spellings("dry_run"), action="store_true", help="check everything, tell slides, steps and time, train nothing"
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", default="resnet18", help="a timm model's name (default: resnet18)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiles", type=int, help="of a bag, in chunks of tiles")
    size.add_argument(*spellings("image_px"), type=int, help="side of one large image instead, in blocks of rows")
    parser.add_argument(*spellings("tile_size_px"), type=int, default=256, help="side of a tile (default: 256)")
    parser.add_argument("--gpu", type=parse_bytes, default=None, help="budget on the device, such as 24GiB")
    parser.add_argument("--host", type=parse_bytes, default=None, help="budget in host memory, such as 128GiB")
    parser.add_argument("--mode", choices=POLICY_MODES, default="auto", help="of every segment (default: auto)")
    parser.add_argument(*spellings("chunk_size"), type=int, help="tiles, or rows, a chunk (default: the plan chooses)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of training")
    parser.add_argument("--eval", action="store_true", help="BatchNorm in evaluation mode")
    parser.add_argument("--device", default=None, help="whose rates to assume (default: cuda; cpu without --gpu)")
    parser.add_argument("--probe", action="store_true", help="measure this machine's rates first, and keep them")
    parser.add_argument(*spellings("output_dir"), help="write plan.json and plan.png there")


def _cohort_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--manifest", required=required, help="CSV (or JSON, Parquet, saved dataset) of slides")
    parser.add_argument("--classes", help="class names in the order of the logits, comma-separated")
    parser.add_argument(*spellings("slide_mpp"), type=float, help="um/px of slides that do not tell theirs")


def _policy_options(parser: argparse.ArgumentParser, policy: type, names: Sequence[str]) -> None:
    for entry in fields(policy):
        if entry.name in names:
            kind = type(entry.default)
            parser.add_argument(
                *spellings(entry.name), type=kind, default=entry.default, help=f"(default: {entry.default})"
            )


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run's folder, with config.json and model.safetensors")
    parser.add_argument("--dataset", choices=sorted(DATASETS), help="an external set as distributed, for --manifest")
    parser.add_argument(*spellings("data_dir"), help="the folder into which it was unpacked")
    parser.add_argument(
        *spellings("map_labels"), type=_pairs, help="its classes in the model's words: tumor=1,normal=0"
    )
    add_reading_options(parser)
    _prediction_options(parser, need_manifest=False)


def _features_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a run's folder, whose encoder and tiles are taken")
    source.add_argument("--encoder", help="a timm model's name, hf-hub:ORG/NAME or local-dir:PATH")
    parser.add_argument(*spellings("encoder_weights"), help="of --encoder: local .safetensors file or timm checkpoint")
    parser.add_argument("--pretrained", action="store_true", help="weights that timm has for --encoder's name")
    parser.add_argument(
        *spellings("encoder_features"), choices=FEATURES, help="what leaves --encoder (default: as its authors do)"
    )
    for entry in fields(TilingPolicy):
        if entry.name in TILING_OPTIONS:
            text = f"with --encoder (default: {entry.default})"
            parser.add_argument(*spellings(entry.name), type=type(entry.default), default=argparse.SUPPRESS, help=text)
    _prediction_options(parser, need_manifest=True)


def _prediction_options(parser: argparse.ArgumentParser, *, need_manifest: bool) -> None:
    _cohort_options(parser, required=need_manifest)
    parser.add_argument(*spellings("output_dir"), required=True, help="where results go")
    parser.add_argument(*spellings("tiles_dir"), help="where tile grids are kept (default: in output_dir)")
    parser.add_argument(*spellings("tile_store"), default="", help="folder that `ds-wsi tile --store` wrote")
    parser.add_argument(*spellings("dataloader_num_workers"), type=int, default=1, help="processes that read tiles")
    parser.add_argument("--device", help="cuda, cpu (default: cuda where there is one)")


def _comparison_options(compare: argparse.ArgumentParser, report: argparse.ArgumentParser) -> None:
    compare.add_argument("run_a", metavar="RUN_A", help="a run's folder, the baseline")
    compare.add_argument("run_b", metavar="RUN_B", help="the other's")
    compare.add_argument(*spellings("output_dir"), required=True, help="comparison.json is written there")
    compare.add_argument(*spellings("n_resamples"), type=int, default=2000, help="of the bootstrap (default: 2000)")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    report.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs; unfinished ones are listed")
    report.add_argument(*spellings("output_dir"), required=True, help="results.csv, .md, .tex and .html go there")
    report.add_argument("--metric", help="comma-separated (default: quadratic_weighted_kappa,auc,accuracy)")


def run_plan(options: argparse.Namespace) -> None:
    """`ds-wsi plan`."""
    import torch

    from ds_wsi.models import build_encoder
    from ds_wsi.partition.draw import draw_plan
    from ds_wsi.partition.planner import plan_partition
    from ds_wsi.partition.rates import cache_path, device_key, probe

    device = torch.device(options.device or ("cpu" if options.gpu is None else "cuda"))
    if options.probe:
        found = probe(torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        print(
            f"{device_key(device)}: {found.flops / 1e12:.3g} TFLOP/s, memory {found.memory / 1e9:.3g} GB/s, "
            f"link {found.link / 1e9:.3g} GB/s, {found.launch * 1e6:.3g} us an operation (kept in {cache_path()})"
        )
    if options.tiles is None and options.image_px is None:
        if options.probe:
            return
        raise ValueError("plan must be given --tiles or --image_px, got neither")
    if options.gpu is None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--gpu must be given where there is no GPU to ask. HINT: --gpu 24GiB.")
    # A vision transformer's positions are of one size.
    fixed = {"img_size": options.tile_size_px} if "vit" in options.encoder else {}
    encoder = build_encoder(options.encoder, tile_size_px=options.tile_size_px, **fixed).train(not options.eval)
    spatial = options.image_px is not None
    shape = (1, 3, options.image_px, options.image_px) if spatial else (options.tiles, 3, *[options.tile_size_px] * 2)
    policy = PartitionPolicy(
        mode=options.mode,
        axis="spatial" if spatial else "batch",
        chunk_size=options.chunk_size,
        gpu_budget_bytes=options.gpu,
        host_budget_bytes=options.host,
    )
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    plan = plan_partition(encoder, shape, policy, autocast=precision, device=device)
    print(plan)
    if options.output_dir:
        folder = Path(options.output_dir)
        write_json(folder / "plan.json", {"ds_wsi": {"partition": {"plan": plan.to_section()}}})
        draw_plan(plan, folder / "plan.png")
        print(f"written: {folder / 'plan.json'}, {folder / 'plan.png'}")


def run_manifest(options: argparse.Namespace) -> None:
    """`ds-wsi manifest`."""
    from ds_wsi.bags.prepare import read_dataset, split_dataset, write_manifests

    given = vars(options)
    manifest = read_dataset(options.dataset, options.data_dir, reading_of(given))
    manifests = split_dataset(manifest, **splitting_of(given))
    for path, written in zip(write_manifests(manifests, options.output), manifests, strict=True):
        counts = {split: len(written.in_split(split)) for split in ("train", "validation", "test")}
        print(f"{path}\t{len(written.slides)} slides\t{counts}\t--classes {','.join(written.classes)}")


def run_demo(options: argparse.Namespace) -> None:
    """`ds-wsi demo`."""
    print(make_demo(options.demo_dir))
    if options.compare:
        from ds_wsi.training.compare import compare, compared_runs

        runs = compared_runs(options.compare.split(","), range(options.seed, options.seed + options.seeds))
        print(compare(runs, Path(options.output_dir), options.demo_dir))


def run_train(options: argparse.Namespace) -> None:
    """`ds-wsi train`, and launch/train.py under any launcher."""
    from ds_wsi.training.loop import train  # here, for DeepSpeed and Accelerate take seconds to import

    settings, deepspeed_config = settings_from(options)
    if options.dry_run:
        from ds_wsi.training.dry_run import dry_run

        _print_some(dry_run(settings, deepspeed_config))
        return
    train(settings, deepspeed_config)


def run_protocol(options: argparse.Namespace) -> None:
    """`ds-wsi protocol`, and launch/train_<dataset>.py under any launcher."""
    from ds_wsi.training.presets import describe, presets_of

    if "list_presets" in options:
        if rank() == 0:
            print(describe(presets_of(options.dataset)))
        return
    if "data_dir" not in options:
        raise ValueError("--data_dir must be given, got none. HINT: the folder into which the dataset was unpacked.")
    from ds_wsi.training.protocol import protocol_from, run_protocol

    protocol, settings, deepspeed_config, preset = protocol_from(options, options.dataset)
    if options.dry_run:
        from ds_wsi.training.dry_run import dry_protocol

        _print_some(dry_protocol(protocol, settings, deepspeed_config))
        return
    _print_some(run_protocol(protocol, settings, deepspeed_config, preset.pretrained))


def _print_some(text: str) -> None:
    """Nothing on the processes that have nothing to say."""
    if text:
        print(text)


def run_tile(options: argparse.Namespace) -> None:
    """`ds-wsi tile`."""
    from ds_wsi.bags.cohort import load_cohort
    from ds_wsi.slides.coords import export_clam, export_trident

    policy = TilingPolicy(
        tile_size_px=options.tile_size_px, mpp=options.mpp, min_tissue_fraction=options.min_tissue_fraction
    )
    if options.import_clam or options.import_trident:
        _import_grids(options)
        return
    cohort = load_cohort(
        options.manifest,
        policy,
        tiles_dir=options.output_dir,
        classes=_classes(options),
        slide_mpp=options.slide_mpp,
        workers=options.workers,
        need_splits=False,
    )
    exporters = {"clam": export_clam, "trident": export_trident}
    for grid in cohort.tile_grids:
        print(f"{grid.slide_id}\t{len(grid)} tiles")
        if options.export:
            suffix = "_patches.h5" if options.export == "trident" else ".h5"
            exporters[options.export](
                grid, Path(options.output_dir) / options.export / "patches" / f"{grid.slide_id}{suffix}"
            )
    if options.store:
        _pack(cohort, options)


def _pack(cohort: "Cohort", options: argparse.Namespace) -> None:
    from ds_wsi.bags.packing import pack_cohort

    packed = pack_cohort(
        cohort, options.store, quality=options.jpeg_quality, workers=options.workers, verify=options.verify
    )
    n_bytes = sum(slide.path.stat().st_size for slide in packed)
    print(
        f"{options.store}\t{sum(cohort.lengths)} tiles of {len(packed)} slides, {n_bytes / 2**20:.1f} MiB, "
        f"{sum(slide.written for slide in packed)} slides packed now, "
        f"{sum(slide.n_failed for slide in packed)} tiles unreadable"
    )


def _import_grids(options: argparse.Namespace) -> None:
    """Write our grids from another project's: every slide's file must be there, all that is wrong is listed."""
    from ds_wsi.bags.manifest import ManifestError, read_manifest
    from ds_wsi.slides.coords import import_clam, import_trident, write_grid
    from ds_wsi.slides.slide import Slide, SlideError

    importer, folder, suffix = (
        (import_clam, options.import_clam, ".h5")
        if options.import_clam
        else (import_trident, options.import_trident, "_patches.h5")
    )
    manifest = read_manifest(options.manifest, _classes(options))
    grids, problems = [], []
    for entry in manifest.slides:
        try:
            with Slide(entry.path, entry.mpp or options.slide_mpp, entry.slide_id) as slide:
                grids.append(importer(Path(folder) / f"{entry.slide_id}{suffix}", slide))
        except SlideError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError(manifest.source, problems)
    for grid in grids:
        write_grid(grid, Path(options.output_dir) / f"{grid.slide_id}.safetensors")
        print(f"{grid.slide_id}\t{len(grid)} tiles from {grid.source}")


def _classes(options: argparse.Namespace) -> tuple[str, ...] | None:
    return tuple(options.classes.split(",")) if options.classes else None


def _pairs(text: str) -> dict[str, str]:
    pairs = [entry.split("=") for entry in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be pairs such as tumor=1,normal=0, got {text!r}")
    return {theirs.strip(): ours.strip() for theirs, ours in pairs}


def _require_cohort(options: argparse.Namespace) -> None:
    """See that the options name a manifest: given, or written from a dataset in the model's classes."""
    from ds_wsi.bags.prepare import write_external
    from ds_wsi.models import ModelConfig

    if (options.manifest is None) == (options.dataset is None):
        raise ValueError("one of --manifest and --dataset must be given. HINT: --dataset NAME --data_dir FOLDER.")
    if options.dataset is None:
        extra = [name for name in (*reading_of(vars(options)), "data_dir", "map_labels") if vars(options).get(name)]
        if extra:
            raise ValueError(f"--{extra[0]} must come with --dataset, got a manifest. HINT: leave it out.")
        return
    if not options.data_dir:
        raise ValueError("--data_dir must be given with --dataset, got none. HINT: the dataset's folder.")
    if options.classes:
        raise ValueError("--classes must not be given with --dataset. HINT: --map_labels says which class is which.")
    options.manifest = str(Path(options.output_dir) / f"{options.dataset}.csv")
    classes = ModelConfig.read(Path(options.model) / "config.json").classes
    reading = reading_of(vars(options))
    write_external(options.manifest, options.dataset, options.data_dir, reading, classes, options.map_labels)


def run_evaluate(options: argparse.Namespace) -> None:
    """`ds-wsi evaluate`, and launch/evaluate.py."""
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.record import FILE_NAME as RECORD_FILE
    from ds_wsi.evaluation.record import RunFolderError, RunRecord
    from ds_wsi.evaluation.results import write_results

    _require_cohort(options)
    protocol = EvaluationProtocol(options.eval_tiles, options.eval_runs, options.eval_seed)
    directory = Path(options.output_dir)
    record = None
    try:
        record = RunRecord.read(Path(options.model))
    except RunFolderError as error:
        logger.warning("%s: %s. `ds-wsi report` will have no place for this evaluation.", options.model, error)
    (directory / RECORD_FILE).unlink(missing_ok=True)  # of an earlier evaluation: until this one ends, it has none
    cohort, predictions, failures = _predictions(options, options.split, protocol)
    write_results(
        directory,
        cohort,
        predictions,
        title=f"{options.model} on {options.manifest}",
        summary={
            "model": options.model,
            "cohort": options.manifest,
            "split": options.split,
            "evaluation": str(protocol),
        },
        failures=failures,
        protocol=protocol,
    )
    if record is not None:
        dataset = options.dataset_name or Path(options.manifest).stem
        record.evaluated_on(dataset, options.split, protocol).write(directory)


def run_compare(options: argparse.Namespace) -> None:
    """`ds-wsi compare`."""
    from ds_wsi.evaluation.comparison import compare_runs, comparison_to_json, format_comparison

    comparison = compare_runs(options.run_a, options.run_b, options.n_resamples, options.seed)
    print(f"A: {options.run_a}\nB: {options.run_b}\n{format_comparison(comparison)}")
    found = {"a": options.run_a, "b": options.run_b, **comparison_to_json(comparison)}
    write_json(Path(options.output_dir) / "comparison.json", found)


def run_report(options: argparse.Namespace) -> None:
    """`ds-wsi report`."""
    from ds_wsi.evaluation.tables import write_tables

    metrics = [name.strip() for name in options.metric.split(",")] if options.metric else None
    print(write_tables([Path(run) for run in options.runs], Path(options.output_dir), metrics))


def run_heatmap(options: argparse.Namespace) -> None:
    """`ds-wsi heatmap`."""
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.results import draw_heatmaps

    _require_cohort(options)
    cohort, predictions, _ = _predictions(options, "all", EvaluationProtocol())
    for _, path in draw_heatmaps(Path(options.output_dir), cohort, predictions):
        print(path)


def _predictions(options: argparse.Namespace, split: str, protocol: "EvaluationProtocol") -> tuple:
    """Predict the slides that the options choose with an exported model, on the tiles it was trained on."""
    from ds_wsi.bags.feature_cohort import load_feature_cohort
    from ds_wsi.evaluation.predict import predict_slides
    from ds_wsi.models import load_model

    model, config = load_model(options.model)
    classes = _classes(options) or config.classes
    if config.encoder is None and not options.features_dir:
        raise ValueError(f"--features_dir must be given for a model of features, got none ({options.model})")
    if config.encoder is not None and options.features_dir:
        raise ValueError(
            f"--features_dir must not be given for a model with an encoder, got {options.features_dir} "
            f"({options.model}, {config.encoder}). HINT: leave it out, the model reads slides."
        )
    if config.encoder is None:
        cohort = load_feature_cohort(
            options.manifest,
            options.features_dir,
            in_dim=config.in_dim,
            check="shapes",
            classes=classes,
            workers=max(1, options.dataloader_num_workers),
            need_splits=False,
        )
    else:
        cohort = _slides(options, read_section({"tiling": config.tiling}).tiling, classes)
    rows = _chosen_rows(options, cohort, split)
    policy, failures = _reading(options, cohort)
    slides = cohort.manifest.slides
    stream = predict_slides(model.to(_device(options)), slides, cohort.grids, rows, policy, failures, protocol)
    return cohort, list(stream), failures.rows()


def run_features(options: argparse.Namespace) -> None:
    """`ds-wsi features`."""
    from ds_wsi.evaluation.extract import build_extractor, extract_features
    from ds_wsi.models import load_model

    of_tiles = {name: value for name, value in vars(options).items() if name in TILING_OPTIONS}
    if options.model:
        of_encoder = ("encoder_weights", "pretrained", "encoder_features")
        given = [*of_tiles, *(name for name in of_encoder if getattr(options, name))]
        if given:
            names = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"{names} must be given with --encoder alone, got --model, which has its own")
        model, config = load_model(options.model)
        if config.encoder is None:
            raise ValueError(f"--model must have an encoder, got {options.model}, a model of features")
        tiling = read_section({"tiling": config.tiling}).tiling
    else:
        tiling = TilingPolicy(**of_tiles)
        model, config = build_extractor(
            options.encoder,
            tiling,
            options.encoder_weights,
            pretrained=options.pretrained,
            features=options.encoder_features,
        )
    cohort = _slides(options, tiling, _classes(options))
    policy, failures = _reading(options, cohort)
    for slide in extract_features(model.to(_device(options)), config, cohort, options.output_dir, policy, failures):
        print(f"{slide.slide_id}\t{slide.n_rows} rows\t{'written' if slide.written else 'kept'}\t{slide.path}")
    print(f"{options.output_dir}\twidth {model.encoder.num_features}, {len(failures.reasons)} tiles unreadable")


def _slides(options: argparse.Namespace, tiling: TilingPolicy, classes: Sequence[str] | None) -> "Cohort":
    """The cohort of slides that the options name."""
    from ds_wsi.bags.cohort import load_cohort

    return load_cohort(
        options.manifest,
        tiling,
        tiles_dir=options.tiles_dir or Path(options.output_dir) / "tiles",
        classes=classes,
        slide_mpp=options.slide_mpp,
        need_splits=False,
    )


def _reading(options: argparse.Namespace, cohort: "Cohort") -> "tuple[ReadPolicy, FailureLog]":
    """How the options want the cohort's tiles read, and where failures go; a tile store is checked."""
    from ds_wsi.bags.bag import FailureLog
    from ds_wsi.bags.packing import require_store

    policy = replace(ReadPolicy(), workers=options.dataloader_num_workers, tile_store=options.tile_store)
    if policy.tile_store and cohort.in_dim is not None:
        raise ValueError(f"--tile_store must not be given with --features_dir, got {policy.tile_store}")
    if policy.tile_store:
        require_store(policy.tile_store, cohort.manifest.slides, cohort.tile_grids)
    return policy, FailureLog(cohort.manifest.slides, cohort.grids, policy.max_failed_fraction)


def _device(options: argparse.Namespace) -> "torch.device":
    import torch

    from ds_wsi.evaluation.validator import require_device

    return require_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"), "--device")


def _chosen_rows(options: argparse.Namespace, cohort: object, split: str) -> tuple[int, ...]:
    slides = cohort.manifest.slides  # type: ignore[attr-defined]
    wanted = getattr(options, "slide_ids", None)
    if wanted:
        ids = wanted.split(",")
        unknown = set(ids) - {slide.slide_id for slide in slides}
        if unknown:
            raise ValueError(f"--slide_ids must be of the manifest, got {', '.join(sorted(unknown))}")
        return tuple(row for row, slide in enumerate(slides) if slide.slide_id in ids)
    rows = tuple(row for row, slide in enumerate(slides) if split in ("all", slide.split))
    if not rows:
        raise ValueError(f"--split must name slides of the manifest, got {split!r}, which has none. HINT: --split all.")
    return rows


if __name__ == "__main__":
    sys.exit(main())
