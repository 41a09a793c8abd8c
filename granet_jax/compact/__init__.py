"""Live weights only: sparse training whose cost follows the number of live weights.

The files, in the order in which data flow::

    layouts       slots, and where each belongs
    native        the kernels in C++ as JAX functions
    packing       dense trees to slots and back
    convolutions  of images with dense kernels, and their gradients
    products      x @ w, y @ w.T and the gradient of the slots
    views         stand-ins for dense arrays in a trace
    trace         sparse(fn): the products of any function over live weights
    gradients     of all weights, computed with live ones
    elementwise   checks that an optimizer treats slots as it treats dense params
    transform     sparsify: any elementwise optimizer, training live weights by any method
    repack        shrink: fewer slots for methods that prune; relist: states for other machines
"""

from granet_jax.compact.convolutions import conv_general_dilated as conv_general_dilated
from granet_jax.compact.gradients import value_and_dense_grad as value_and_dense_grad
from granet_jax.compact.layouts import Layout as Layout
from granet_jax.compact.layouts import Lists as Lists
from granet_jax.compact.packing import abstract_params as abstract_params
from granet_jax.compact.packing import capacities as capacities
from granet_jax.compact.packing import masks as masks
from granet_jax.compact.packing import pack as pack
from granet_jax.compact.packing import to_slots as to_slots
from granet_jax.compact.packing import unpack as unpack
from granet_jax.compact.repack import num_live as num_live
from granet_jax.compact.repack import relist as relist
from granet_jax.compact.repack import shrink as shrink
from granet_jax.compact.trace import num_inputs as num_inputs
from granet_jax.compact.trace import sparse as sparse
from granet_jax.compact.trace import table as table
from granet_jax.compact.transform import CompactState as CompactState
from granet_jax.compact.transform import check as check
from granet_jax.compact.transform import get_layouts as get_layouts
from granet_jax.compact.transform import get_state as get_state
from granet_jax.compact.transform import sparsify as sparsify
