"""What is fixed of a run is set once; what advances is set where its docstring says."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest

import ds_wsi
from ds_wsi.training.context import RunContext
from ds_wsi.training.run import Clock, Progress, Run

ROOT = Path(ds_wsi.__file__).parent
# Module below ds_wsi: what it sets. Their own methods, in training.run, set the rest.
WRITERS = {
    "training/loop.py": {"started", "epoch_seconds", "epoch_waited"},
    "training/resume.py": {"seconds_before", "starts", "saved"},
    "training/screen.py": {"told_of_waiting"},
    "training/validation.py": {"pending", "best_epoch"},
}


def test_no_field_of_a_run_is_set_again():
    run = object.__new__(Run)
    for field in dataclasses.fields(Run):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(run, field.name, None)
    advances = {field.name for field in dataclasses.fields(Run)} - {
        field.name for field in dataclasses.fields(RunContext)
    }
    assert advances == {"failures", "average", "saver", "progress", "clock"}


def targets(node):
    """The expressions that a statement sets."""
    given = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
    for target in given:
        yield from (part for part in ast.walk(target) if isinstance(part, ast.Attribute))


def test_what_advances_is_set_by_the_modules_that_its_docstring_names():
    names = {field.name for kind in (Progress, Clock) for field in dataclasses.fields(kind)}
    writers = {}
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "progress." in text or "clock." in text else ():
            for target in targets(node):
                holder = ast.unparse(target.value).rpartition(".")[2]
                if holder in ("progress", "clock") and target.attr in names:
                    writers.setdefault(str(path.relative_to(ROOT)), set()).add(target.attr)
    assert writers == WRITERS
    for kind in (Progress, Clock):
        for path, set_there in WRITERS.items():
            if set_there & {field.name for field in dataclasses.fields(kind)}:
                assert f"`{Path(path).stem}`" in kind.__doc__, (kind, path)


def test_a_step_is_counted_and_one_without_a_loss_is_not_in_the_mean():
    progress = Progress()
    progress.end_step(2.0, 4, skipped=False)
    progress.end_step(math.inf, 4, skipped=True)
    assert progress == Progress(step_in_epoch=2, global_step=2, loss_sum=2.0, bags_seen=4, skipped_steps=1)
    progress.end_epoch({"epoch": 1})
    assert progress == Progress(epoch=1, global_step=2, history=[{"epoch": 1}], skipped_steps=1)


def test_a_state_that_lacks_a_field_changes_nothing():
    state = dataclasses.asdict(Progress(epoch=3))
    progress = Progress()
    progress.put_back(state | {"of another version": 1})
    assert progress == Progress(epoch=3)
    del state["skipped_steps"]
    with pytest.raises(KeyError, match="skipped_steps"):
        progress.put_back(state | {"epoch": 4})
    assert progress.epoch == 3
