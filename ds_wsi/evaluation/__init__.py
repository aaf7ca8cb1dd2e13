"""Slide-level metrics, their bootstrap intervals, attention heat maps, curves and the report."""

from ds_wsi.evaluation.bootstrap import MetricInterval, bootstrap_metrics, format_table, metrics_to_json
from ds_wsi.evaluation.curves import draw_curves
from ds_wsi.evaluation.heatmap import attention_rgba, draw_attention
from ds_wsi.evaluation.metrics import METRIC_NAMES, SlideClassification, slide_metrics
from ds_wsi.evaluation.report import write_report

__all__ = [
    "METRIC_NAMES",
    "MetricInterval",
    "SlideClassification",
    "attention_rgba",
    "bootstrap_metrics",
    "draw_attention",
    "draw_curves",
    "format_table",
    "metrics_to_json",
    "slide_metrics",
    "write_report",
]
