"""Language models: short for ``experiments.compare --task=text --seeds=1``.

Example:
  python -m experiments.lm --size=1m --bytes=500_000 --methods=granet
  python -m experiments.lm --size=10m --methods=dense,gmp,granet,rigl,static --sparsity=0.8
  python -m experiments.lm --text_dir=FOLDER --size=100m --precision=bf16 --fsdp=4 --tensor=2
  python -m experiments.lm --plan --size=1b --devices=64 --fsdp=64 --batch_size=64
"""

import sys

from absl import app, flags

from experiments import compare
from experiments.compare import main


def define_flags(argv: list[str]) -> None:
    """As those of experiments.compare, for text."""
    compare.define_flags(argv, task="text", seeds=1)
    flags.adopt_module_key_flags(compare)  # --help shows them


if __name__ == "__main__":
    define_flags(sys.argv)
    app.run(main)
