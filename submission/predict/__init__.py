"""The batch predictor: one run from a table of pairs to submission.csv."""
