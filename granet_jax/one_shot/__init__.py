"""One-shot pruning of trained models: a few batches, one call, any function of any tree.

:func:`prune` does it all; :func:`calibrate` and :func:`prune_from` are its two halves. A method
prunes one layer, seen as a matrix, by a statistic of its inputs. For a method of your own, make a
:class:`OneShot`.
"""

from granet_jax.one_shot.alps import alps as alps
from granet_jax.one_shot.methods import Keep as Keep
from granet_jax.one_shot.methods import OneShot as OneShot
from granet_jax.one_shot.methods import magnitude as magnitude
from granet_jax.one_shot.methods import ria as ria
from granet_jax.one_shot.methods import wanda as wanda
from granet_jax.one_shot.norms import recalibrate as recalibrate
from granet_jax.one_shot.prune import Pruned as Pruned
from granet_jax.one_shot.prune import prune as prune
from granet_jax.one_shot.prune import prune_from as prune_from
from granet_jax.one_shot.sparsegpt import sparsegpt as sparsegpt
from granet_jax.one_shot.statistics import Statistic as Statistic
from granet_jax.one_shot.statistics import calibrate as calibrate
from granet_jax.one_shot.statistics import gram as gram
from granet_jax.one_shot.statistics import squares as squares
