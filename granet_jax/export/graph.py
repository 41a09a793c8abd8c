"""A traced model as a flat list of steps, with calls of other functions inlined."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import jaxprs


class Known(NamedTuple):
    """A value that does not depend on the inputs."""

    value: Any  # a number or a concrete array


class Step(NamedTuple):
    """One operation. A slot is an int that stands for a value."""

    eqn: Any
    function: Callable[..., list[Any]]  # of the values of ``inputs``
    inputs: list[int | Known]
    outputs: list[int]
    read: list[int]  # which results of the operation something reads; these are the outputs

    def known(self) -> list[Any]:
        """The known values among its inputs."""
        return [x.value for x in self.inputs if isinstance(x, Known)]

    def slots(self) -> list[int]:
        """The slots among its inputs."""
        return [x for x in self.inputs if isinstance(x, int)]


class Program(NamedTuple):
    """Steps in order; the first slots, from 0 on, are the inputs."""

    num_inputs: int
    steps: list[Step]
    consts: dict[int, Any]  # arrays that the function closes over
    outputs: list[int | Known]


def flatten(closed: Any) -> Program:
    """Inlines the calls in a closed jaxpr; a loop or a conditional is one step.

    Operations on numbers alone are computed.
    """
    steps: list[Step] = []
    num_inputs = len(closed.jaxpr.invars)
    consts = dict(enumerate(closed.consts, start=num_inputs))
    num_slots = num_inputs + len(consts)

    def walk(jaxpr: Any, own: Sequence[int], given: Sequence[int | Known]) -> list[int | Known]:
        nonlocal num_slots
        values: dict[Any, int | Known] = dict(zip(jaxpr.constvars, own, strict=True))
        values |= dict(zip(jaxpr.invars, given, strict=True))

        def read(atom: Any) -> int | Known:
            return Known(atom.val) if isinstance(atom, jaxprs.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inner = jaxprs.called(eqn)
            if inner is not None:
                own = list(range(num_slots, num_slots + len(inner.consts)))
                num_slots += len(own)
                consts.update(zip(own, inner.consts, strict=True))
                outs = walk(inner.jaxpr, own, inputs)
                values |= dict(zip(eqn.outvars, outs, strict=True))
                continue
            read_later = [i for i, var in enumerate(eqn.outvars) if str(var) != "_"]
            function = jaxprs.function_of(jaxpr, eqn, read_later)
            known = [x.value for x in inputs if isinstance(x, Known)]
            if known and len(known) == len(inputs) and not any(v.aval.shape for v in eqn.outvars):
                numbers = map(Known, function(*known))
                values |= dict(zip((eqn.outvars[i] for i in read_later), numbers, strict=True))
                continue
            slots = list(range(num_slots, num_slots + len(read_later)))
            num_slots += len(slots)
            steps.append(Step(eqn, function, inputs, slots, read_later))
            values |= dict(zip((eqn.outvars[i] for i in read_later), slots, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    outputs = walk(closed.jaxpr, list(consts), list(range(num_inputs)))
    return Program(num_inputs, steps, consts, outputs)


def kinds(inputs: Any) -> Any:
    """Dtypes and shapes of a model's inputs, a tree of text."""
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{jnp.shape(x)}", tuple(inputs))


def check_inputs(inputs: Any, wanted: Any, how: str) -> None:
    """Refuses inputs of other shapes than those for which a model was traced.

    Args:
      inputs: of a call.
      wanted: the :func:`kinds` of the example.
      how: for the message: the model was ``how`` for the example.
    """
    got = kinds(inputs)
    if jax.tree.flatten(got) != jax.tree.flatten(wanted):  # trees may not compare themselves
        raise ValueError(
            f"This model was {how} for inputs {wanted}; got {got}. Let it be {how} for those."
        )
