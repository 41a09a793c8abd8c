"""Sparse-training methods, one paper a file; each returns a :class:`granet_jax.types.Method`."""

from granet_jax.methods.ac_dc import ac_dc as ac_dc
from granet_jax.methods.chts import chts as chts
from granet_jax.methods.gmp import gmp as gmp
from granet_jax.methods.granet import granet as granet
from granet_jax.methods.itop import rigl_itop as rigl_itop
from granet_jax.methods.itop import set_itop as set_itop
from granet_jax.methods.itop import track_exploration as track_exploration
from granet_jax.methods.magnitude import magnitude as magnitude
from granet_jax.methods.rigl import rigl as rigl
from granet_jax.methods.set_ import set_ as set_
from granet_jax.methods.snfs import average_gradients as average_gradients
from granet_jax.methods.snfs import by_mean_score as by_mean_score
from granet_jax.methods.snfs import snfs as snfs
from granet_jax.methods.static import static as static
