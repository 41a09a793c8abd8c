"""Experiments with granet_jax: run ``python -m experiments.train --help``."""

import logging

# JAX tells of each backend that it looks for and does not find.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
