"""What a run is asked beside classes: its columns, what its settings must be, and the task with its training split."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_wsi.bags.manifest import Manifest, ManifestError
from ds_wsi.bags.target_columns import TargetColumns
from ds_wsi.bags.target_parts import targets_apart
from ds_wsi.bags.target_problems import split_target_problems
from ds_wsi.evaluation.task_metrics.table import MEAN, METRICS, default_metric, of_target
from ds_wsi.evaluation.tasks.fitted import KEY, before_training
from ds_wsi.runtime.log import logger
from ds_wsi.slides.demo_targets import TARGETS_DEMO, TIME_UNIT
from ds_wsi.targets.choices import LOSSES_OF, SEVERAL
from ds_wsi.targets.several import AnyTask, SeveralTargets
from ds_wsi.targets.task import Task, fitted_task
from ds_wsi.training.bag_settings import require_bag_settings
from ds_wsi.training.settings import TaskSettings, TrainSettings

# Of the demo cohort that has targets.
DEMO_COLUMNS: Mapping[str, TargetColumns] = {
    "regression": TargetColumns("regression", ("score",)),
    "ordinal": TargetColumns("ordinal", ("grade",)),
    "multilabel": TargetColumns("multilabel", ("several_foci", "full_foci")),
    "survival": TargetColumns("survival", (), "months", "event"),
}


def target_columns(settings: TrainSettings) -> TargetColumns:
    """The columns that the settings name; of the demo its own where they name none."""
    columns = settings.task.columns
    if columns.parts:
        return replace(columns, parts=tuple(_with_said(part, settings) for part in columns.parts))
    if settings.data.manifest is not None or settings.task.is_classes:
        return columns
    return columns if settings.task.names_columns else _of_demo(columns)


def _with_said(part: TargetColumns, settings: TrainSettings) -> TargetColumns:
    """One of several targets with what other options say of it: a grade's order, columns of the demo's survival."""
    if part.kind == "ordinal":
        return replace(part, classes=settings.data.classes or ())
    is_bare = part.kind == "survival" and not part.names and settings.data.manifest is None
    return _of_demo(part) if is_bare else part


def _of_demo(columns: TargetColumns) -> TargetColumns:
    return replace(DEMO_COLUMNS[columns.kind], strata=columns.strata, name=columns.name)


def require_task_settings(settings: TrainSettings) -> None:
    """Refuse settings of a task that contradict each other, before an engine is started.

    Raises:
        ValueError: names the option and what it may be.
    """
    task, kind = settings.task, settings.task.task
    require_bag_settings(settings)
    if kind == SEVERAL:
        _require_several(settings)
    elif task.chosen_loss not in LOSSES_OF[kind]:
        raise ValueError(
            f"--loss of --task {kind} must be one of {', '.join(LOSSES_OF[kind])}, got {task.chosen_loss}. HINT: leave "
            "it out, or give another --task."
        )
    names = metric_names(task)
    if chosen_metric(settings) not in names:
        raise ValueError(
            f"--metric_for_best_model must be one of {', '.join(names)}"
            f"{'' if task.is_classes else f' with --task {kind}'}, got {settings.run.metric_for_best_model!r}"
        )
    if task.targets and kind != SEVERAL:
        raise ValueError(f"--targets must be given without --task, got --task {kind}. HINT: leave one of them out.")
    if task.is_classes:
        if len(task.label_column) > 1:
            raise ValueError(
                f"--label_column of --task classification must be one column, got {', '.join(task.label_column)}. "
                "HINT: --task multilabel takes several."
            )
        return
    _require_columns(settings)
    from ds_wsi.models.aggregators import require_serves  # here, because help pages need no torch

    require_serves(settings.model.aggregator, kind)
    if settings.optim.class_weights is not None:
        raise ValueError(
            f"--class_weights must be given with --task classification, got --task {kind}. HINT: leave it out"
            f"{'; --pos_weight balanced weighs labels' if kind == 'multilabel' else ''}."
        )
    if settings.data.positive_class is not None:
        raise ValueError(
            f"--positive_class must be given with --task classification, got --task {kind}. HINT: leave it out."
        )
    if chosen_metric(settings) in ("ibs_kaplan_meier", *(["ibs"] if task.chosen_loss == "cox" else [])):
        raise ValueError(
            f"--metric_for_best_model must be told of each epoch, got {settings.run.metric_for_best_model}, which "
            "--loss cox tells of the exported model alone. HINT: c_index, uno_c or auc_t."
        )


def _require_several(settings: TrainSettings) -> None:
    task, targets = settings.task, settings.task.asked_targets
    if task.loss is not None:
        raise ValueError(
            f"--loss must be given with one target, got {task.loss} and --task {SEVERAL}. HINT: a target's KIND can be "
            "a loss, such as grade:corn; cox couples the slides of a step, and is trained alone."
        )
    if task.label_column:
        raise ValueError(
            f"--label_column must be given with one target, got {', '.join(task.label_column)} and --task {SEVERAL}. "
            "HINT: --targets names the columns."
        )
    if len(targets) < 2:
        raise ValueError(
            f"--targets must be two or more, got {', '.join(task.targets) or 'none'}. HINT: one target is asked by "
            "--task and --label_column."
        )
    if sum(target.kind == "survival" for target in targets) > 1:
        raise ValueError(
            f"--targets must have one survival at most, got {', '.join(task.targets)}. HINT: --time_column is of one."
        )
    if settings.data.classes and sum(target.kind == "ordinal" for target in targets) != 1:
        raise ValueError(
            f"--classes must be given with one ordinal target, got {', '.join(task.targets)}. HINT: numbers sort "
            "themselves: write the grades of the others as numbers."
        )
    columns = target_columns(settings)
    SeveralTargets.require_names([target.name for target in targets], columns.names)


def metric_names(task: TaskSettings) -> list[str]:
    """The metrics that can choose a task's epoch; of several targets TARGET.METRIC, and the mean of their first."""
    if task.task != SEVERAL:
        return [metric.name for metric in METRICS[task.task]]
    each = [(target.name, metric) for target in task.asked_targets for metric in METRICS[target.kind]]
    return [MEAN, *(of_target(name, metric.name) for name, metric in each if metric.higher_is_better is not None)]


