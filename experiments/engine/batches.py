"""Where batches come from, and how steps go through them: many at once, or one by one."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.engine import mesh as meshes
from experiments.engine import weights
from experiments.engine.task import Drawn, Memory, Source, Streamed, Task


def size(source: Memory | Streamed) -> int:
    """The number of examples."""
    if isinstance(source, Streamed):
        return source.size
    return len(jax.tree.leaves(source.arrays)[0])


def epoch_steps(source: Source, batch_size: int) -> int:
    """Steps after which one evaluates: whole batches of a pass.

    Raises:
      ValueError: there is not one.
    """
    if isinstance(source, Drawn):
        return source.epoch_steps
    if size(source) < batch_size:
        raise ValueError(f"--batch_size={batch_size} is more than the {size(source)} examples.")
    return size(source) // batch_size


def abstract(source: Source, num: int) -> Any:
    """The shapes of a batch of ``num`` examples; None of what is streamed."""
    if isinstance(source, Streamed):
        return None
    arrays = jax.eval_shape(lambda: source.arrays)
    if isinstance(source, Drawn):
        arrays = jax.eval_shape(source.draw, jax.random.key(0), arrays)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype), arrays)


def in_order(source: Memory | Streamed, batch_size: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Goes once through a split in equal batches.

    Yields:
      A batch, and bool ``(batch size,)``: False marks padding. Of what is streamed this process's
      share of both.
    """
    if isinstance(source, Streamed):
        yield from source.in_order(batch_size)
        return
    for start in range(0, size(source), batch_size):
        chosen = start + np.arange(batch_size)
        valid = chosen < size(source)
        indices = np.where(valid, chosen, 0)
        yield jax.tree.map(lambda x, i=indices: np.asarray(x)[i], source.arrays), valid


def check_sample(source: Source, num: int) -> None:
    """Raises a ValueError where :func:`sample` cannot draw: examples are streamed, or fewer."""
    if isinstance(source, Streamed) or (isinstance(source, Memory) and num > size(source)):
        raise ValueError(
            f"{num} examples are to be drawn at once: from data in memory, with as many to train "
            "on at least."
        )


