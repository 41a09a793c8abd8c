"""granet_jax: sparse training for JAX as one optax transformation.

Data flow in the order of the modules: ``params, grads -> scores -> selection -> masks ->
updates``. A module imports only from modules before it::

    types          the vocabulary
    trees          paths, what is prunable, leaves as stacks of layers
    jaxprs         what is inside traces, in each version of JAX
    scores         what a weight is worth: magnitude, gradient, moments, paths, chance
    distributions  how a sparsity is spread over layers: uniform, ERK, global ranking
    schedules      cubic, sigmoid, stairs, cosine, every; counts to keep at a step
    sortable       integers of the order of floats
    blocks         stacks of layers as few arrays, so that little is compiled
    selection      exact top-k masks without sorting
    structures     N:M, blocks, channels, constant fan-in: weights that are selected in groups
    groups         the same number in each group
    scoring        scores of units, stored or computed where they are needed
    masks          prune_to, regenerate: the two mask steps
    composition    compose: a start and mask steps make a method
    methods        granet, gmp, rigl, set_, snfs, rigl_itop, set_itop, ac_dc, chts, static,
                   magnitude; at_init (SNIP, GraSP, SynFlow) and lottery, which give masks
    moments        what an optimizer's state holds for each parameter
    transform      sparsify: a method around any optax optimizer
    young          what newly grown weights need from an optimizer
    init           initial weights for sparse starts
    lora           low-rank updates that keep pruned weights at 0
    metrics, report   numbers, a table
    products, flops   which parameters a model's products contract, and their FLOPs
    sharding, checkpoint   shardings of a state, checks of a restored state
    kernels        block-sparse products for GPUs and TPUs
    export         compact files, sparse execution, channels cut out: a smaller, faster model
    compact        live weights only: training whose cost follows the number of live weights
    one_shot       trained models pruned with one call: Wanda, RIA, SparseGPT, ALPS
    reparam        dst, str_: trained thresholds; ste and others: masks from dense weights
    scaling        the loss at a sparsity, and the best sparsity for a budget
    testing        the conformance kit for methods
"""

from granet_jax import compact as compact
from granet_jax import export as export
from granet_jax import flops as flops
from granet_jax import init as init
from granet_jax import kernels as kernels
from granet_jax import lora as lora
from granet_jax import metrics as metrics
from granet_jax import one_shot as one_shot
from granet_jax import reparam as reparam
from granet_jax import report as report
from granet_jax import scaling as scaling
from granet_jax import schedules as schedules
from granet_jax import scores as scores
from granet_jax import sharding as sharding
from granet_jax import structures as structures
from granet_jax import testing as testing
from granet_jax import trees as trees
from granet_jax.checkpoint import check_restored as check_restored
from granet_jax.checkpoint import register_for_jax_export as register_for_jax_export
from granet_jax.composition import compose as compose
from granet_jax.composition import start_from as start_from
from granet_jax.distributions import by_path as by_path
from granet_jax.distributions import erk as erk
from granet_jax.distributions import global_ranking as global_ranking
from granet_jax.distributions import uniform as uniform
from granet_jax.masks import apply_masks as apply_masks
from granet_jax.masks import collapsed as collapsed
from granet_jax.masks import masks_from_zeros as masks_from_zeros
from granet_jax.masks import ones as ones
from granet_jax.masks import prune_to as prune_to
from granet_jax.masks import random_masks as random_masks
from granet_jax.masks import regenerate as regenerate
from granet_jax.masks import revive as revive
from granet_jax.methods import ac_dc as ac_dc
from granet_jax.methods import at_init as at_init
from granet_jax.methods import average_gradients as average_gradients
from granet_jax.methods import by_mean_score as by_mean_score
from granet_jax.methods import chts as chts
from granet_jax.methods import gmp as gmp
from granet_jax.methods import granet as granet
from granet_jax.methods import lottery as lottery
from granet_jax.methods import magnitude as magnitude
from granet_jax.methods import rigl as rigl
from granet_jax.methods import rigl_itop as rigl_itop
from granet_jax.methods import set_ as set_
from granet_jax.methods import set_itop as set_itop
from granet_jax.methods import snfs as snfs
from granet_jax.methods import static as static
from granet_jax.methods import track_exploration as track_exploration
from granet_jax.products import prunable_from as prunable_from
from granet_jax.schedules import cosine as cosine
from granet_jax.schedules import cubic as cubic
from granet_jax.schedules import every as every
from granet_jax.schedules import gradual_num_keep as gradual_num_keep
from granet_jax.selection import top_k as top_k
from granet_jax.selection import top_k_mask as top_k_mask
from granet_jax.transform import check_sparse as check_sparse
from granet_jax.transform import get_masks as get_masks
from granet_jax.transform import get_method_state as get_method_state
from granet_jax.transform import set_masks as set_masks
from granet_jax.transform import sparsify as sparsify
from granet_jax.trees import Stacked as Stacked
from granet_jax.types import Event as Event
from granet_jax.types import MaskState as MaskState
from granet_jax.types import Method as Method
from granet_jax.types import SparseState as SparseState
from granet_jax.young import correct_young as correct_young
from granet_jax.young import scale_by_density as scale_by_density

__version__ = "0.2.0"
