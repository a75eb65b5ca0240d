"""KVStrata under Hugging Face transformers: ``attach(model)``, and generate as ever."""

from kvstrata.connectors.transformers.attaching import attach, detach
from kvstrata.connectors.transformers.session import Attached, Outcome

__all__ = ["Attached", "Outcome", "attach", "detach"]
