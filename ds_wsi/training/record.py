"""What a run's settings say of it in a table of runs."""

import json
from pathlib import Path
from typing import Any

from ds_wsi.evaluation.record import PRECISION, RunRecord
from ds_wsi.models import SlideModel
from ds_wsi.runtime.setting import Decides
from ds_wsi.training.context import RunContext
from ds_wsi.training.features import encoder_of_features
from ds_wsi.training.same_run import optimizer_words
from ds_wsi.training.setting_list import SETTINGS, deciding, key_of
from ds_wsi.training.settings import DataSettings
from ds_wsi.training.stopping import stopping_words

# Told by a key of its own; and how activations are cut, whose draws differ as those of two seeds do.
_ELSEWHERE = {
    "policies.reading.tile_store",
    "policies.norm.training",
    "policies.compression.hook",
    "run.eval_precision",
    "run.validate_beside",
    "run.early_stopping_patience",
    "run.deepspeed",
    *(f"policies.partition.{name}" for name in ("mode", "axis", "chunk_size", "bn_population")),
}


DEMO_NAMES = {"plain": "demo", "stains": "demo_stains", "sparse": "demo_sparse", "graded": "demo_graded"}


def run_record(run: RunContext) -> RunRecord:
    """The record that is written beside the run's results."""
    settings = run.settings
    return RunRecord(
        dataset=dataset_name(settings.data),
        encoder=_encoder_name(run),
        aggregator=run.config.aggregator,
        training=training_name(run.module),
        seed=settings.run.seed,
        split=split_name(settings.data),
        test_split="test",
        evaluation=settings.run.evaluation,
        settings=json.loads(json.dumps(_group_settings(run))),  # as the file has it: tuples are lists
    )


def _encoder_name(run: RunContext) -> str:
    """The encoder as given, because models of a hub share architectures; of features what their files or folder say."""
    if run.config.encoder is not None:
        return run.settings.model.encoder
    encoder = encoder_of_features(run.cohort)
    if encoder is None:
        return f"features {Path(str(run.settings.data.features_dir)).name}"
    return f"features of {encoder.split()[0]}"


def dataset_name(data: DataSettings) -> str:
    """The name given, or the manifest's without its suffix; a demo cohort's own."""
    return data.dataset_name or (Path(data.manifest).stem if data.manifest else DEMO_NAMES[data.demo])


def split_name(data: DataSettings) -> str:
    """The name given; without one, a draw of splits with another seed than the usual is a split of its own."""
    return data.split_name or (f"split_seed {data.split_seed}" if data.split_seed else "")


def training_name(module: SlideModel) -> str:
    """What was trained of the encoder: "frozen" (nothing), "partly frozen" or "end to end" (all parameters)."""
    trained = [parameter.requires_grad for parameter in module.encoder.parameters()]
    if not any(trained):
        return "frozen"
    return "end to end" if all(trained) else "partly frozen"


def _group_settings(run: RunContext) -> dict[str, Any]:
    """Everything that changes a result but what tables have columns for; not what only changes how it is computed."""
    settings, policies = run.settings, run.settings.policies
    decided = deciding(settings, Decides.RESULT, Decides.RESOLVED)
    if run.comm is None:  # nothing is sent
        decided = {
            field_path: value
            for field_path, value in decided.items()
            if not field_path.startswith("policies.compression.")
        }
    values = {
        key_of(field_path): value
        for field_path, value in decided.items()
        if not SETTINGS[field_path].setting.column and field_path not in _ELSEWHERE
    }
    values |= {
        "slides_per_step": run.step_layout.bags_per_step,
        "from_tile_store": bool(policies.reading.tile_store),
        "norm_training": run.config.norm_training,
        "early_stopping": stopping_words(settings),
        "optimizer": optimizer_words(run),
    }
    values |= {"comm_hook": run.comm.name} if run.comm else {}
    values |= {PRECISION: settings.run.eval_precision} if settings.run.eval_precision != "no" else {}
    if run.config.encoder is None and (encoder := encoder_of_features(run.cohort)) is not None:
        values["features"] = encoder  # with the checksum of its weights
    return values
