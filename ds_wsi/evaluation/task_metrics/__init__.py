"""Metrics of every kind of task: survival, regression, ordinal and multi-label, with reasons where undefined.

Each kind has a function of the slides, X_metrics, and one of how often each slide counts, weighted_X_metrics, which
`evaluation.bootstrap.bootstrap_measures` turns into intervals. `table.METRICS` names them all.
"""
