"""From a sparsely trained model to a smaller, faster one: files, sparse execution, compaction."""

from granet_jax.export.compact import Compact as Compact
from granet_jax.export.compact import Cut as Cut
from granet_jax.export.compact import channel_rules as channel_rules
from granet_jax.export.compact import compact as compact
from granet_jax.export.compact import cuts_table as cuts_table
from granet_jax.export.dense import load_dense as load_dense
from granet_jax.export.dense import masks_from as masks_from
from granet_jax.export.dense import save_dense as save_dense
from granet_jax.export.files import Saved as Saved
from granet_jax.export.files import load as load
from granet_jax.export.files import save as save
from granet_jax.export.sparse import Choice as Choice
from granet_jax.export.sparse import SparseApply as SparseApply
from granet_jax.export.sparse import choices_table as choices_table
from granet_jax.export.sparse import compile as compile
from granet_jax.export.sparse import deserialize as deserialize
from granet_jax.export.sparse import serialize as serialize
from granet_jax.export.two_of_four import TwoOfFour as TwoOfFour
from granet_jax.export.two_of_four import from_two_of_four as from_two_of_four
from granet_jax.export.two_of_four import to_two_of_four as to_two_of_four
