"""What a resumed run must share with the one it continues, to end with the same weights and the same results.

Most of it is known from the settings and the manifest, before a slide is opened: `known_early`. The rest needs the
tiles and the engine: `fingerprint`, which holds both.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ds_wsi.bags.feature_cohort import features_digest
from ds_wsi.bags.manifest import Manifest, ManifestError, parse_manifest
from ds_wsi.bags.patients import patients_of
from ds_wsi.bags.slide_entry import SLIDE_IDS, SlideEntry
from ds_wsi.bags.splits import assign_splits
from ds_wsi.models.own import source_files
from ds_wsi.norms import batch_norms
from ds_wsi.runtime.fingerprint import file_fingerprint
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import Decides
from ds_wsi.runtime.words import counted
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.slides.policy import BOX
from ds_wsi.slides.tiling import TileGrid
from ds_wsi.training.changed import setting_name
from ds_wsi.training.checkpoint import read_state
from ds_wsi.training.setting_list import SETTINGS, deciding
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.stopping import stopping_words
from ds_wsi.training.task import target_columns

if TYPE_CHECKING:
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.training.context import RunContext

EPOCHS, SCHEDULE, DEMON = "optim.num_train_epochs", "optim.lr_scheduler_type", "optim.demon"
DRAW = "data.split_seed"
TEST_FILES = "test_files"  # they decide the results, not the weights: another file is tested anew, and not refused
STEP, LAYOUT = "slides_per_step", "layout"
SHOWN = 3


def fingerprint(run: "RunContext") -> dict[str, Any]:
    """Name -> value of everything that a resumed run must share, as JSON has it.

    Made once per run, when it starts: what it was made of is what the files were then.
    """
    if not run.made_of:
        run.made_of.update(_made_of(run))
    return run.made_of


def _made_of(run: "RunContext") -> dict[str, Any]:
    in_dim = run.cohort.in_dim
    values = {
        **of_settings(run.settings),
        **of_layout(run.settings, run.mesh.slide_size),
        **of_manifest(run.cohort.manifest),
        "comm_hook": None if run.comm is None else run.comm.name,  # in use, because "auto" may find another link
        "model.encoder": run.config.encoder and run.settings.model.encoder,
        "dropout": run.config.dropout,
        "aggregator_options": run.config.aggregator_options,
        "norm_training": run.config.norm_training,
        "teacher": None if run.teacher is None else run.teacher.digest,
        "encoder_features": run.config.encoder_features,
        "features": None if in_dim is None else features_digest(run.cohort, run.cohort.rows("train")),
        "tiling": run.config.tiling,
        "validation_features": None if in_dim is None else features_digest(run.cohort, run.cohort.rows("validation")),
        "slide_files": _slide_files(run.cohort, _trained_rows(run.cohort)) if in_dim is None else None,
        "grids": _grids(run.cohort) if in_dim is None else None,
        "optimizer": optimizer_words(run),
        "partition": _partition(run),
        "norm_stacks": _norm_stacks(run),
        TEST_FILES: _test_files(run.cohort),
        "training_slides": len(run.cohort.rows("train")),
        **_own_code(run),
        "training_tiles": sum(run.cohort.lengths[row] for row in run.cohort.rows("train")),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(values))  # as the checkpoint has it: tuples are lists
    return as_json


def of_settings(settings: TrainSettings) -> dict[str, Any]:
    """The part that settings alone decide: those that decide the result, by field, and what others stand for."""
    return {
        **deciding(settings, Decides.RESULT),
        "from_tile_store": bool(settings.policies.reading.tile_store),  # its JPEG differs by a grey level
        "encoder_weights": _weights(settings.model.encoder_weights),
        "encoder_learning_rate": settings.optim.learning_rate * settings.encoder_factor,
        "early_stopping": stopping_words(settings),
    }


def optimizer_words(run: "RunContext") -> str:
    """The optimizer's constants beside its rates, wherever they were given (a DeepSpeed JSON may)."""
    group = run.optimizer.param_groups[0]
    names = ("betas", "eps", "amsgrad", "nesterov", "dampening")
    constants = {name: group[name] for name in names if group.get(name)}
    if run.settings.optim.demon and "betas" in constants:
        constants["betas"] = constants["betas"][1:]  # the first moves
    return ", ".join(f"{name} {value}" for name, value in constants.items())


def _partition(run: "RunContext") -> str | None:
    """How the encoder is cut, where it draws: each cut has draws of its own. Else cuts differ by rounding alone."""
    encoder, policy = run.module.encoder, run.settings.policies.partition
    if run.settings.model.freeze_encoder or not any(map(_draws, encoder.modules())):
        return None
    return f"{policy.mode} on the {policy.axis} axis in chunks of {policy.chunk_size or 'its own choice'}"


