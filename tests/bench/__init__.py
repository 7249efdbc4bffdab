"""Slow proofs and benchmarks: commands, not tests."""
