"""Checkpoints that are whole or absent, and known to be whole before they are loaded.

A checkpoint is written under a temporary name, listed file by file with size and SHA-256, synced and renamed. It holds
tensors (safetensors) and JSON: nothing in it can run when it is read, whoever wrote it, its list too. One whose
files do not match the list is named, passed over and kept; the one before it is used. An old one is deleted by its
list: what else lies in its folder stays.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_wsi.engines.accelerator.engine import Accelerator, broadcast_object_list
from ds_wsi.runtime.files import link_or_copy, open_file, read_file, sync_directory, sync_file, write_json
from ds_wsi.runtime.full_disk import naming_full_disk
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.temporary import temporary_folder
from ds_wsi.runtime.tensor_file import Written, write_tensors
from ds_wsi.training.saver import Patience, Saver

FORMAT = "ds_wsi.checkpoint.2"
FILE_LIST = "files.json"
STATE, MODEL = "state.json", "model.safetensors"
PENDING_WEIGHTS = "pending-validation.safetensors"  # of the last finished epoch, where it is not validated yet
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps, as the HF Trainer names it."""
    return f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, on the host, in memory that nobody changes.

    Args:
        state: JSON, of the main process.
        shared: file name -> tensors, of the main process.
        per_process: file name -> tensors, of each process.
    """

    state: dict[str, Any]
    shared: Mapping[str, Mapping[str, Tensor]]
    per_process: Mapping[str, Mapping[str, Tensor]]


def save_checkpoint(
    saver: Saver,
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    contents: Contents,
    keep: int,
    *,
    pending: Path | None = None,
    began: float | None = None,
    timeout_s: float = 1800.0,
) -> Path:
    """Have a checkpoint written, then all but the newest `keep` deleted. Collective: a broadcast.

    It is there when `saver` has written it: after `saver.close()`, or at once where the saver writes now. The room for
    it must have been made. Each process writes its own files, the main one all others; it waits for the rest's files,
    on a file system that all share.

    Args:
        saver: this process's.
        accelerator: the run's, of all processes.
        output_dir: the run's folder.
        step: optimizer steps that are done.
        contents: what this process puts into it.
        keep: how many of the newest checkpoints stay.
        pending: a file of weights whose validation is pending, that is not changed in place.
        began: `time.perf_counter()` when the training stopped for it; by default now.
        timeout_s: how long the main process waits for another's files.

    Returns:
        The folder that it will have.
    """
    began = time.perf_counter() if began is None else began
    final = output_dir / checkpoint_name(step)
    scope, made = ExitStack(), list[Path | None]([None])
    try:
        if accelerator.is_main_process:
            files = (*contents.shared.values(), *contents.per_process.values())
            n_bytes = sum(value.nbytes for tensors in files for value in tensors.values())
            folder = scope.enter_context(temporary_folder(output_dir, n_bytes)) / final.name
            folder.mkdir()
            if pending is not None:  # now: another may soon have its name
                link_or_copy(pending, folder / PENDING_WEIGHTS)
            made = [folder]
        temporary: Path = broadcast_object_list(made)[0]  # its name is random: the processes write into one folder
        if accelerator.is_main_process:
            waited = time.perf_counter() - began
            others = range(1, accelerator.num_processes)
            patience = partial(Patience, timeout_s, saver.ending)
            how = _How(scope, temporary, final, contents, keep, waited, saver.beside)
            job = partial(_write_all, how, others, patience)
        else:
            job = partial(_write_part, temporary, accelerator.process_index, contents.per_process)
    except BaseException:
        saver.leave_room()
        scope.close()
        raise
    saver.give(final.name, job)
    return final


@dataclass(frozen=True)
class _How:
    scope: ExitStack  # of the temporary folder
    temporary: Path
    final: Path
    contents: Contents
    keep: int
    waited_s: float
    beside: bool


def _write_all(how: _How, others: range, patience: Callable[[], Patience]) -> None:
    """The main process's side: its files, the others' as they come, the list, and the name."""
    began, temporary, final = time.perf_counter(), how.temporary, how.final
    with how.scope:
        files = {
            name: write_tensors(temporary / name, tensors)
            for name, tensors in {**how.contents.shared, **how.contents.per_process}.items()
        }
        write_json(temporary / STATE, how.contents.state)
        for rank in others:
            files |= _await_part(temporary, rank, patience())
        seal(temporary, files)
        _make_way(final)
        temporary.rename(final)
        sync_directory(final.parent)
        whole = [
            path for path in list_checkpoints(final.parent) if (path / FILE_LIST).is_file() and not path.is_symlink()
        ]
        for old in whole[how.keep :]:
            remove_checkpoint(old)
    seconds = time.perf_counter() - began
    if how.beside:
        words = f"waited {how.waited_s:.2f} s, written in {seconds:.2f} s beside training"
    else:
        words = f"waited {how.waited_s + seconds:.2f} s until it was written"
    logger.info("checkpoint: %s (%s)", final, words)


def _write_part(temporary: Path, rank: int, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Another process's side: its files, and last a file that lists them."""
    if not temporary.is_dir():
        # Its failure stops the run; or it waits, and tells what --output_dir must be.
        logger.warning("%s is gone: the main process failed, or its --output_dir is another disk's", temporary)
        return
    try:
        with naming_full_disk(temporary.parent.parent):
            files = {name: write_tensors(temporary / name, tensors) for name, tensors in parts.items()}
        answer: dict[str, Any] = {"files": {name: written._asdict() for name, written in files.items()}}
    except Exception as error:
        if temporary.is_dir():
            _tell(_part_list(temporary, rank), {"failed": f"{type(error).__name__}: {error}"})
        raise
    _tell(_part_list(temporary, rank), answer)


