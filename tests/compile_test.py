"""What a mask update compiles to grows little with the number of leaves."""

import jax
import jax.numpy as jnp
import pytest

import granet_jax as gj


def sizes(num_leaves):
    """Equations of an update, those within others included, and how often scores become keys."""
    params = jax.eval_shape(lambda: {f"{i:02}": jnp.zeros((6, 2 + i)) for i in range(num_leaves)})
    method = gj.granet(
        initial_sparsity=0.5,
        final_sparsity=0.8,
        end_step=80,
        update_every=10,
        total_steps=100,
        key=jax.random.key(0),
    )
    state = jax.eval_shape(method.init, params)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    text = str(jax.make_jaxpr(method.update)(state, gj.Event(params, params, step=step)))
    return text.count(" = "), text.count("bitcast_convert_type")


@pytest.fixture
def _one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("_one_device")
def test_more_leaves_have_the_same_selections():
    few, keys_of_few = sizes(10)
    many, keys_of_many = sizes(40)
    assert keys_of_many == keys_of_few  # scores are mapped to keys in one body
    assert many - few < 30 * 45  # a leaf is laid out, ranked with the others and cut out again
