"""Experiments with granet_jax: run ``python -m experiments.train --help``."""

import logging

from absl import logging as absl_logging

# JAX tells of each backend that it looks for and does not find; Orbax of each file.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
absl_logging.set_verbosity(absl_logging.ERROR)
