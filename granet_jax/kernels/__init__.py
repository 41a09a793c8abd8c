"""Block-sparse matrix products for training and inference on accelerators.

The files, in the order in which data flow::

    lists      which blocks are live
    backend    the kernels of one kind of device
    gpu, tpu   the products
    block      block_matmul, with its gradients
    packed     products with live blocks alone, for compact
    flax       layers of Flax
"""

from granet_jax.kernels.backend import Backend as Backend
from granet_jax.kernels.block import block_matmul as block_matmul
from granet_jax.kernels.block import of_the_device as of_the_device
from granet_jax.kernels.flax import dense_in_blocks as dense_in_blocks
from granet_jax.kernels.flax import linear_in_blocks as linear_in_blocks
from granet_jax.kernels.gpu import ampere as ampere
from granet_jax.kernels.gpu import hopper as hopper
from granet_jax.kernels.tpu import tpu as tpu
