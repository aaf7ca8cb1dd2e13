"""A cohort of features on disk, examined as a whole before anything is trained on it."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.feature_memory import FeatureMemory
from ds_wsi.bags.features import FeatureFile, FeatureFileError, find_features, read_features, read_shape
from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry, parse_manifest
from ds_wsi.bags.policy import CHECKS
from ds_wsi.bags.same_files import files_across_splits, require_files_apart, warn_of_shared_files
from ds_wsi.bags.splits import assign_splits
from ds_wsi.bags.summary import log_cohort
from ds_wsi.bags.target_columns import ONE_CLASS, TargetColumns
from ds_wsi.runtime.files import read_object, write_json
from ds_wsi.runtime.fingerprint import file_fingerprint
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.temporary import remove_left_behind

RECORD = "features.json"  # what was found in files that have been read, so that they need not be read again


def load_feature_cohort(
    manifest_path: str | Path,
    features_dir: str | Path,
    *,
    in_dim: int | None = None,
    check: str = "full",
    record_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    workers: int = 1,
    need_splits: bool = True,
    write_record: bool = True,
    labels: str = "required",
    columns: TargetColumns = ONE_CLASS,
    choose: Callable[[Manifest], Manifest] | None = None,
    memory_bytes: int = 0,
) -> Cohort:
    """Read and check a cohort whose bags are files of features: the table, then the files; slides need not be there.

    Args:
        manifest_path: the table, see `read_manifest`; the column `path` may be empty or absent.
        features_dir: a folder with one file `<slide_id>.h5`, `.pt` or `.safetensors` per slide.
        in_dim: the width that the features must have; by default that of most of the files.
        check: "full" reads every file once, also for values that are not finite; "shapes" reads their heads.
        record_dir: what was read whole is recorded there, and unchanged files (by size, time and fingerprint) are not
            read again.
        classes: class names in the order of the logits.
        seed: the seed that splits are drawn by, where the manifest has none.
        workers: threads that read.
        need_splits: whether splits are drawn where the manifest has none.
        write_record: False reads the record of `record_dir` and writes none.
        labels, columns: see `parse_manifest`.
        choose: takes the slides that are wanted, before their files are read.
        memory_bytes: see `FeatureMemory`, which keeps what is read here too.

    Raises:
        ManifestError: lists every problem of the manifest, before a file is read; else every problem of the files.
    """
    if check not in CHECKS:
        raise ValueError(f"--check_features must be one of {', '.join(CHECKS)}, got {check!r}")
    features_dir = Path(features_dir)
    manifest = _read_table(manifest_path, features_dir, classes, labels, columns)
    manifest = manifest if choose is None else choose(manifest)
    record = _read_record(record_dir) if check == "full" else {}
    files, problems = _examine_all(manifest.slides, features_dir, check, record, workers, FeatureMemory(memory_bytes))
    problems += _width_problems(files, in_dim)
    if record_dir is not None and check == "full" and write_record:
        remove_left_behind(Path(record_dir))
        _write_record(record_dir, files)
    known_by = [*map(_known_by(files).get, (slide.slide_id for slide in manifest.slides))]
    problems += files_across_splits(manifest.slides, known_by)
    if problems:
        raise ManifestError(manifest.source, problems)
    warn_of_shared_files(manifest.slides, known_by)
    cohort = Cohort(assign_splits(manifest, seed=seed) if need_splits else manifest, files)
    if need_splits:
        require_files_apart(cohort.manifest, known_by)
    logger.info("features of width %d from %s", files[0].width, features_dir)
    log_cohort(cohort.manifest, cohort.lengths)
    return cohort


def features_digest(cohort: Cohort, rows: Sequence[int]) -> str:
    """A name of the features of these rows' slides: by content where it was read, else by size, which it then says."""
    digest, by_size = hashlib.sha256(), False
    for part in cohort.parts(rows):
        file = part.grid
        assert isinstance(file, FeatureFile)
        content = file.n_bytes if file.checksum is None else f"crc {file.checksum}"
        by_size |= file.checksum is None
        digest.update(f"{file.slide_id} {file.n_rows} {file.width} {content}\n".encode())
    return digest.hexdigest()[:16] + (" by their sizes (--check_features shapes)" if by_size else "")


def _read_table(
    manifest_path: str | Path, features_dir: Path, classes: Sequence[str] | None, labels: str, columns: TargetColumns
) -> Manifest:
    """The manifest, whose slides need not be there; its problems are told together with that of the folder."""
    manifest, problems = parse_manifest(manifest_path, classes, need_slides=False, labels=labels, columns=columns)
    if not features_dir.is_dir():
        hint = "HINT: give the folder with one file per slide."
        problems.append(f"--features_dir must be a folder, got {features_dir}. {hint}")
    if problems:
        raise ManifestError(manifest.source, problems)
    return manifest


