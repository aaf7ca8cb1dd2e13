"""Slide-level metrics, their intervals, comparisons and tables of runs, attention heat maps, curves and the report."""

from ds_wsi.evaluation.bootstrap import MetricInterval, bootstrap_metrics, format_table, metrics_to_json
from ds_wsi.evaluation.comparison import compare_predictions, compare_runs
from ds_wsi.evaluation.curves import draw_curves
from ds_wsi.evaluation.heatmap import attention_rgba, draw_attention
from ds_wsi.evaluation.metrics import METRIC_NAMES, SlideClassification, slide_metrics
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.report import write_report
from ds_wsi.evaluation.tables import collect_runs, write_tables

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
