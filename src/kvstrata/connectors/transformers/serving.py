"""transformers' hook for a ``generate`` of one's own: what ``custom_generate/generate.py`` imports.

``transformers serve`` takes a model's ``generate`` from that file in the model's folder.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from kvstrata.connectors.transformers.attaching import session_of
from kvstrata.connectors.transformers.wishes import ARGUMENT
from kvstrata.errors import KVStrataError

logger = logging.getLogger(__name__)

_refused: set[str] = set()


def generate(model: Any, **arguments: Any) -> Any:
    """Answer as the model's own ``generate`` does, with what was computed before.

    Options are those of the environment and of the file that ``KVSTRATA_CONFIG`` names. A model
    that is left uncached answers alone, and the log says once why.

    Args:
        model: of transformers.
        arguments: of its ``generate``, by name.
    """
    # The class's own: the model's is this function.
    plain = functools.partial(type(model).generate, model)
    try:
        attached = session_of(model)
    except KVStrataError as error:
        if str(error) not in _refused:
            _refused.add(str(error))
            logger.error("KVStrata leaves this model uncached: %s", error)
        arguments.pop(ARGUMENT, None)
        return plain(**arguments)
    return attached.generate(model, plain, lambda: dict(arguments), (), arguments)
