"""The command line: what it imports, what it says of a misspelt word, and of every kind of error."""

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ds_wsi
from ds_wsi.cli import build_parser, main
from ds_wsi.commands import COMMANDS
from ds_wsi.commands.foreign_names import FOREIGN_NAMES
from ds_wsi.runtime.errors import is_ours, naming, report
from ds_wsi.runtime.log import logger

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "deepspeed", "accelerate", "transformers", "timm", "numpy", "datasets", "evaluate", "matplotlib")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["trian"], ["--no_such"]])
def test_what_needs_no_command_imports_no_library(arguments):
    code = (
        "import sys\nfrom ds_wsi.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('code', code, 'imported', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = python(code)
    assert f"code {0 if arguments and arguments[0] in ('--help', '--version') else 2} imported []" in done.stdout


def test_a_commands_help_imports_no_engine_and_no_encoder():
    code = (
        "import sys\nfrom ds_wsi.cli import main\n"
        "try:\n    main(['train', '--epochs', '3'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = python(code)
    assert set(eval(done.stdout)) <= {"numpy"}
    assert done.stderr.splitlines()[-1].endswith("HINT: did you mean --num_train_epochs?")


def test_commands_come_in_the_order_of_work(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    places = [re.search(rf"^    {name} ", printed, re.MULTILINE).start() for name in COMMANDS]
    assert places == sorted(places)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"ds-wsi \S.*\n", capsys.readouterr().out)


def test_the_parser_of_one_command_is_that_of_all():
    line = ["train", "--num-train-epochs", "2", "--bf16"]
    one, all_of_them = build_parser("train").parse_args(line), build_parser().parse_args(line)
    assert vars(one) == vars(all_of_them)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", r"invalid choice: 'trian'\. HINT: did you mean train\?"),
        ("train --num_train_epoch_s 3", r"HINT: did you mean --num_train_epochs\?"),
        ("train --NUM_TRAIN_EPOCHS 3", r"HINT: did you mean --num_train_epochs\?"),
        ("train --learning-rat 1 --foo", r"unrecognized arguments: --foo"),  # argparse's own abbreviation
        ("train --aggregator ABMLI", r"argument --aggregator: invalid choice: 'ABMLI'\. HINT: did you mean abmil\?"),
        ("train --aggregator nothing_like", r"HINT: one of abmil, gated_abmil"),
        ("train --adam_beta1 0.9", r"HINT: here it is optimizer\.params\.betas of the DeepSpeed JSON\."),
        ("train --warmup-stepps 3", r"HINT: did you mean --warmup_steps"),
        ("tile --manifest m --output_dir o --tilesize_px 3", r"HINT: did you mean --tile_size_px\?"),
        ("report run --metrics auc", r"HINT: did you mean --metric\?"),
        (
            "train --learning_rate x",
            r"argument .*--learning_rate.*invalid float value: 'x'\. HINT: ds-wsi train --help",
        ),
    ],
)
def test_a_misspelt_word_is_one_line_with_what_was_meant(line, words, capsys):
    with pytest.raises(SystemExit) as left:
        main(line.split())
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert len(printed.splitlines()) == 1
    assert re.search(words, printed), printed


def test_the_list_of_other_names_is_the_documents():
    text = (ROOT / "docs" / "options.md").read_text()
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.+) \|$", text, re.MULTILINE))
    assert {name: words.replace("`", "") for name, words in rows.items()} == {
        name: words.replace("`", "") for name, words in FOREIGN_NAMES.items()
    }
    options = {
        option
        for action in build_parser("train")._subparsers._group_actions[0].choices["train"]._actions
        for option in action.option_strings
    }
    for name, words in FOREIGN_NAMES.items():
        assert f"--{name}" not in options, name
        here = words if "accelerate launch" not in words else "--deepspeed"
        for option in re.findall(r"--\w+", here):
            assert option in options or option == "--dry_run", (name, option)


# --- errors ---


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def printed(monkeypatch):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    return records


def ours():
    ds_wsi.build_aggregator("nothing", 3, 2)


def torchs():
    with naming("slides S-001, S-002, step 3"):
        torch.nn.functional.batch_norm(torch.zeros(1, 3), None, None, training=True)


def bug():
    ds_wsi.build_aggregator("abmil", 3, 2)(None)


def no_number():
    """A ValueError of Python's, in a line of ours: no sentence of ours."""
    from ds_wsi.runtime.units import parse_bytes

    parse_bytes.__globals__["int"]("x")


def test_an_error_of_ours_is_printed_as_it_is(printed):
    error = raised(ours)
    assert is_ours(error)
    assert report(error) == 2
    assert printed == [str(error)]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError])
