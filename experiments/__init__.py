"""Experiments with granet_jax: run ``python -m experiments.train --help``.

In the order in which data flow::

    streams, data, augment   encoded images or arrays in memory; crops on the device
    models, methods          what a flag names
    settings                 one dataclass, and the flags made from it
    optimizers, training     the compiled step on all devices
    distributed              several processes
    files, checkpoints       what a run leaves
    report, run              its page; a run that goes on where it was stopped
    train, compare           programs, with output for the terminal
    lottery, plasticity      studies over many runs
    collapse, flops          studies without training
    text, lm_training, lm_run, lm_plan, lm    a language model on a mesh of devices
    benchmarks               what sparsity costs: python -m experiments.benchmarks
"""

import logging

from absl import logging as absl_logging

# JAX tells of each backend that it looks for and does not find; Orbax of each file.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
absl_logging.set_verbosity(absl_logging.ERROR)