def sample(source: Memory | Drawn, num: int, seed: int, batch_size: int) -> list[Any]:
    """Draws examples to train on at random, all different where they lie in memory.

    Returns:
      One batch of ``num``; of what is drawn, as many of the batch's size as hold as many.
    """
    if isinstance(source, Drawn):
        keys = jax.random.split(jax.random.key(seed), -(-num // batch_size))
        return [source.draw(key, source.arrays) for key in keys]
    chosen = np.random.default_rng(seed).permutation(size(source))[:num]
    return [jax.tree.map(lambda x: np.asarray(x)[chosen], source.arrays)]


def first(source: Source, num: int, batch_size: int) -> list[Any]:
    """Some batches of the training data, the same ones each time; fewer where there are fewer.

    Raises:
      ValueError: they are streamed, or there is not one whole batch.
    """
    if isinstance(source, Streamed):
        raise ValueError("training data in memory are needed; these are streamed.")
    if isinstance(source, Drawn):
        return sample(source, num * batch_size, 0, batch_size)
    num = min(num, epoch_steps(source, batch_size))  # the last one may hold padding
    return [batch for batch, _ in itertools.islice(in_order(source, batch_size), num)]


def placed(task: Task, mesh: Mesh) -> Task:
    """Puts training data that fit into memory on every device, once for several trainers."""
    if isinstance(task.train, Streamed):
        return task
    arrays = jax.device_put(task.train.arrays, meshes.everywhere(mesh))
    return task._replace(train=task.train._replace(arrays=arrays))


def shared(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """A batch over all devices, from what each process has: the whole, or its share."""
    make = functools.partial(jax.make_array_from_process_local_data, meshes.of_batch(mesh))
    return jax.tree.map(lambda x: make(x, (batch_size, *x.shape[1:])), batch)


class Runner(NamedTuple):
    """Compiled steps."""

    run: Callable[[Any, Any, int], tuple[Any, jax.Array]]  # (state, stream, steps) -> .., losses
    lower: Callable[[Any], Any]  # abstract state -> the program that runs most, not yet compiled


class Steps(NamedTuple):
    """What a runner is made of."""

    step: Callable[..., tuple[Any, jax.Array]]  # (state, batch, event) -> state, loss
    family: weights.Family
    mesh: Mesh
    shardings: Any  # of states

    def compiled(self, f: Callable[..., Any], **kwargs: Any) -> Any:
        """``f(state, ...) -> state, losses``, which takes the state's buffers."""
        out = (self.shardings, meshes.everywhere(self.mesh))
        return jax.jit(f, donate_argnums=0, out_shardings=out, **kwargs)

    def events(self, state: Any, num_steps: int) -> Sequence[bool | None]:
        """What each step is told: whether it is an event, where programs differ by it."""
        if not self.family.two_programs:
            return [None] * num_steps
        return weights.events(self.family, int(state.step), num_steps)

    @property
    def most(self) -> bool | None:
        """What most steps are told."""
        return False if self.family.two_programs else None


def runner(steps: Steps, source: Source, batch_size: int, scan: bool) -> Runner:
    """Steps through a source.

    Args:
      steps: what to run.
      source: where batches come from.
      batch_size: examples in a step.
      scan: whether many steps may be one program, see :func:`scan_is_fast`.
    """
    if isinstance(source, Streamed):
        return _streamed(steps, batch_size)
    return _on_device(steps, source, batch_size, scan and not steps.family.two_programs)


def _on_device(steps: Steps, source: Memory | Drawn, batch_size: int, scan: bool) -> Runner:
    """Steps over data that lie on the devices."""
    num_steps_of_epoch = epoch_steps(source, batch_size)

    @jax.jit
    def order_of_epoch(state: Any) -> jax.Array | None:
        if isinstance(source, Drawn):
            return None
        epoch = state.step // num_steps_of_epoch
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), epoch)
        order = jax.random.permutation(key, size(source))
        return order[: num_steps_of_epoch * batch_size].reshape(num_steps_of_epoch, -1)

    def batch_of(state: Any, arrays: Any, order: jax.Array | None) -> Any:
        sharding = meshes.of_batch(steps.mesh)
        if isinstance(source, Drawn):
            batch = source.draw(jax.random.fold_in(state.key, state.step), arrays)
            return jax.lax.with_sharding_constraint(batch, sharding)
        assert order is not None
        indices = order[state.step % num_steps_of_epoch]
        indices = jax.lax.with_sharding_constraint(indices, sharding)
        return jax.tree.map(lambda x: x[indices], arrays)

    def one(state: Any, arrays: Any, order: Any, event: bool | None = None) -> Any:
        return steps.step(state, batch_of(state, arrays, order), event)

    def scanned(state: Any, arrays: Any, order: Any, num_steps: int) -> Any:
        return jax.lax.scan(lambda s, _: one(s, arrays, order), state, length=num_steps)

    compiled = steps.compiled(scanned if scan else one, static_argnums=3)
    arrays_on_devices = functools.cache(
        lambda: jax.device_put(source.arrays, meshes.everywhere(steps.mesh))
    )

    def run(state: Any, _: Any, num_steps: int) -> Any:
        arrays, order = arrays_on_devices(), order_of_epoch(state)
        if scan:
            return compiled(state, arrays, order, num_steps)
        events = steps.events(state, num_steps)
        return _loop(lambda s, event: compiled(s, arrays, order, event), state, events)

    def lower(state: Any) -> Any:
        everywhere = meshes.everywhere(steps.mesh)
        arrays, order = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            jax.eval_shape(lambda state: (source.arrays, order_of_epoch(state)), state),
        )
        return compiled.lower(state, arrays, order, num_steps_of_epoch if scan else steps.most)

    return Runner(run, lower)


def _streamed(steps: Steps, batch_size: int) -> Runner:
    """Steps over batches that come from the host."""
    compiled = steps.compiled(steps.step, static_argnums=2)

    def one(state: Any, given: tuple[Any, bool | None]) -> tuple[Any, jax.Array]:
        batch, event = given
        return compiled(state, shared(batch, steps.mesh, batch_size), event)

    def run(state: Any, stream: Any, num_steps: int) -> tuple[Any, jax.Array]:
        batches = itertools.islice(stream, num_steps)
        return _loop(one, state, zip(batches, steps.events(state, num_steps), strict=True))

    def lower(state: Any) -> Any:
        raise ValueError("--plan needs data in memory; these are streamed.")

    return Runner(run, lower)


def _loop(one: Callable[..., Any], state: Any, inputs: Iterable[Any]) -> tuple[Any, jax.Array]:
    """A compiled call for each step."""
    losses = []
    for x in inputs:
        state, loss = one(state, x)
        if jax.default_backend() == "cpu":  # steps in flight on several devices starve each other
            jax.block_until_ready((state, loss))
        losses.append(loss)
    return state, jnp.stack(losses)


def scan_is_fast(loss_fn: Callable[..., Any], *args: Any) -> bool:
    """Whether many steps should run as one ``lax.scan``.

    Yes on accelerators, and on CPU for models of matrix products; XLA:CPU compiles the gradients
    of convolutions inside loops to naive code, dozens of times slower than outside.
    """
    on_cpu = jax.default_backend() == "cpu"
    return not on_cpu or "conv_general_dilated" not in str(jax.make_jaxpr(loss_fn)(*args))
