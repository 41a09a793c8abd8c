"""Reparameterisations: sparsity that follows from the weights in every step.

A method is a :class:`Reparameterisation`, a tuple of pure functions. The network uses
``method.effective(params, extra)``; an optimizer wrapped by :func:`penalise` trains the pair::

    method = granet_jax.reparam.dst()
    pair = (params, method.init(params))
    tx = granet_jax.reparam.penalise(optax.sgd(0.01, momentum=0.9), method, coefficient=5e-4)
    ...
    grads = jax.grad(lambda pair: loss(method.effective(*pair), batch))(pair)
    updates, opt_state = tx.update(grads, opt_state, pair)
    pair = optax.apply_updates(pair, updates)
    ...
    params, masks = granet_jax.reparam.export(method, *pair)

To reach a given sparsity, use ``steer(0.95, end_step=10_000)`` in place of the coefficient.
"""

from granet_jax.reparam.base import Reparameterisation as Reparameterisation
from granet_jax.reparam.base import export as export
from granet_jax.reparam.dst import dst as dst
from granet_jax.reparam.penalise import MISSED as MISSED
from granet_jax.reparam.penalise import Controller as Controller
from granet_jax.reparam.penalise import PenaltyState as PenaltyState
from granet_jax.reparam.penalise import at_bound as at_bound
from granet_jax.reparam.penalise import penalise as penalise
from granet_jax.reparam.penalise import shortfall as shortfall
from granet_jax.reparam.penalise import steer as steer
from granet_jax.reparam.ste import mask_decay as mask_decay
from granet_jax.reparam.ste import sr_ste as sr_ste
from granet_jax.reparam.ste import ste as ste
from granet_jax.reparam.ste import structure_decay as structure_decay
from granet_jax.reparam.str_ import str_ as str_
