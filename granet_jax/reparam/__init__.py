"""r."""
from granet_jax.reparam.base import Reparameterisation as Reparameterisation
from granet_jax.reparam.base import export as export
from granet_jax.reparam.dst import dst as dst
from granet_jax.reparam.penalise import penalise as penalise
from granet_jax.reparam.str_ import str_ as str_
