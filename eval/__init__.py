"""eval: measures predictions: the metric, baselines, comparisons, reports.

python -m eval
"""