def _require_columns(settings: TrainSettings) -> None:
    task, columns = settings.task, target_columns(settings)
    if task.event_column and task.censorship_column:
        raise ValueError(
            f"--event_column and --censorship_column must not be given together, got {task.event_column} and "
            f"{task.censorship_column}. HINT: choose the one whose 1 means what its option says."
        )
    if settings.data.manifest is None and settings.data.demo != TARGETS_DEMO:
        raise ValueError(
            f"--demo must be {TARGETS_DEMO} for --task {columns.kind}, got {settings.data.demo}, which has classes "
            f"alone. HINT: --demo {TARGETS_DEMO}, or --manifest with a cohort of yours."
        )
    survival = [part for part, _ in columns.places if part.kind == "survival"]
    if survival:
        if survival[0].time is None or survival[0].event is None:
            raise ValueError(
                "--task survival must be given --time_column, and --event_column or --censorship_column, got "
                f"{', '.join(survival[0].names) or 'none'}. HINT: --event_column where 1 means that the event came, "
                "--censorship_column where 1 means censored: which is which is not guessed."
            )
        return
    if len(columns.labels) > 1 and columns.kind != "multilabel":
        raise ValueError(
            f"--label_column of --task {columns.kind} must be one column, got {', '.join(columns.labels)}. HINT: "
            "--task multilabel takes several."
        )


def chosen_metric(settings: TrainSettings) -> str:
    """The validation metric that chooses the epoch; of another task than classification its own in auc's place."""
    name, task = settings.run.metric_for_best_model, settings.task
    if task.is_classes or name != "auc":
        return name
    return MEAN if task.task == SEVERAL else default_metric(task.task).name


