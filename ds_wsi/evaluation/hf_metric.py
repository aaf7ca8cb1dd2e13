"""The slide-level metrics through Hugging Face evaluate."""

import tempfile
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics


class SlideClassification(evaluate.Metric):
    """`slide_metrics` as a metric of Hugging Face evaluate: `add_batch(predictions=, references=)`, then `compute()`.

    Predictions are probabilities [n, C], references are class indices [n]; `compute` takes `slide_ids` for messages.
    Nothing is read from a hub. What is added stays in this process's memory, and the folder that evaluate asks for is
    a temporary one of this instance: several processes can not meet. Over several ranks, gather first (Accelerate's
    `gather_for_metrics`), then add on each rank or on one.
    """

    def __init__(self) -> None:
        # evaluate would make its folder under ~/.cache, which all processes share and which may not be writable.
        # The object is kept: the folder goes when the metric goes.
        self._folder = tempfile.TemporaryDirectory(prefix="ds_wsi_metrics_")
        super().__init__(keep_in_memory=True, cache_dir=self._folder.name, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Slide-level classification: " + ", ".join(METRIC_NAMES) + ".",
            citation="",
            inputs_description="\npredictions: probabilities [n, C]; references: class indices [n].",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        slide_ids: Sequence[str] | None = None,
    ) -> dict[str, float]:
        return slide_metrics(np.asarray(references), np.asarray(predictions), slide_ids=slide_ids)
