"""The HTTP API of a node: a process beside it that speaks its protocol, and a client.

``docs/api.md`` is its page. `Client` is what programs and the commands use.
"""

from kvstrata.control.client import Client

__all__ = ["Client"]