def _tell(path: Path, answer: dict[str, Any]) -> None:
    """Write a message to the main process, which removes the folder when it has the last one: it comes last."""
    unread = path.with_name(f"{path.name}.unread")
    unread.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(unread, path)


def _part_list(temporary: Path, rank: int) -> Path:
    return temporary.parent / f"part-{rank:05}.json"


def _await_part(temporary: Path, rank: int, patience: Patience) -> dict[str, Written]:
    """Wait for another process's files; what is known of them.

    Raises:
        RuntimeError: it failed, or they did not come in time; names it.
    """
    path = _part_list(temporary, rank)
    while path.name not in os.listdir(path.parent):  # in the list: network file systems remember absent names
        if patience.is_over():
            raise RuntimeError(
                f"a checkpoint must have the files of every process, got none of rank {rank} in time "
                f"({temporary.name}). HINT: --output_dir must be a folder that all processes share."
            )
    answer = json.loads(read_file(path))
    if "failed" in answer:
        raise RuntimeError(f"rank {rank} could not write its part of {temporary.name}: {answer['failed']}")
    return {name: Written(**entry) for name, entry in answer["files"].items()}


def remove_checkpoint(directory: Path) -> None:
    """Delete the files that a checkpoint's list names, the list, and folders that are empty then.

    A process that is killed in the middle leaves the whole checkpoint under its name, or none. What the list does not
    name was not written by the run: it stays, with the folder, and a warning names it. Symbolic links are not followed.
    """
    try:
        listed = json.loads(read_file(directory / FILE_LIST))
    except (OSError, ValueError, RecursionError):
        listed = None
    names = {*listed, FILE_LIST} if isinstance(listed, dict) else set()
    if not _holds_others(directory, names):
        with suppress(OSError), temporary_folder(directory.parent) as aside:  # a full disk has no room for it
            moved = directory.rename(aside / directory.name)
            _delete_listed(moved, names)
            if moved.exists():  # somebody has put a file there meanwhile
                moved.rename(directory)
    if directory.exists():
        _delete_listed(directory, names)
    if directory.exists():
        logger.warning("%s is kept: it holds what is not in its %s", directory, FILE_LIST)


