"""What processes_test.py runs in each of several processes; without them, in its own as well."""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import granet_jax as gj
from experiments.data import images
from experiments.engine import batches, checkpoints, distributed, run
from experiments.engine import mesh as meshes
from experiments.engine.files import digest
from experiments.tasks.images import Settings
from tests.images import make_trainer, random_images

DEVICES = 2  # of each process
STEPS = 4
METHODS = {
    "granet": lambda: gj.granet(final_sparsity=0.8, end_step=2, update_every=1, total_steps=STEPS),
    "rigl": lambda: gj.rigl(
        sparsity=0.7,
        update_every=1,
        total_steps=8,
        key=jax.random.key(0),
        prunable=[("embed", True)],
    ),
}
SHAPES = {"embed": {"kernel": (6, 4)}, "hidden": {"kernel": (8, 16), "bias": (16,)}}
SPECS = {
    "embed": {"kernel": PartitionSpec()},  # each device has its own copy
    "hidden": {"kernel": PartitionSpec("data"), "bias": PartitionSpec("data")},
}


def draws(step, shardings):
    """The weights (step 0) and gradients, each process making what it holds; many ties."""

    def draw(path, shape, sharding):
        seed = [step, *jax.tree_util.keystr(path).encode()]
        values = np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32) / 8
        return jax.make_array_from_callback(shape, sharding, lambda index: values[index])

    return jax.tree_util.tree_map_with_path(
        draw, SHAPES, shardings, is_leaf=lambda x: isinstance(x, tuple)
    )


def shardings_on(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def abstract_state(tx, mesh):
    """The optimizer's state as ``ShapeDtypeStruct``s that know where they lie."""
    shardings = shardings_on(mesh)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        gj.sharding.like_params(state, params, shardings),
    )


def optimizer(name):
    return gj.sparsify(optax.sgd(0.125, momentum=0.5), METHODS[name]())


def train(name, mesh):
    """The state in the end, and the masks after each step, in full on each process."""
    shardings = shardings_on(mesh)
    tx = optimizer(name)
    out = jax.tree.map(lambda x: x.sharding, abstract_state(tx, mesh))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = draws(0, shardings)
    state = jax.jit(tx.init, out_shardings=out)(params)
    masks = []
    for t in range(1, STEPS + 1):
        params, state = step(params, state, draws(t, shardings))
        masks.append(multihost_utils.process_allgather(gj.get_masks(state), tiled=True))
        copies = [x.data for x in gj.get_masks(state)["embed"]["kernel"].addressable_shards]
        for copy in copies:
            np.testing.assert_array_equal(copy, masks[-1]["embed"]["kernel"])
    return state, masks


def without_keys(tree):
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(len(x), -1))))


def trainer_of_experiments(mesh=None):
    dataset = images.from_arrays(random_images(72), random_images(20, seed=1))
    config = Settings(
        dataset="own",
        model="own",
        method="gmp",
        sparsity=0.5,
        epochs=1,
        batch_size=16,
        update_every=1,
    )
    return make_trainer(config, dataset, Net(), mesh)


def train_as_experiments_do(folder):
    """The masks at the end of a run, and how many epochs it showed."""
    shown = []
    trainer = trainer_of_experiments()
    result = run.run(trainer, folder, checkpoint_seconds=0, show=shown.append)
    return result.masks, len(shown)


def sum_over(mesh):
    """Of a batch of which all devices hold a part, or the same on all, as the mesh says."""
    whole = np.arange(8.0)
    return float(jax.jit(jnp.sum)(batches.shared(whole, mesh, len(whole))))


def main(folder):
    distributed.start()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    for name in METHODS:
        state, masks = train(name, mesh)
        multihost_utils.assert_equal(masks, f"{name}: the processes have different masks")
        for t, after in enumerate(masks, 1):
            print(name, t, digest(after))
        with checkpoints.open_manager(folder / name) as manager:
            checkpoints.save(manager, STEPS, state, {}, None)
        gathered = multihost_utils.process_allgather(without_keys(state), tiled=True)
        print(name, "state", digest(gathered))
    masks, shown = train_as_experiments_do(folder / "run")
    for sizes in ((None, 1), (1, 4), (1, 2, 2), (1, 1, 4)):
        print("sum", "x".join(map(str, sizes)), sum_over(meshes.make(*sizes)))
    print("run masks", digest(masks))
    print("run shown", shown)


if __name__ == "__main__":
    distributed.define_flags()
    main(pathlib.Path(flags.FLAGS(sys.argv)[1]))
