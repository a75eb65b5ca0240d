"""Which plan a bound on quality allows: the cheapest one that the model's measured table keeps."""

from __future__ import annotations

from kvstrata.blend import BY_DEVIATION, Rule
from kvstrata.errors import KVStrataError
from kvstrata.quality.blending.table import BlendTable, Row, find
from kvstrata.quality.bound import Bound

# Of computing every token. A run of tokens is one sequence of a batch, and short runs are slow:
# tokens here and there were seen to cost about twice as much as whole edges. Where they are is
# found out by computing all of the first layer and half of the second.
_PER_TOKEN = {"none": 0.0, "edges": 1.0, "deviation": 2.0, "share": 2.0}
_CHECK_LAYERS = dict.fromkeys(BY_DEVIATION, 1.5)


def pick_blend(weights: str, bound: Bound) -> Rule | str:
    """The cheapest rule that keeps a bound, or in words why there is none.

    A plan keeps it by the worse end of its 95% interval. Computing all tokens is no reuse, and is
    never picked: such a request is served exactly.

    Args:
        weights: `kvstrata.identity.weights_identity` of the model, or ``hub:...``.
        bound: the request's.
    """
    try:
        table = None if ":" in weights else find(weights)
    except (OSError, KVStrataError) as error:
        return f"the table of blending cannot be read: {error}"
    if table is None:
        return "no table says what blending does to this model: kvstrata quality MODEL --blend"
    keeping = [row for row in table.rows if row.plan in _PER_TOKEN and bound.meets(row)]
    keeping = [row for row in keeping if row.computed < 1]
    if not keeping:
        return f"no plan that was measured on {table.model} keeps {bound}"
    best = min(keeping, key=lambda row: (cost(row, table), row.plan))
    return best.rule


def cost(row: Row, table: BlendTable) -> float:
    """What a plan takes, as a share of computing every token."""
    checking = _CHECK_LAYERS.get(row.plan, 0.0) / table.layers
    return row.computed * _PER_TOKEN[row.plan] + checking