def _draws(module: nn.Module) -> bool:
    """Whether a module draws in training: dropout, and stochastic depth as timm and torchvision have it."""
    is_dropout = re.search(r"Dropout(\d?d)?$|DropPath$|StochasticDepth$", type(module).__name__)
    return bool(is_dropout) and any(getattr(module, name, 0) for name in ("p", "drop_prob"))


def _own_code(run: "RunContext") -> dict[str, Any]:
    """Own code by the content of its module's file: another is another model, or trains as another."""
    files = source_files(run.config.own_code)
    known_by = {name: file_fingerprint(path).sha256 for name, path in files.items() if Path(path).is_file()}
    return {"own_code": known_by} if known_by else {}


def _norm_stacks(run: "RunContext") -> dict[str, Any] | None:
    """The layout of bags in stacks, where BatchNorm averages over one: another layout is then another training."""
    settings = run.settings
    if run.config.norm_training != "stack" or not batch_norms(run.module.encoder):
        return None
    dealt = asdict(settings.policies.stacking)
    each = settings.optim.per_device_train_batch_size
    if each == 1 and not settings.policies.stacking.deals:
        return None  # a stack is a bag, on any number of processes
    return {"processes": run.mesh.slide_size, "slides": each, "micro_steps": settings.micro_steps, **dealt}


def of_layout(settings: TrainSettings, groups: int) -> dict[str, Any]:
    """How many slides a step has, which must stay, and how they lie on the processes, which may change."""
    layout = settings.step_layout(groups)
    return {STEP: layout.bags_per_step, LAYOUT: [layout.groups, layout.bags_per_group, layout.micro_steps]}


def of_manifest(manifest: Manifest) -> dict[str, Any]:
    """The part of the manifest with its splits: classes in their order, and each row's slide, split and label.

    A row of a patient has the slides' ids, too.
    """
    return {
        "classes": list(manifest.classes),
        "slides": [
            [bag.slide_id, bag.split, manifest.target_words(bag), *members_words(bag)] for bag in manifest.slides
        ],
    }


