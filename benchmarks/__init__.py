"""Benchmarks of vilt_fast: run from a clone."""
