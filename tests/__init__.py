"""Tests; `kill_loop` and `deadline_loop` are commands of their own."""