def known_early(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """What is known before a slide is opened; of a manifest with faults, which are told later, the settings alone."""
    data, model = settings.data, settings.model
    on_slides = data.features_dir is None
    values = {
        **of_settings(settings),
        **of_layout(settings, world_size // settings.policies.tile_parallel.size),
        "aggregator_options": dict(model.aggregator_options),
        "dropout": model.dropout,
        "model.encoder": model.encoder if on_slides else None,
        "tiling": asdict(settings.tilings[0]) if on_slides else {},
    }
    if data.manifest is not None and Path(data.manifest).exists():
        try:
            columns = target_columns(settings)
            manifest, problems = parse_manifest(data.manifest, data.classes, need_slides=on_slides, columns=columns)
            if not problems:
                values |= {} if manifest.slides[0].split else {DRAW: data.split_seed}
                manifest = assign_splits(manifest, seed=data.split_seed, tell=False)
                values |= of_manifest(patients_of(manifest) if data.bag == "patient" else manifest)
        except ManifestError:
            pass
    as_json: dict[str, Any] = json.loads(json.dumps(values))
    return as_json


def require_same(current: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a checkpoint of a run that differs.

    Args:
        current: what `known_early` or `fingerprint` returned of this run.
        checkpoint: the one to continue.

    Raises:
        ValueError: names every difference, with both values.
    """
    saved: dict[str, Any] = read_state(checkpoint)["fingerprint"]
    if "slides" in saved:  # each slide's split is compared
        current = {name: value for name, value in current.items() if name != DRAW}
    # The version that wrote the checkpoint had no such setting: it did what the default does.
    saved = {name: json.loads(json.dumps(one.default)) for name, one in SETTINGS.items()} | saved
    if saved.get("tiling"):
        saved["tiling"] = {"shrink": BOX} | saved["tiling"]
    unknown = [name for name in current if name not in saved]
    if unknown:
        logger.warning(
            "%s is of an earlier version, which did not record %s: not compared", checkpoint, ", ".join(unknown)
        )
    differing = differences({name: value for name, value in current.items() if name not in unknown}, saved)
    if not differing:
        return
    hint = "HINT: give the options and data of the first start, or another --output_dir."
    if len(differing) == 1:
        raise ValueError(f"{differing[0]} ({checkpoint}). {hint}")
    lines = "\n".join(f"  {number}. {line}" for number, line in enumerate(differing, 1))
    raise ValueError(f"{checkpoint} cannot be continued exactly, {len(differing)} things differ:\n{lines}\n{hint}")


def differences(current: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """A line for each value of `current` that is another in the checkpoint."""
    lines = []
    for key, value in current.items():
        given = saved.get(key)
        if given == value or key in (TEST_FILES, LAYOUT) or (key == EPOCHS and _is_longer_exactly(current, saved)):
            continue
        if key == "slides" and given is not None:
            lines += _slide_differences(value, given)
            continue
        if key == STEP and given is not None:
            lines.append(_step_difference(current, saved))
            continue
        line = (
            f"{setting_name(key)} must be the checkpoint's, {_shown(given)}, to continue it exactly, got "
            f"{_shown(value)}"
        )
        if key == "comm_hook" and value is None:
            line += (
                ": one process sends nothing, and what several still owe the weights would be lost. Go on with two or "
                "more processes"
            )
        if key == EPOCHS and value > (given or value):
            line += (
                ": with more epochs those that are done would have had other learning rates. A run can be made longer "
                "that was started with --lr_scheduler_type constant and without --demon"
            )
        lines.append(line)
    return lines


def _step_difference(current: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """A step must have as many slides as it had, on any number of processes."""
    before = saved[STEP]
    processes, slides, micro_steps = current[LAYOUT]
    each, rest = divmod(before, processes * slides)
    remedy = f"--bags_per_step {before}" if rest or not each else f"--gradient_accumulation_steps {each}"
    return (
        f"slides of an optimizer step must be as many as the checkpoint's, {before}, got {current[STEP]} "
        f"(world_size {processes} x {counted(slides, 'slide')} x {counted(micro_steps, 'micro-step')}): give "
        f"{remedy}"
    )


def _is_longer_exactly(current: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether more epochs do not change those that are done: only where nothing depends on the run's length."""
    has_no_end = current[SCHEDULE] == "constant" and not current[DEMON]
    return bool(has_no_end and current[EPOCHS] > saved.get(EPOCHS, current[EPOCHS]))


def _slide_differences(current: Sequence[Sequence[Any]], saved: Sequence[Sequence[Any]]) -> list[str]:
    """What differs between two lists of [slide_id, split, label], of patients with their slides' ids."""
    mine, past = ({row[0]: [*row[1:], ""][:3] for row in rows} for rows in (current, saved))
    common = [name for name in past if name in mine]
    lines = []
    for column, what in ((1, "label"), (0, "split"), (2, "slides")):
        changed = [name for name in common if past[name][column] != mine[name][column]]
        if changed:
            shown = [f"{name}: {past[name][column]}, got {mine[name][column]}" for name in changed[:SHOWN]]
            lines.append(f"{what} must be the checkpoint's, got another of {_count(changed)} ({_list(shown, changed)})")
    for names, words in (
        ([name for name in mine if name not in past], "has not"),
        ([name for name in past if name not in mine], "has besides"),
    ):
        if names:
            lines.append(
                f"slides must be the checkpoint's, which {words} {_count(names)} ({_list(names[:SHOWN], names)})"
            )
    if not lines:
        first = next(number for number, pair in enumerate(zip(current, saved, strict=True), 1) if pair[0] != pair[1])
        lines.append(
            f"the order of the slides must be the checkpoint's, got {current[first - 1][0]} in place {first} in place "
            f"of {saved[first - 1][0]}: steps are drawn by place"
        )
    return lines


def members_words(bag: SlideEntry) -> list[str]:
    """The ids of a patient's slides, in one text; nothing of a slide."""
    return [SLIDE_IDS.join(slide.slide_id for slide in bag.members)] if bag.members else []


def _count(names: Sequence[str]) -> str:
    return "1 slide" if len(names) == 1 else f"{len(names)} slides"


def _list(shown: Sequence[str], names: Sequence[str]) -> str:
    return "; ".join(shown) + ("; ..." if len(names) > len(shown) else "")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _weights(path: str | None) -> str | None:
    """The weights that the encoder starts from, by their content; a file that is missing is told when it is loaded."""
    if path is None:
        return None
    return file_fingerprint(path).sha256 if Path(path).is_file() else f"{path} (missing)"


def _trained_rows(cohort: "Cohort") -> list[int]:
    return [*cohort.rows("train"), *cohort.rows("validation")]


def _test_files(cohort: "Cohort") -> str:
    rows = cohort.rows("test")
    return _slide_files(cohort, rows) if cohort.in_dim is None else features_digest(cohort, rows)


def _slide_files(cohort: "Cohort", rows: Sequence[int]) -> str:
    """The digest of these rows' slides, by their content."""
    digest = hashlib.sha256()
    for part in cohort.parts(rows):
        digest.update(slide_fingerprint(part.entry.path).sha256.encode())
    return digest.hexdigest()[:16]


def _grids(cohort: "Cohort") -> str:
    """The digest of the tiles of the slides that decide the weights."""
    digest = hashlib.sha256()
    for part in cohort.parts(_trained_rows(cohort)):
        grid = part.grid
        assert isinstance(grid, TileGrid)
        digest.update(f"{grid.level} {grid.read_size_px} {len(grid)}\n".encode())
        digest.update(np.ascontiguousarray(grid.coords, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]
