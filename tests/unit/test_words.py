"""Numbers are told with their nouns, and code and documentation keep to the rules of wording."""

from pathlib import Path

import pytest
from wording import faults, file_faults, text_faults

from ds_wsi.runtime.words import counted

ROOT = Path(__file__).parents[2]
CLEAN = (
    "__init__.py",
    "bags",
    "cli.py",
    "commands",
    "compression",
    "config.py",
    "doctor",
    "engines",
    "evaluation",
    "models",
    "norms",
    "partition",
    "runtime",
    "slides",
    "stacking",
    "targets",
    "tile_parallel",
    "training",
)
# Rule -> the packages and modules of ds_wsi for which it holds; the aim is all. Each holds for launch, too.
HELD = {
    "subject": CLEAN,
    "per": CLEAN,
    "because": CLEAN,
    "name": CLEAN,
}
PROSE = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (1, "slide", "1 slide"),
        (0, "tile", "0 tiles"),
        (3000, "slide", "3,000 slides"),
        (2, "process", "2 processes"),
        (1, "process", "1 process"),
        (2, "epoch", "2 epochs"),
        (2, "batch", "2 batches"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
    ],
)
def test_a_number_and_its_noun(number, noun, words):
    assert counted(number, noun) == words


@pytest.mark.parametrize("rule", HELD)
def test_the_code_keeps_to_the_rules_of_wording(rule):
    broken = [
        f"{path.relative_to(ROOT)}:{fault.line}: {fault.words}"
        for folder in (*(ROOT / "ds_wsi" / name for name in HELD[rule]), ROOT / "launch")
        for path in _modules(folder)
        for fault in file_faults(path)
        if fault.rule == rule
    ]
    assert not broken, "\n".join(broken)


def test_the_documentation_keeps_to_the_rules_of_wording():
    broken = [f"{path.relative_to(ROOT)}:{fault.line}: {fault.words}" for path in PROSE for fault in file_faults(path)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("rule", HELD)
def test_the_tests_keep_to_the_rules_of_wording(rule):
    modules = [path for path in _modules(ROOT / "tests") if path != Path(__file__)]  # here faults are planted
    broken = [
        f"{path.relative_to(ROOT)}:{fault.line}: {fault.words}"
        for path in modules
        for fault in file_faults(path)
        if fault.rule == rule
    ]
    assert not broken, "\n".join(broken)


def _modules(path):
    modules = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert modules, f"{path} must be a module or a package"
    return modules


PLANTED = '''"""Of a module."""
# Read here, for it
# takes a second.


def _read(path, place):
    """Read a file.

    Args:
        path: of the file.
        place, other (int, px): which of them.
        mode: whether it is read once a
            step.

    Returns:
        With its tiles.
    """
    # The device holds 128 tiles a
    # chunk at the most.
    for found in path:
        own = known = found
    raise ValueError(f"labels must be one a bag, got {own}. HINT: give {known} numbers a class, for it has none.")
'''


def test_each_rule_finds_what_is_planted():
    assert [(fault.line, fault.rule) for fault in faults(PLANTED)] == [
        (1, "subject"),
        (2, "because"),
        (6, "name"),
        (10, "subject"),
        (11, "subject"),
        (12, "per"),
        (16, "subject"),
        (18, "per"),
        (20, "name"),
        (21, "name"),
        (21, "name"),
        (22, "because"),
        (22, "per"),
        (22, "per"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "slides a step",
        "once a call",
        "read once an epoch",
        "one Arrow file a slide",
        "24 bytes an entry",
        "one line a kind",
        "4 GiB a GPU",
        "imported here, for help needs none",
        "A copy, for the payload may begin anywhere.",
        "It sends nothing, for they are there.",
        "They are kept, for packing is long.",
        "They share it evenly, for each of them plans by itself.",
    ],
)
def test_a_wrong_word_is_found(text):
    assert len(list(text_faults(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "slides per step",
        "Which tiles a slide has.",
        "give every rank a tile",
        "a layer reads a tile's rows",
        "JPEG, for the tiles that cannot be copied",
        "a hazard, for a loss of your own",
        "their means, for optimizers that every rank has whole",
        "HINT: for two classes give both columns",
        "read a chunk at a time",
        "two gradients, for the next step",
    ],
)
def test_a_right_word_is_not(text):
    assert list(text_faults(text)) == []
