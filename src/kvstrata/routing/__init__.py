"""Which engine a prompt is sent to: by what each has of it already, and by how busy each is.

Needs no node and no engine. `route` is the advice itself, a pure function; `CacheAware` remembers
what it sent where and asks it; `LeastLoad` and `RoundRobin` are what it is compared with.
"""

from kvstrata.routing.base import Choice, Policy, Prompt, Reason
from kvstrata.routing.cache_aware import CacheAware
from kvstrata.routing.dual import candidates, route
from kvstrata.routing.loads import Loads, Running
from kvstrata.routing.plain import LeastLoad, RoundRobin
from kvstrata.routing.prompts import prompt_of_request, prompt_of_tokens

POLICIES: dict[str, type[Policy]] = {
    "cache-aware": CacheAware,
    "least-load": LeastLoad,
    "round-robin": RoundRobin,
}
"""Every policy by the name that users give it."""

__all__ = [
    "POLICIES",
    "CacheAware",
    "Choice",
    "LeastLoad",
    "Loads",
    "Policy",
    "Prompt",
    "Reason",
    "RoundRobin",
    "Running",
    "candidates",
    "prompt_of_request",
    "prompt_of_tokens",
    "route",
]
