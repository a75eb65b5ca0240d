"""A second model over the same weights: other attention, and nothing of the first one is touched.

Which attention a model has stands in its configuration, which all its modules share. So modules
and configuration are copied, and the tensors are not: a twin costs some Python objects.
"""

from __future__ import annotations

import copy
from typing import Any

from kvstrata.errors import Incompatible


def twin_of(model: Any, attention: str = "") -> Any:
    """A model that computes with the tensors of another one.

    Args:
        model: of transformers.
        attention: the name of its own, registered; empty: as the model's.
    Raises:
        Incompatible: it cannot have another attention, or cannot be copied.
    """
    shared = (*model.parameters(), *model.buffers())
    try:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:
        raise Incompatible(f"it cannot be copied without its weights: {error}") from error
    vars(twin).pop("generate", None)  # the hook of an attached model
    if attention:
        if not twin._can_set_attn_implementation():
            raise Incompatible("its attention is its own, and cannot be another one")
        twin.set_attn_implementation(attention)
        if twin.config.get_text_config(decoder=True)._attn_implementation != attention:
            raise Incompatible("its attention is its own, and cannot be another one")
    return twin.eval()
