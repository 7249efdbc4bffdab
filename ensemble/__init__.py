"""ensemble: tries to beat one answer: many candidates, judges, selectors.

python -m ensemble
"""