def _examine_all(
    slides: Sequence[SlideEntry],
    features_dir: Path,
    check: str,
    record: dict[str, dict[str, Any]],
    workers: int,
    memory: FeatureMemory,
) -> tuple[tuple[FeatureFile, ...], list[str]]:
    """The slides' files that are whole, and the problems of the others, both in the order of the slides."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = list(pool.map(lambda slide: _examine(slide, features_dir, check, record, memory), slides))
    files = tuple(result for result in results if isinstance(result, FeatureFile))
    return files, [str(result) for result in results if isinstance(result, FeatureFileError)]


def _examine(
    slide: SlideEntry,
    features_dir: Path,
    check: str,
    record: dict[str, dict[str, Any]],
    memory: FeatureMemory,
) -> FeatureFile | FeatureFileError:
    """What is in a slide's file; an error is returned, so that all can be listed."""
    try:
        path = find_features(features_dir, slide.slide_id)
        state = _state(path)
        entry = record.get(str(path.absolute()))
        if (
            entry is not None
            and tuple(entry["state"]) == state
            and entry.get("sha256") == file_fingerprint(path).sha256
        ):
            n_rows, width, checksum = (entry[name] for name in ("n_rows", "width", "checksum"))
        elif check == "shapes":
            (n_rows, width), checksum = read_shape(path), None
        else:
            features = read_features(path).features
            n_rows, width = features.shape
            checksum = zlib.crc32(features.contiguous().numpy().data)
            memory.keep(path, features)
        return FeatureFile(slide.slide_id, path, n_rows, width, *state, checksum, memory)
    except FeatureFileError as error:
        return error


def _known_by(files: Sequence[FeatureFile]) -> dict[str, tuple[int, ...] | None]:
    """Slide id -> what is the same for files of one content: their features where they were read, else their place.

    Features that are the same in every row say nothing of their slide (glass, or a broken encoder): None.
    """
    content_of = {file.slide_id: _content_of(file) for file in files}
    counts = Counter(content_of.values())
    path_of = {content_of[file.slide_id]: file.path for file in files if counts[content_of[file.slide_id]] > 1}
    empty = {content for content, path in path_of.items() if _is_constant(path)}
    return {slide_id: None if content in empty else content for slide_id, content in content_of.items()}


def _content_of(file: FeatureFile) -> tuple[int, ...]:
    if file.checksum is not None:
        return file.checksum, file.n_rows, file.width
    status = file.path.stat()
    return status.st_dev, status.st_ino


def _is_constant(path: Path) -> bool:
    features = read_features(path).features
    return bool((features == features[:1]).all()) and (len(features) > 1 or bool((features == features[0, 0]).all()))


def _width_problems(files: Sequence[FeatureFile], in_dim: int | None) -> list[str]:
    if not files:
        return []
    (commonest, count), *_ = Counter(file.width for file in files).most_common(1)
    expected, whose = (in_dim, "the model's") if in_dim else (commonest, f"those of {count} of {len(files)} slides")
    return [
        f"features must be of width {expected}, {whose}, got {file.width} (slide {file.slide_id}, {file.path}). "
        "HINT: extract them with the same encoder."
        for file in files
        if file.width != expected
    ]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_record(record_dir: str | Path | None) -> dict[str, dict[str, Any]]:
    path = None if record_dir is None else Path(record_dir) / RECORD
    if path is None or not path.is_file():
        return {}
    try:
        content = read_object(path, RECORD)
        record: dict[str, dict[str, Any]] = content["files"]
        if content["sha256"] == _digest(record):
            return record
        reason = "another checksum than was written"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"none ({error})"
    logger.warning("%s must be the record of files that were read, got %s: they are read again", path, reason)
    return {}


def _digest(record: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write_record(record_dir: str | Path, files: Sequence[FeatureFile]) -> None:
    record = _read_record(record_dir)  # again: another run may have written to it meanwhile
    entries = {
        str(file.path.absolute()): {
            "state": [file.n_bytes, file.modified_ns],
            "sha256": file_fingerprint(file.path).sha256,
            "n_rows": file.n_rows,
            "width": file.width,
            "checksum": file.checksum,
        }
        for file in files
    }
    if any(record.get(name) != entry for name, entry in entries.items()):
        record |= entries
        write_json(Path(record_dir) / RECORD, {"sha256": _digest(record), "files": record})
