"""`ds_wsi.train` and `ds_wsi.predict`: two commands as functions, of the same options and with the same errors.

Keywords are turned into the words of a command line, and parsed by its parser: nothing is declared twice.
"""

import csv
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from ds_wsi.bags.slide_entry import NAMES
from ds_wsi.commands.evaluate import add_evaluate, run_evaluate
from ds_wsi.commands.parser import Parser
from ds_wsi.runtime.files import read_object
from ds_wsi.training.options import add_train_options, settings_from
from ds_wsi.training.yaml_config import typed

PROBABILITY, COUNT = "probability_", "n_tiles"  # columns of predictions.csv that hold numbers
OF_PREDICT = ("model", "manifest", "output_dir")  # options that are arguments of `predict`


class _Raising(Parser):
    """A parser of keywords: what is wrong is raised, and a name is given whole."""

    def __init__(self, *names: Any, **how: Any) -> None:
        super().__init__(*names, **({"allow_abbrev": False} | how))

    def error(self, message: str) -> NoReturn:
        """Raise ValueError, with the words of the command line."""
        hint = "" if "HINT" in message else ". HINT: keywords are the command's options, which its --help lists."
        raise ValueError(f"{self.prog}: {message}{hint}")

    def words(self, settings: Mapping[str, Any]) -> list[str]:
        """The words of a command line that say the same: None leaves an option out, as does False a flag's."""
        words = []
        for name, value in settings.items():
            option, off = f"--{name}", f"--no_{name}"
            if value is None:
                continue
            if value is False and off in self._option_string_actions:
                words.append(off)
            elif value is False and option in self._option_string_actions:
                if self._option_string_actions[option].nargs not in (0, "?"):
                    self.error(f"{name} must be a value, got False")
            else:
                words.append(option if value is True or value is False else f"{option}={typed(value)}")
        return words


def train(**settings: Any) -> dict[str, Any]:
    """Train a slide model, as `ds-wsi train` does: the same settings, folder and errors, to the same bits.

    Collective: under a launcher every process calls it with the same settings. It can be called several times.

    Args:
        settings: the options of `ds-wsi train`, with underscores, such as `manifest="cohort.csv"`, `bf16=True`,
            `classes=("normal", "tumor")`, `aggregator_options={"hidden_dim": 64}`; what is left out, or None, has the
            option's default.

    Returns:
        "output_dir", the run's folder, "metrics", the test metrics with their intervals, and "seconds"; on the main
        process, elsewhere an empty dict.

    Raises:
        ManifestError: lists everything that is wrong with the cohort, before anything is trained.
        ValueError: an option that there is not, a value that it does not take, settings that contradict each other.
        Stopped: the run was asked to end by a signal, or by `max_minutes`; `resume_from_checkpoint=True` goes on.
    """
    from ds_wsi.training.loop import train as train_run  # here, because DeepSpeed and Accelerate take seconds to import

    parser = _Raising("ds_wsi.train")
    add_train_options(parser)
    return train_run(*settings_from(parser.parse_args(parser.words(settings))))


def predict(
    run: str | Path, slides: str | Path | Sequence[str | Path], output_dir: str | Path | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Predict slides with an exported model, as `ds-wsi evaluate` does.

    Args:
        run: the run's folder, with config.json and model.safetensors.
        slides: a manifest, of which all slides are predicted unless `split` says which; or a list of slide files, whose
            names without suffix are their ids.
        output_dir: folder of what `ds-wsi evaluate` writes; None keeps nothing. Processes that share the slides need
            one.
        settings: other options of `ds-wsi evaluate`, with underscores, such as `device="cpu"` or
            `allow_code="my_models"`.

    Returns:
        A row of predictions.csv for each slide: slide_id, patient_id, label where there are labels, predicted, n_tiles
        and, as floats, `probability_<class>` of each class. Of another task than classification its columns, see
        docs/how_to/tasks.md: floats, None where a cell is empty, and text of grades and risk groups. Where a bag is a
        patient's, a row is one patient's, with slide_ids in the place of slide_id.

    Raises:
        ManifestError: lists everything that is wrong with the cohort.
        ValueError: an option that there is not, a value that it does not take, or a folder that holds no model.
    """
    given = [name for name in OF_PREDICT if name in settings]
    if given:
        raise ValueError(f"ds_wsi.predict: {given[0]} must not be a keyword. HINT: predict(run, slides, output_dir).")
    commands = _Raising("ds_wsi").add_subparsers(parser_class=_Raising)
    add_evaluate(commands)
    parser: _Raising = commands.choices["evaluate"]
    parser.prog = "ds_wsi.predict"
    with ExitStack() as scope:
        folder = Path(scope.enter_context(TemporaryDirectory()) if output_dir is None else output_dir)
        manifest = slides
        if not isinstance(slides, str | Path):
            manifest = _manifest_of(slides, Path(scope.enter_context(TemporaryDirectory())))
        named = {"model": run, "manifest": manifest, "output_dir": folder}
        run_evaluate(parser.parse_args(parser.words({"split": "all", **settings, **named})))
        task = read_object(Path(run) / "config.json", "config.json").get("task", {})
        return rows_of_file(folder / "predictions.csv", task)


def _manifest_of(files: Sequence[str | Path], folder: Path) -> Path:
    missing = [str(name) for name in files if not Path(name).exists()]
    if missing:
        raise ValueError(
            f"slides must be a manifest or a list of slide files, got {missing[0]}, which does not exist "
            f"({Path.cwd()}). HINT: check the path."
        )
    path = folder / "slides.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "path"])
        writer.writerows([Path(name).stem, Path(name).resolve()] for name in files)
    return path


def rows_of_file(path: Path, task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a predictions.csv, its numbers as numbers; `task` as config.json has it, empty of classification."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    value_of = partial(_target_value, _words_of(task)) if task else _number
    return [{name: value_of(name, text) for name, text in row.items()} for row in rows]


def _number(name: str, text: str) -> Any:
    if name == COUNT:
        return int(text)
    return float(text) if name.startswith(PROBABILITY) else text


def _words_of(task: Mapping[str, Any]) -> set[str]:
    """The columns of predictions.csv that hold words."""
    if "targets" in task:
        return {name for target in task["targets"] for name in _words_of(target)}
    column = task["columns"][0]
    grades = {column, f"{column}_predicted"} if task["kind"] == "ordinal" else set()
    return {*NAMES, f"{column}_group", *grades}


def _target_value(words: Collection[str], name: str, text: str) -> Any:
    if name in words:
        return text
    if name == COUNT:
        return int(text)
    return float(text) if text else None
