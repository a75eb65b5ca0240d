"""How much each KV of a text counts, by how like what came before it there is to what does here.

A text that was computed behind several others has several KVs, each off by what its own prefix did
to it. Their mean is off by less, and nothing is computed for it. What came before is known by a
sketch of its last tokens: small enough for a signpost, the same for whoever makes it, and needing
no model.

Source: KVCOMM, arXiv:2510.12872, which adds the offsets that similar texts showed to the KV of a
text that was computed without any prefix. Differs: a text's own KV behind other prefixes is taken,
which is there once it was stored more than once; what it was without a prefix cancels. What came
before is compared by its tokens, where the paper compares embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstrata.blend.boundaries import mixed
from kvstrata.keys import Tokens, token_ids

SKETCH_BYTES = 64
"""Numbers of a sketch, of a byte each."""
NEAR_TOKENS = 64
"""Before a text, which say how like two prefixes are."""


def sketch(tokens: Tokens) -> bytes:
    """What came before a text, in `SKETCH_BYTES` signed bytes.

    Each of the last `NEAR_TOKENS` tokens adds 1 to some of the numbers and takes 1 from the others,
    as bits of a hash say. So sketches are as far apart as the counts of their tokens are, to within
    what 64 random projections say of that.

    Args:
        tokens: ids of all that came before, or at least of the last `NEAR_TOKENS`; perhaps none.
    Raises:
        UsageError: an id is out of range.
    """
    hashes = mixed(token_ids(tokens[-NEAR_TOKENS:]).astype(np.uint64))
    bits = (hashes[:, np.newaxis] >> np.arange(SKETCH_BYTES, dtype=np.uint64)) & np.uint64(1)
    numbers = 2 * bits.astype(np.int64).sum(axis=0) - len(hashes)
    said: bytes = numbers.astype(np.int8).tobytes()
    return said


def anchor_weights(here: bytes, anchors: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """How much each KV that a text was computed with counts; 1 in all.

    Args:
        here: `sketch` of what now lies before the text.
        anchors: of what lay before it where it was computed, at least one.
    Returns:
        (len(anchors),): softmax of the negative distances, in units of their mean.
    """
    rows = np.array([np.frombuffer(one, np.int8) for one in (here, *anchors)], np.float64)
    distances = np.linalg.norm(rows[1:] - rows[0], axis=1)
    scale = distances.mean()
    weights: npt.NDArray[np.float64] = np.exp(-distances / scale if scale > 0 else distances)
    weights /= weights.sum()
    return weights
