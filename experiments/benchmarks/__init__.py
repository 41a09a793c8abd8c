"""Benchmarks: ``python -m experiments.benchmarks`` writes docs/benchmarks.md.

A module for each, whose ``tables(quick)`` measures and returns tables; ``quick`` takes sizes so
small that the figures say nothing, to try that everything runs.
"""