def test_ours_are_told_by_the_line_that_raised_them(kind, tmp_path):
    """The same words raised elsewhere are not ours."""
    package = Path(ds_wsi.__file__).parent
    sentence, library = ("raise kind('words')", "kind_of(kind)('words')")
    for filename, code, mine in (
        (package / "made_up.py", sentence, True),
        (tmp_path / "made_up.py", sentence, False),
        (package / "made_up.py", library, False),
    ):
        names = {"kind": kind, "kind_of": lambda kind: lambda words: (_ for _ in ()).throw(kind(words))}
        error = raised(
            lambda filename=filename, code=code, names=names: exec(
                compile(code if "kind_of" not in code else "next(kind_of(kind)('words'))", str(filename), "exec"), names
            )
        )
        assert is_ours(error) == mine, (filename, code)


def test_a_librarys_valueerror_has_its_slides_and_our_place(printed):
    error = raised(torchs)
    assert not is_ours(error)
    assert report(error) == 2
    assert "Expected more than 1 value per channel" in printed[0]
    assert "(slides S-001, S-002, step 3)" in printed[0]
    assert "Traceback" not in printed[0]


def test_a_system_error_has_its_path_and_a_remedy(printed, tmp_path):
    assert report(raised(lambda: (tmp_path / "none").read_text())) == 2
    assert printed[-1] == f"No such file or directory: {tmp_path / 'none'}. HINT: check the path."
    assert report(OSError(errno.ENOSPC, "No space left on device", "/out/model.safetensors")) == 2
    assert printed[-1].startswith("No space left on device: /out/model.safetensors. HINT: free space there")
    assert report(PermissionError(errno.EACCES, "Permission denied", "/slides/x")) == 2
    assert "Permission denied: /slides/x. HINT: the folder or file must be yours" in printed[-1]


def test_a_fault_of_ours_has_its_traceback_and_where_to_report_it(printed):
    for error in (raised(bug), raised(lambda: {}["key"]), NotImplementedError("x"), AssertionError("x")):
        with pytest.raises(type(error)) as left:
            report(error)
        assert left.value is error
        assert "report it in the project's issue tracker" in error.__notes__[-1]
        assert not printed


def test_every_traceback_can_be_had(printed, monkeypatch):
    monkeypatch.setenv("DS_WSI_TRACEBACK", "1")
    assert report(raised(ours)) == 2
    assert "Traceback" in printed[0]
    assert printed[1].startswith("aggregator must be one of")


def test_an_error_of_ours_in_a_worker_is_printed_as_it_is(printed, tmp_path):
    """Torch's loader hands it over like this: another error, with the traceback as text."""
    from torch._utils import ExceptionWrapper

    from ds_wsi.bags.features import read_features

    def in_worker(call):
        try:
            call()
        except Exception:
            return ExceptionWrapper(where="in DataLoader worker process 0")

    path = tmp_path / "none.pt"
    error = raised(in_worker(lambda: read_features(path)).reraise)
    assert "Original Traceback" in str(error)
    assert report(error) == 2
    assert printed == [f"features must be a file, got {path} (missing)"]
    with pytest.raises(ValueError, match="Original Traceback"):
        report(raised(in_worker(lambda: int("x")).reraise))


def test_a_command_ends_with_the_status_of_its_error(monkeypatch, capsys):
    from ds_wsi.commands import report as command

    def ending_with(error):
        def run(options):
            raise error

        monkeypatch.setattr(command, "run_report", run)
        return main(["report", "run"])

    assert ending_with(OSError(errno.EACCES, "Permission denied", "x")) == 2
    assert "Permission denied: x" in capsys.readouterr().err
    with pytest.raises(KeyError):
        ending_with(KeyError("x"))


def test_a_fault_is_printed_with_its_note(tmp_path):
    code = (
        "from ds_wsi.commands import report\n"
        "report.run_report = lambda options: {}['x']\n"
        "from ds_wsi.cli import main\nmain(['report', 'run'])"
    )
    done = python(code)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-2] == "KeyError: 'x'"
    assert "report it in the project's issue tracker" in lines[-1]


# --- logging in a user's own script ---

SAY = "import logging\n{}\nfrom ds_wsi.runtime.log import logger\nlogger.info('one')\nlogger.warning('two')\n{}"
OURS = ["[ds_wsi] INFO: one", "[ds_wsi] WARNING: two"]
COMMAND = "from ds_wsi.runtime.log import setup_logging; setup_logging(); logging.basicConfig()"


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ("", "", OURS),
        ("logging.basicConfig()", "", ["WARNING:ds_wsi:two"]),
        ("logging.basicConfig(level=logging.INFO)", "", ["INFO:ds_wsi:one", "WARNING:ds_wsi:two"]),
        ("", "logging.basicConfig()\nlogger.warning('three')", [*OURS, "WARNING:ds_wsi:three"]),
        ("logging.getLogger('ds_wsi').addHandler(logging.StreamHandler())", "", ["two"]),
        ("logging.getLogger('ds_wsi').setLevel('ERROR')", "", []),
        ("import os; os.environ['RANK'] = '1'", "", OURS[1:]),
        ("", f"{COMMAND}; logger.info('three')", [*OURS, "[ds_wsi] INFO: three"]),
    ],
)
def test_messages_show_once_by_default_and_by_a_users_own_setup(before, after, lines):
    assert python(SAY.format(before, after)).stderr.splitlines() == lines