def asked_task(settings: TrainSettings, manifest: Manifest) -> AnyTask | None:
    """The task with what it takes of the training split; None of classification.

    Raises:
        ManifestError: lists what is wrong with the targets of the splits.
        ValueError: the training split's targets do not tell what the task needs.
    """
    if settings.task.is_classes:
        return None
    require_split_targets(manifest)
    if settings.task.task == SEVERAL:
        asked, apart = settings.task.asked_targets, targets_apart(manifest)
        tasks = [_fitted(settings, part, target.loss) for part, target in zip(apart, asked, strict=True)]
        names, weights = zip(*((target.name, target.weight) for target in asked), strict=True)
        return SeveralTargets(names, tuple(tasks), weights)
    return _fitted(settings, manifest, settings.task.chosen_loss)


def _fitted(settings: TrainSettings, manifest: Manifest, loss: str) -> Task:
    """The task of a cohort with one target, with what it takes of the training split."""
    given, columns = settings.task, manifest.columns
    of_demo = settings.data.manifest is None
    task = Task(
        columns.kind,
        loss,
        columns.names,
        manifest.classes,
        censored=columns.censored,
        strata_column=columns.strata,
        log1p=given.log1p and columns.kind == "regression",
        alpha=given.nll_alpha,
        ties=given.ties,
        time_unit=given.time_unit or (TIME_UNIT if of_demo and columns.kind == "survival" else ""),
    )
    training = manifest.in_split("train")
    rows = [slide.target for slide in training]
    task = fitted_task(task, rows, time_bins=given.time_bins, balanced=given.pos_weight == "balanced")
    missing = sum(not slide.is_labelled for slide in training)
    if missing:
        logger.warning(
            "%s: %d of %d training slides have no target in %s: they are read, and teach nothing. HINT: take the rows "
            "out",
            *(manifest.source, missing, len(training), ", ".join(columns.names)),
        )
    if task.loss == "nll" and task.bins.shortfall:
        logger.warning("%s", task.bins.shortfall)
    logger.info("task: %s", task_words(task))
    return task


def require_split_targets(manifest: Manifest) -> None:
    """Refuse splits whose targets teach or measure nothing.

    Raises:
        ManifestError: lists all of it.
    """
    problems = split_target_problems(manifest)
    if problems:
        raise ManifestError(manifest.source, problems)


def task_words(task: AnyTask) -> str:
    """A task in a line: what is asked, by which loss, with what was taken of the training split."""
    if isinstance(task, SeveralTargets):
        return " | ".join(f"{part.name} (weight {part.weight:g}): {task_words(part.task)}" for part in task.parts)
    words = [f"{task.kind} of {', '.join(task.columns)}, loss {task.loss}"]
    if task.kind == "ordinal":
        words.append(" < ".join(task.classes))
    if task.kind == "regression":
        scaled = f"log(1 + {task.columns[0]})" if task.log1p else task.columns[0]
        words.append(f"mean of {scaled} {task.mean:.4g}, deviation {task.std:.4g}")
    if task.kind == "survival":
        words.append(f"1 in {task.columns[1]} means {'censored' if task.censored else 'the event'}")
    if task.loss == "nll":
        words.append(f"{task.bins.n_bins} bins, borders {', '.join(f'{border:g}' for border in task.borders)}")
    if task.loss == "cox":
        words.append(f"ties {task.ties}")
    if task.strata_column:
        words.append(f"strata of {task.strata_column}")
    if task.pos_weight is not None:
        weights = zip(task.classes, task.pos_weight, strict=True)
        words.append("weights " + ", ".join(f"{name} {weight:.3g}" for name, weight in weights))
    return "; ".join(words)


def task_config(settings: TrainSettings, manifest: Manifest) -> dict[str, Any]:
    """What config.json says of the task before training; empty of classification.

    Raises:
        ManifestError: see `asked_task`.
        ValueError: see there.
    """
    task = asked_task(settings, manifest)
    if task is None:
        return {}
    if isinstance(task, SeveralTargets):
        apart = targets_apart(manifest)
        before = {
            part.name: before_training(part.task, of_part.in_split("train")).to_json()
            for part, of_part in zip(task.parts, apart, strict=True)
        }
        return {**task.to_json(), KEY: before}
    return {**task.to_json(), KEY: before_training(task, manifest.in_split("train")).to_json()}
