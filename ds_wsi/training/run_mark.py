"""What a protocol remembers of a run: with which settings its folder was begun."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.config import SECTION
from ds_wsi.evaluation.record import FILE_NAME as RECORD
from ds_wsi.evaluation.record import MARK_NAME, RunFolderError, RunRecord
from ds_wsi.runtime.files import read_object, write_json
from ds_wsi.runtime.fingerprint import file_fingerprint
from ds_wsi.runtime.locks import is_of_work
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import Decides
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.training.checkpoint import list_checkpoints
from ds_wsi.training.run_folder import is_protocol_mark
from ds_wsi.training.setting_list import SETTINGS, deciding, key_of
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.stopping import stopping_words

# What files hold. Marks of earlier versions do not have it: it is not compared then.
HINT = "HINT: give the data and options of the first start, or another --output_dir."
# Compared by what they hold; and how activations are cut, which a run that is moved may change.
_ELSEWHERE = {
    "data.manifest",
    "run.deepspeed",
    "run.validate_beside",
    *(f"policies.partition.{name}" for name in ("mode", "axis", "chunk_size")),
}
CONTENTS = ("slide_files", "encoder_weights_sha256")


def identity(settings: TrainSettings, deepspeed_config: dict[str, Any] | None) -> dict[str, Any]:
    """Field -> value of everything that decides the run's result, with its manifest's digest, as JSON has it."""
    kinds = (Decides.RESULT, Decides.RESOLVED, Decides.STEP, Decides.TEST, Decides.NAME)
    values = {
        key_of(field_path): value
        for field_path, value in deciding(settings, *kinds).items()
        if field_path not in _ELSEWHERE
    }
    values["early_stopping"] = stopping_words(settings)  # beside training it comes an epoch later
    values["manifest"] = _slides_digest(Path(str(settings.data.manifest)))
    values["slide_files"] = _contents_digest(Path(str(settings.data.manifest)))
    weights = settings.model.encoder_weights
    values["encoder_weights_sha256"] = file_fingerprint(weights).sha256 if weights and Path(weights).is_file() else None
    values["deepspeed"] = {key: value for key, value in (deepspeed_config or {}).items() if key != SECTION}
    as_json: dict[str, Any] = json.loads(json.dumps(values))
    return as_json


def _slides_digest(manifest: Path) -> str:
    """The digest of a manifest but for where its slides lie: data may be moved."""
    _, rows = read_delimited(manifest)
    kept = [{name: value for name, value in row.values.items() if name != "path"} for row in rows]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def _contents_digest(manifest: Path) -> str:
    """The digest of the slides that a manifest names, by what their files hold."""
    _, rows = read_delimited(manifest)
    paths = [manifest.parent / row.values["path"] for row in rows]
    digests = [slide_fingerprint(path).sha256 if path.is_file() else "missing" for path in paths]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def require_same(folder: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder that another run was begun in; a new or an empty one is fine.

    So is one that holds nothing to go on with: options that were refused after the mark was written can be corrected.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    mark = folder / MARK_NAME
    if not is_protocol_mark(mark):
        if folder.is_dir() and not all(map(is_of_work, folder.iterdir())):
            raise ValueError(
                f"{folder} must be this protocol's, got a folder without {MARK_NAME}. HINT: another --output_dir."
            )
        return
    if not list_checkpoints(folder) and not (folder / RECORD).exists():
        return
    remembered = read_object(mark, "the record of a protocol's run")
    # The version that wrote the mark had no such setting: it did what the default does.
    begun = {
        key_of(field_path): json.loads(json.dumps(one.default)) for field_path, one in SETTINGS.items()
    } | remembered
    unknown = [name for name in CONTENTS if name not in begun]
    if unknown:
        logger.warning("%s is of an earlier version, which did not record %s: not compared", mark, ", ".join(unknown))
    left_out = {*unknown} if "encoder_weights_sha256" in unknown else {*unknown, "model.encoder_weights"}
    names = [name for name in sorted(asked) if name not in left_out and begun.get(name) != asked[name]]
    differing = [_difference(name, begun.get(name), asked.get(name)) for name in names]
    if len(differing) == 1:
        raise ValueError(f"{differing[0]} ({mark}). {HINT}")
    if differing:
        lines = "\n".join(f"  {number}. {line}" for number, line in enumerate(differing, 1))
        raise ValueError(f"{folder} was begun with other settings, {len(differing)} differ ({mark}):\n{lines}\n{HINT}")


def _difference(name: str, begun: Any, asked: Any) -> str:
    if name == "manifest":
        return "slides, labels and splits must be what the run was begun with, got others"
    if name == "slide_files":
        return "the slides' files must be what the run was begun with, got files of other content"
    return f"{name} must be what the run was begun with, {begun}, got {asked}"


def mark_started(folder: Path, begun: dict[str, Any]) -> None:
    """Write what the run is begun with."""
    write_json(folder / MARK_NAME, begun)


def was_finished(folder: Path) -> bool:
    """Whether the folder holds a run's whole results."""
    try:
        RunRecord.read(folder)
    except RunFolderError:
        return False
    return (folder / "model.safetensors").is_file()
