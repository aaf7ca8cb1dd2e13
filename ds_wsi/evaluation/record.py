"""run.json: what a finished run was, so that a table can place it. Written last; a folder without it is unfinished."""

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.runtime.files import read_json, read_object, write_json

FILE_NAME = "run.json"
MARK_NAME = "protocol.json"  # with what a protocol began the run
RESULTS = ("metrics.json", "predictions.csv")
FORMAT, VERSION = "ds_wsi.run", 1
PRECISION = "eval_precision"  # among the settings, where it is another than the weights'


class RunFolderError(ValueError):
    """A folder that is no finished run; the message is the reason."""


@dataclass(frozen=True)
class RunRecord:
    """What a run was.

    Args:
        dataset: the name of the test slides' dataset.
        encoder, aggregator: their names (of features on disk their encoder's, or the folder's); together the method.
        training: "frozen", "partly frozen" or "end to end": what was trained of the encoder.
        seed: the training's seed.
        split: the split or fold of the dataset; empty where there is but one.
        test_split: the manifest's slides that were tested: "test", or "all" of an external cohort.
        evaluation: the tiles of those slides that were predicted on.
        settings: name -> value of everything else that runs of one group share.
    """

    dataset: str
    encoder: str
    aggregator: str
    training: str
    seed: int
    split: str
    test_split: str
    evaluation: EvaluationProtocol
    settings: dict[str, Any]

    @property
    def method(self) -> str:
        """Encoder and aggregator."""
        return f"{self.encoder} + {self.aggregator}"

    @property
    def protocol(self) -> str:
        """The evaluation, in words."""
        slides = "" if self.test_split == "test" else f", {self.test_split} slides"
        return f"{self.evaluation}{slides}"

    def evaluated_on(
        self, dataset: str, test_split: str, evaluation: EvaluationProtocol, precision: str = "no"
    ) -> "RunRecord":
        """The record of the same model on other slides, other tiles of them, or in another precision."""
        settings = {name: value for name, value in self.settings.items() if name != PRECISION}
        settings |= {"trained_on": self.dataset} if dataset != self.dataset else {}
        settings |= {PRECISION: precision} if precision != "no" else {}
        return replace(self, dataset=dataset, test_split=test_split, evaluation=evaluation, settings=settings)

    def write(self, directory: Path) -> None:
        """Write run.json beside the results, whose digests it holds. Atomic."""
        digests = {name: _digest(directory / name) for name in RESULTS}
        write_json(
            directory / FILE_NAME, {"format": FORMAT, "version": VERSION, **asdict(self), "results_sha256": digests}
        )

    @classmethod
    def read(cls, directory: Path) -> "RunRecord":
        """Read run.json, and check that the results beside it are the ones it was written for.

        Raises:
            RunFolderError: the folder is missing, unfinished, torn, or of another version.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            raise RunFolderError(
                f"unfinished: no {FILE_NAME}, which is written last" if directory.is_dir() else "no such folder"
            )
        try:
            values = read_json(path, FILE_NAME)
        except ValueError as error:
            raise RunFolderError(f"torn: {error}") from error
        if not isinstance(values, dict) or (values.pop("format", None), values.pop("version", None)) != (
            FORMAT,
            VERSION,
        ):
            raise RunFolderError(f"{FILE_NAME} is not of format {FORMAT} version {VERSION}")
        digests = values.pop("results_sha256", None)
        names = {entry.name for entry in fields(cls)}
        if set(values) != names or not isinstance(digests, dict):
            raise RunFolderError(f"torn: {FILE_NAME} must hold {sorted(names | {'results_sha256'})}")
        for name in RESULTS:
            if not (directory / name).is_file():
                raise RunFolderError(f"torn: no {name}")
            if _digest(directory / name) != digests.get(name):
                raise RunFolderError(f"torn: {name} is not the one that {FILE_NAME} was written for")
        try:
            record = cls(**values | {"evaluation": EvaluationProtocol(**values["evaluation"])})
        except (TypeError, ValueError) as error:
            raise RunFolderError(f"torn: {FILE_NAME} must tell how the run was evaluated, got {error}") from error
        for entry in fields(cls):
            kind = {"seed": int, "settings": dict, "evaluation": EvaluationProtocol}.get(entry.name, str)
            if type(getattr(record, entry.name)) is not kind:
                raise RunFolderError(f"torn: {entry.name} of {FILE_NAME} must be of type {kind.__name__}")
        return record


def read_metrics(directory: Path) -> dict[str, dict[str, Any]]:
    """The metrics of a run's metrics.json: name -> its value, None where it is undefined, and its interval.

    Raises:
        RunFolderError: there are none.
    """
    path = directory / "metrics.json"
    try:
        metrics = read_object(path, path.name)["metrics"]
        whole = all(type(entry["value"]) in (int, float, type(None)) for entry in metrics.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"torn: {path.name} must hold metrics, got {error!r} ({path})") from error
    if not whole:
        raise RunFolderError(f"torn: metrics must be numbers or null, got others ({path})")
    return dict(metrics)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
