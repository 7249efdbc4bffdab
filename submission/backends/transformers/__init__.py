"""Folders of weights by transformers."""