def _holds_others(directory: Path, names: set[str]) -> bool:
    """Whether a file or link lies there that is not among the names."""
    return any(
        path.relative_to(directory).as_posix() not in names
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _delete_listed(directory: Path, names: set[str]) -> None:
    for folder, _, files in os.walk(directory, topdown=False):
        # The list last: a kill leaves what names the rest.
        for name in sorted(files, key=lambda name: name == FILE_LIST):
            path = Path(folder) / name
            if path.relative_to(directory).as_posix() in names:
                path.unlink()
        if not os.listdir(folder):
            os.rmdir(folder)


def _make_way(final: Path) -> None:
    """Clear a checkpoint's name: of a torn one that was passed over, and is now reached again."""
    if final.is_dir() and not final.is_symlink():
        remove_checkpoint(final)
    if not os.path.lexists(final):
        return
    number = 1
    while os.path.lexists(aside := final.with_name(f"not-{final.name}-{number}")):
        number += 1
    final.rename(aside)
    logger.warning("%s was not written by this run as it is: moved to %s", final, aside.name)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's state of a checkpoint that `verify` found whole.

    Raises:
        ValueError: of an earlier version, whose files are not opened; or no such state.
    """
    try:
        state: Any = json.loads(read_file(checkpoint / STATE))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{STATE} of {checkpoint} must be JSON, got {error}. HINT: an earlier checkpoint.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        other = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{checkpoint} must have the format {FORMAT}, got {other or 'that of an earlier version'}: its files can "
            "run code when they are read, and are not opened. HINT: end that run with the version that began it, or "
            "start again with another --output_dir."
        )
    parts = ("progress", "fingerprint", "time", "facts")
    missing = [name for name in parts if not isinstance(state.get(name), dict)]
    if missing:
        raise ValueError(f"{STATE} of {checkpoint} must hold {', '.join(parts)}, got none of {', '.join(missing)}")
    return state


def find_checkpoint(output_dir: Path, asked: str) -> Path | None:
    """The checkpoint to resume from: a folder's path, or with "latest" the newest whole one of `output_dir`.

    Raises:
        ValueError: a named checkpoint is missing or torn, or all of a run's are torn; says which file and why.
    """
    if asked != "latest":
        checkpoint = Path(asked)
        problem = verify(checkpoint)
        if problem:
            raise ValueError(
                f"--resume_from_checkpoint must be a whole checkpoint, got {checkpoint}: {problem}. "
                "HINT: without a path the newest whole checkpoint of --output_dir is used."
            )
        return checkpoint
    candidates = list_checkpoints(output_dir)
    for candidate in candidates:
        problem = verify(candidate)
        if problem is None:
            return candidate
        logger.warning("%s is torn (%s): the checkpoint before it is used", candidate, problem)
    if candidates:
        raise ValueError(
            f"{output_dir} must hold a whole checkpoint, all {len(candidates)} are torn. "
            "HINT: start again with another --output_dir."
        )
    logger.info("no checkpoint in %s yet: starting from the beginning", output_dir)
    return None


def seal(directory: Path, files: Mapping[str, Written] | None = None) -> None:
    """List every file below `directory` with its size and SHA-256, and sync them all to the disk.

    Args:
        directory: the checkpoint's folder.
        files: what is known of files that were synced as they were written: they are not read again.
    """
    listed = {name: written._asdict() for name, written in (files or {}).items()}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in listed:
            listed[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            sync_file(path)
    write_json(directory / FILE_LIST, listed)


def verify(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    if not (directory / FILE_LIST).is_file():
        return f"{FILE_LIST} is missing"
    try:
        listed = json.loads(read_file(directory / FILE_LIST))
    except (ValueError, RecursionError):
        return f"{FILE_LIST} is not JSON"
    # A damaged list can still be JSON.
    entries = listed.values() if isinstance(listed, dict) else ()
    if not entries or not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        return f"{FILE_LIST} does not list files with bytes and sha256"
    # All that is read must be listed, or it would be used as it is.
    unlisted = {STATE, MODEL, *(path.name for path in directory.glob("[!.]*.safetensors"))} - listed.keys()
    if unlisted:
        return f"{FILE_LIST} does not list {', '.join(sorted(unlisted))}"
    for name, entry in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} has another SHA-256 than listed"
    return None


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
