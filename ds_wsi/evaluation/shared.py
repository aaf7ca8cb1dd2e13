"""Predictions and heat maps of a cohort by several processes that share a folder, each slide by one of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.shards import shard_order
from ds_wsi.evaluation.heatmap import heat_map_of
from ds_wsi.evaluation.parts import FOLDER, Parts
from ds_wsi.evaluation.predict import SlidePrediction, predict_slides
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.slide_maps import NO_ATTENTION, draw_heatmap, map_path, tell_not_drawn
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.runtime.locks import lock_path, remove_dead_locks, shared_stream
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.shards import Shard
from ds_wsi.runtime.temporary import remove_left_behind


class PredictedSlide(NamedTuple):
    """A slide's prediction, and whether this process made it; else it was there, or another process has."""

    prediction: SlidePrediction
    made_here: bool


class DrawnSlide(NamedTuple):
    """A slide's heat map, or those of a patient's slides, and whether this process drew them."""

    row: int
    paths: tuple[Path, ...]
    drawn_here: bool


@dataclass(frozen=True)
class Sharing:
    """What the processes work on, and which of them this is.

    Args:
        model: the model, on the device to compute on.
        cohort: the slides, the same on all.
        folder: the results'.
        made_of: what decides each row's prediction and heat map: files with another are written anew.
        policy: how tiles are read.
        failures: where unreadable tiles are recorded, of all slides.
        protocol: the tiles that are taken.
        shard: this process.
    """

    model: SlideModel
    cohort: Cohort
    folder: Path
    made_of: Sequence[str]
    policy: ReadPolicy
    failures: FailureLog
    protocol: EvaluationProtocol
    shard: Shard

    def known_by(self, row: int) -> str:
        """What a slide's prediction and heat map are known by."""
        return self.made_of[row]

    def predict(self) -> Iterator[PredictedSlide]:
        """Every slide's prediction, kept in a file of its own, after its heat map.

        So a killed call goes on where it was. Ends when all slides are done, here or elsewhere.

        Raises:
            ValueError: a file of something else has the name of a slide's.
        """
        slides = self.cohort.manifest.slides
        slide_ids = [slide.slide_id for slide in slides]
        folder = self._made(self.folder / FOLDER)
        parts = Parts(folder, slides, self.made_of, self.failures)

        def found(row: int) -> PredictedSlide | None:
            prediction = parts.read(row)
            return None if prediction is None else PredictedSlide(prediction, False)

        def work(rows: Iterator[int]) -> Iterator[tuple[int, PredictedSlide]]:
            for prediction in self._predictions(rows):
                draw_heatmap(self.folder / "heatmaps", self.cohort, prediction, self.made_of[prediction.slide])
                parts.write(prediction)
                yield prediction.slide, PredictedSlide(prediction, True)

        left = []
        for row in self._order():
            there = found(row)
            if there is None:
                left.append(row)
            else:
                yield there
        yield from shared_stream(left, lambda row: lock_path(folder, slide_ids[row]), found, work)
        remove_dead_locks(folder)

    def draw(self) -> Iterator[DrawnSlide]:
        """Every slide's heat map in the folder itself; those of slides without one are told at the end.

        An aggregator without attention draws none: its first slide tells.
        """
        slides, folder = self.cohort.manifest.slides, self._made(self.folder)
        left_out: dict[str, list[str]] = {}

        def found(row: int) -> DrawnSlide | None:
            paths = tuple(map_path(folder, part) for part in self.cohort.parts([row]))
            there = all(heat_map_of(path) == self.made_of[row] for path in paths)
            return DrawnSlide(row, paths, False) if there else None

        def work(rows: Iterator[int]) -> Iterator[tuple[int, DrawnSlide | str]]:
            for prediction in self._predictions(rows):
                row, drawn = prediction.slide, []
                for slide_id, result in draw_heatmap(folder, self.cohort, prediction, self.made_of[row]):
                    if isinstance(result, Path):
                        drawn.append(result)
                    else:
                        left_out.setdefault(result, []).append(slide_id)
                yield row, DrawnSlide(row, tuple(drawn), True) if drawn else next(reversed(left_out))

        stream = shared_stream(self._order(), lambda row: lock_path(folder, slides[row].slide_id), found, work)
        for result in stream:
            if isinstance(result, DrawnSlide):
                yield result
            elif result == NO_ATTENTION:
                logger.info("no heat maps: %s", NO_ATTENTION)
                stream.close()
                return
        remove_dead_locks(folder)
        tell_not_drawn(left_out)

    def _predictions(self, rows: Iterator[int]) -> Iterator[SlidePrediction]:
        cohort = self.cohort
        return predict_slides(
            self.model, cohort.manifest.slides, cohort.grids, rows, self.policy, self.failures, self.protocol
        )

    def _order(self) -> list[int]:
        return shard_order(self.cohort.lengths, self.shard)

    @staticmethod
    def _made(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left_behind(folder)
        return folder
