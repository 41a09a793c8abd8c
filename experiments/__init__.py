"""Experiments with granet_jax: run ``python -m experiments.train --help``."""
