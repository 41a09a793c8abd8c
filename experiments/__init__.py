"""Experiments with granet_jax: run ``python -m experiments.train --help``.

Programs stand at the top: train, compare, lm, lottery, plasticity, collapse, flops, report. They
import from these, and these from those before them::

    data, models    what there is to train on, and networks
    engine          trains any task by any method on any mesh of devices
    tasks           what can be trained: a file each, or a file of yours
    studies         what lottery and plasticity compute
    benchmarks      what sparsity costs: python -m experiments.benchmarks

CONTRIBUTING.md has every room, with a line each.
"""

import logging

from absl import logging as absl_logging

# JAX tells of each backend that it looks for and does not find; Orbax of each file.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
absl_logging.set_verbosity(absl_logging.ERROR)
