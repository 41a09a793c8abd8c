"""The mesh of devices, and how parameters and what belongs to them lie on it."""

import math
import re
from typing import Any

import jax
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import granet_jax as gj
from experiments.engine.task import Specs

BATCH = ("data", "fsdp")  # the axes that share a batch
_AXES = ("data", "fsdp", "tensor")

flags.disclaim_key_flags()  # as in settings


def define_flags() -> None:
    """Defines the axes of the mesh, and virtual devices."""
    flags.DEFINE_integer("data", None, "mesh axis of copies (default: all devices)", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "mesh axis that shares parameters and batch", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "mesh axis that shares each example's work", lower_bound=1)
    flags.DEFINE_integer("devices", None, "run on so many virtual CPU devices", lower_bound=1)


def use_devices() -> None:
    """Makes the virtual devices that the flags ask for; to be called before JAX has devices."""
    if flags.FLAGS.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", flags.FLAGS.devices)


def from_flags() -> Mesh:
    """The mesh that the flags ask for.

    Raises:
      ValueError: as :func:`make`.
    """
    return make(flags.FLAGS.data, flags.FLAGS.fsdp, flags.FLAGS.tensor)


def make(data: int | None = None, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
      data: size of the axis along which parameters are copied; None = what the others leave.
      fsdp: size of the axis that shares parameters and the batch.
      tensor: size of the axis that shares the work on each example.

    Raises:
      ValueError: the product is not the number of devices.
    """
    count = jax.device_count()
    data = data or max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
        raise ValueError(
            f"--data={data} --fsdp={fsdp} --tensor={tensor} make {data * fsdp * tensor} devices, "
            f"but there are {count}. The product must be their number."
        )
    return jax.make_mesh((data, fsdp, tensor), _AXES, axis_types=(AxisType.Auto,) * 3)


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh) -> NamedSharding:
    """Examples shared by the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises a ValueError where a batch cannot be shared."""
    shares = math.prod(mesh.shape[name] for name in BATCH)
    if batch_size % shares:
        raise ValueError(
            f"--batch_size={batch_size} is no multiple of the {shares} devices (data x fsdp) that "
            "share a batch."
        )


def of_state(mesh: Mesh, specs: Specs, state: Any, params: Any) -> Any:
    """Where a training state lies: what is shaped like a parameter with it, the rest everywhere.

    Args:
      mesh: the devices.
      specs: see :class:`experiments.engine.task.Task`.
      state: abstract, with fields ``params`` and ``opt_state``.
      params: the abstract dense parameters.

    Returns:
      Shardings, a tree of ``state``.

    Raises:
      ValueError: the specs cannot be had on this mesh.
    """
    over_tensor = any("tensor" in axes for _, spec in specs for axes in spec if axes)
    if mesh.shape["tensor"] > 1 and not over_tensor:
        raise ValueError("--tensor: no parameter of this task is laid over it. Use --fsdp.")
    by_path = {path: _of_leaf(mesh, specs, path, x) for path, x in gj.trees.paths(params).items()}
    of_params = jax.tree.unflatten(jax.tree.structure(params), list(by_path.values()))
    if not isinstance(state.opt_state, gj.compact.CompactState):
        return gj.sharding.like_params(state, params, of_params)
    of_slots = _of_slots(mesh, state, by_path)
    return gj.sharding.like_params(state, state.params, of_slots)


def _of_leaf(mesh: Mesh, specs: Specs, path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Where a parameter lies."""
    if not specs:
        return _largest_axis(mesh, leaf)
    spec = next((s for pattern, s in specs if re.search(pattern, path)), PartitionSpec())
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if leaf.shape[axis] % parts:
            raise ValueError(
                f"{path} of shape {leaf.shape} cannot be cut into {parts} along axis {axis} "
                f"({' x '.join(names)}). Choose another mesh."
            )
    return NamedSharding(mesh, spec)


def _largest_axis(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    parts = mesh.shape["fsdp"]
    fitting = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0 < size]
    if parts == 1 or not fitting:
        return everywhere(mesh)
    best = max(fitting, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * best, "fsdp"))


def _of_slots(mesh: Mesh, state: Any, dense: dict[str, NamedSharding]) -> Any:
    """Where slots lie: shared like their leaf where the mesh divides the layers, else copied.

    Indices within a layer are numbers of the whole, so slots of one layer stay together.
    """
    layouts = gj.compact.get_layouts(state.opt_state)
    names = ("fsdp", "tensor")
    parts = math.prod(mesh.shape[name] for name in names)

    def sharding(path: str, leaf: Any) -> NamedSharding:
        if path not in layouts:
            return dense[path]
        shared = leaf.shape[0] % parts == 0
        return NamedSharding(mesh, PartitionSpec(names) if shared else PartitionSpec())

    held = gj.trees.paths(state.params)
    each = [sharding(path, leaf) for path, leaf in held.items()]
    return jax.tree.unflatten(jax.tree.structure(state.params), each)
