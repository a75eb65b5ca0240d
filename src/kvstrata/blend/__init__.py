"""Reuse at any position: KV of a text that stands elsewhere in another prompt, turned and mended.

It changes answers, so nothing here is done unless a request asks for it. Needs no engine: `plans`
says which tokens to compute anew, `turning` moves keys to other positions.
"""

from kvstrata.blend.plans import BY_DEVIATION, PLANS, Rule, budget, choose, stretches
from kvstrata.blend.turning import turn

__all__ = ["BY_DEVIATION", "PLANS", "Rule", "budget", "choose", "stretches", "turn"]
