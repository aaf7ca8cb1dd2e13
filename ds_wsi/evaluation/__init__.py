"""Slide-level metrics, their intervals, comparisons and tables of runs, attention heat maps, curves and the report."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.evaluation.bootstrap import MetricInterval, bootstrap_metrics, format_table, metrics_to_json
    from ds_wsi.evaluation.comparison import compare_predictions
    from ds_wsi.evaluation.curves import draw_curves
    from ds_wsi.evaluation.heatmap import attention_rgba, draw_attention
    from ds_wsi.evaluation.hf_metric import SlideClassification
    from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.report import write_report
    from ds_wsi.evaluation.tables import collect_runs, write_tables
    from ds_wsi.evaluation.tasks.comparison import compare_runs

__all__ = [
    "METRIC_NAMES",
    "EvaluationProtocol",
    "MetricInterval",
    "SlideClassification",
    "attention_rgba",
    "bootstrap_metrics",
    "collect_runs",
    "compare_predictions",
    "compare_runs",
    "draw_attention",
    "draw_curves",
    "format_table",
    "metrics_to_json",
    "slide_metrics",
    "write_report",
    "write_tables",
]

# The names of the metrics, for options, need no matplotlib and no sklearn.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.evaluation.bootstrap": (
            "MetricInterval",
            "bootstrap_metrics",
            "format_table",
            "metrics_to_json",
        ),
        "ds_wsi.evaluation.comparison": ("compare_predictions",),
        "ds_wsi.evaluation.curves": ("draw_curves",),
        "ds_wsi.evaluation.heatmap": (
            "attention_rgba",
            "draw_attention",
        ),
        "ds_wsi.evaluation.hf_metric": ("SlideClassification",),
        "ds_wsi.evaluation.metrics": (
            "METRIC_NAMES",
            "slide_metrics",
        ),
        "ds_wsi.evaluation.protocol": ("EvaluationProtocol",),
        "ds_wsi.evaluation.report": ("write_report",),
        "ds_wsi.evaluation.tables": (
            "collect_runs",
            "write_tables",
        ),
        "ds_wsi.evaluation.tasks.comparison": ("compare_runs",),
    },
)
