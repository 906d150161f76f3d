"""The table of dispatchers: `(expert params, x_TD, routing, cfg) -> (y_TD, number of dropped routes)`.

Every one gives the same values, gradients and load as `dense` when nothing is dropped.
"""

from moejax.moe.dispatch.capacity import capacity
from moejax.moe.dispatch.dense import dense
from moejax.moe.dispatch.dropless import dropless

DISPATCHERS = {"dense": dense, "capacity": capacity, "dropless": dropless}
