"""Shardings for trees that mirror the parameters, above all the optimizer state."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from granet_jax import trees
from granet_jax.types import PyTree


def like_params(state: PyTree, params: PyTree, specs: PyTree) -> PyTree:
    """Gives each leaf of a state the spec of the parameter that it mirrors.

    A leaf mirrors a parameter if its path ends in the parameter's path and it has the parameter's
    shape: masks, moments, copies. The other leaves (counters, keys, factored moments) are
    replicated. It works through any wrapping: chains, ``MultiSteps``, ``inject_hyperparams``, a
    whole training state.

    Without this, a compiled ``init`` on an Auto mesh puts full copies of the moments on every
    device. Pass the result as ``out_shardings`` of ``init``, and as ``in_shardings`` and
    ``out_shardings`` of a step.

    Args:
      state: the state of an optimizer, or any tree: arrays or ``ShapeDtypeStruct``, as from
        ``jax.eval_shape(tx.init, params)``.
      params: arrays or ``ShapeDtypeStruct``.
      specs: a ``PartitionSpec`` for each parameter (for use under ``jax.set_mesh``), or a
        ``NamedSharding`` for each; they are matched with the parameters by path.

    Returns:
      A tree of the structure of ``state``, with leaves of the kind of ``specs``.

    Raises:
      ValueError: a parameter has no spec, a spec no parameter, or a spec is something else.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
      >>> params = {"kernel": jnp.ones((64, 4)), "bias": jnp.ones(4)}
      >>> specs = {"kernel": NamedSharding(mesh, P("data")), "bias": NamedSharding(mesh, P())}
      >>> params = jax.device_put(params, specs)
      >>> tx = gj.sparsify(optax.adam(1e-3), gj.static(sparsity=0.9, key=jax.random.key(0)))
      >>> state_specs = gj.sharding.like_params(jax.eval_shape(tx.init, params), params, specs)
      >>> state = jax.jit(tx.init, out_shardings=state_specs)(params)
      >>> tuple(gj.get_masks(state)["kernel"].sharding.spec), state.mask_step.sharding.spec[:]
      (('data',), ())
    """
    found = trees.by_path(specs)
    named = [spec for spec in found.values() if isinstance(spec, NamedSharding)]
    _check(found, trees.by_path(params), NamedSharding if named else PartitionSpec)
    spec_of_rest: Any = PartitionSpec()
    if named:
        spec_of_rest = NamedSharding(named[0].mesh, spec_of_rest)

    def spec(leaf: Any, owner: trees.Owner | None) -> Any:
        return found[owner.names] if owner is not None and owner.same_shape else spec_of_rest

    return trees.map_with_owner(spec, state, params)


def _check(specs: dict[Any, Any], params: dict[Any, Any], kind: type) -> None:
    if specs.keys() != params.keys():
        odd = sorted("/".join(path) for path in specs.keys() ^ params.keys())
        raise ValueError(
            f"The specs are of another tree: {len(specs)} leaves, but params have {len(params)}; "
            f"only one of the two has {', '.join(odd)}. Give each parameter a spec; "
            "PartitionSpec() replicates."
        )
    for path, spec in specs.items():
        if not isinstance(spec, kind):
            raise ValueError(
                f"The spec of {'/'.join(path)} is {spec!r}; expected a PartitionSpec for "
                "each parameter, or a NamedSharding for each."
            )
