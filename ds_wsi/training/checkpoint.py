"""Checkpoints that are whole or absent, and known to be whole before they are loaded.

A checkpoint is written under a temporary name, listed file by file with size and SHA-256, synced and renamed. One whose
files do not match the list is named, passed over and kept; the one before it is used. An old one is deleted by its
list: what else lies in its folder stays.
"""

import hashlib
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ds_wsi.engines.accelerate import Accelerator, CommHandle, broadcast_object_list
from ds_wsi.runtime.files import link_or_copy, sync_directory, sync_file, write_json
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.temporary import temporary_folder, usual_mode

FILE_LIST = "files.json"
STATE = "state.json"
PENDING_WEIGHTS = "pending-validation.safetensors"  # of the last finished epoch, where it is not validated yet
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps, as the HF Trainer names it."""
    return f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    comm: CommHandle | None = None,
    pending: Path | None = None,
) -> Path:
    """Write the engine's state and the run's `state` (JSON), then delete all but the newest `keep` checkpoints.

    A communication hook's state lies beside the engine's, a file a rank; so do weights whose validation is `pending`.

    Collective: every rank calls it; the ranks write their shards side by side.
    """
    final = output_dir / checkpoint_name(step)
    with ExitStack() as scope:
        made: list[Path | None] = [None]
        if accelerator.is_main_process:
            made = [scope.enter_context(temporary_folder(output_dir)) / final.name]
        temporary: Path = broadcast_object_list(made)[0]  # its name is random: the ranks write into one folder
        accelerator.save_state(str(temporary))
        if comm is not None:
            comm.save(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / STATE, state)
            if pending is not None:
                link_or_copy(pending, temporary / PENDING_WEIGHTS)
            _use_mode(temporary, usual_mode(temporary.parent))
            seal(temporary)
            _make_way(final)
            temporary.rename(final)
            sync_directory(output_dir)
            whole = [path for path in list_checkpoints(output_dir) if (path / FILE_LIST).is_file()]
            for old in whole[keep:]:
                remove_checkpoint(old)
    accelerator.wait_for_everyone()
    return final


def remove_checkpoint(directory: Path) -> None:
    """Delete the files that a checkpoint's list names, the list, and folders that are empty then.

    What the list does not name was not written by the run: it stays, with the folder, and a warning names it. Symbolic
    links are not followed.
    """
    try:
        listed = json.loads((directory / FILE_LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        listed = None
    names = {*listed, FILE_LIST} if isinstance(listed, dict) else set()
    for folder, _, files in os.walk(directory, topdown=False):
        for name in sorted(
            files, key=lambda name: name == FILE_LIST
        ):  # the list last: a kill leaves what names the rest
            path = Path(folder) / name
            if path.relative_to(directory).as_posix() in names:
                path.unlink()
        if not os.listdir(folder):
            os.rmdir(folder)
    if directory.exists():
        logger.warning("%s is kept: it holds what is not in its %s", directory, FILE_LIST)


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


def _use_mode(directory: Path, mode: int) -> None:
    """Give every file the usual permissions: the engine's writers keep some to their owner."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, comm: CommHandle | None = None) -> dict[str, Any]:
    """Load the engine's state, and the hook's, from a checkpoint that `verify` found whole, and return the run's."""
    accelerator.load_state(str(checkpoint))
    if comm is not None:
        comm.load(checkpoint)
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's state of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: a folder's path, or with "latest" the newest whole one of `output_dir`.

    Raises:
        ValueError: a named checkpoint is missing or torn, or all of a run's are torn; says which file and why.
    """
    if wanted != "latest":
        checkpoint = Path(wanted)
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


def seal(directory: Path) -> None:
    """List every file below `directory` with its size and SHA-256, and sync them all to the disk."""
    listed = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        listed[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sync_file(path)
    write_json(directory / FILE_LIST, listed)


def verify(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    if not (directory / FILE_LIST).is_file():
        return f"{FILE_LIST} is missing"
    try:
        listed = json.loads((directory / FILE_LIST).read_text(encoding="utf-8"))
    except ValueError:
        return f"{FILE_LIST} is not JSON"
    # A damaged list can still be JSON.
    entries = listed.values() if isinstance(listed, dict) else ()
    if not entries or not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        return f"{FILE_LIST} does not list files with bytes and sha256"
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
