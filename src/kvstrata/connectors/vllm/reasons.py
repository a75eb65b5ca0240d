"""Why tokens of a prompt were computed, each once: what the node said, and what was done here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.observe.reasons import Reason, Unloaded, Why


@dataclass
class Account:
    """How a request stood when vLLM first gave it blocks.

    Args:
        own: leading tokens that vLLM had itself.
        granted: leading tokens that it had or was about to have loaded.
        found: leading chunks that the node had.
        why: of those behind them.
        trouble: why no answer of the node counted; None where one did.
        detail: of the trouble.
        cap: what kept the node from being asked for more.
        always: tokens at the prompt's end that no load may reach.
    """

    own: int
    granted: int
    found: int
    why: Sequence[Reason]
    trouble: Why | None = None
    detail: str = ""
    cap: str = "message"
    always: int = 0
    came: int | None = None
    """Leading tokens there were when the load ended early; None: it did not."""
    key: str = ""
    """Of the chunk that did not come, in hex."""
    tier: str = ""
    """That it was to come from."""

    def end_at(self, came: int, key: str, tier: str) -> None:
        """The load ended early: so many leading tokens there are, and this chunk did not come."""
        self.came, self.key, self.tier = max(self.own, min(came, self.granted)), key, tier

    def unloaded(self, prompt_tokens: int, chunk_tokens: int) -> list[Unloaded]:
        """Why each token of the prompt was computed that was; in their order, at least one each."""
        reasons: list[Unloaded] = []
        at = self.granted if self.came is None else self.came

        def until(end: int, why: Why, reason: Reason | None = None, key: str = "") -> None:
            nonlocal at
            if (tokens := min(end, prompt_tokens) - at) > 0:
                tier, detail, ago_s = (
                    (reason.tier, reason.detail, reason.ago_s) if reason else ("", "", 0.0)
                )
                reasons.append(Unloaded(why, tokens, tier, detail, ago_s, key))
                at += tokens

        whole = (prompt_tokens - self.always) // chunk_tokens * chunk_tokens
        if self.came is not None:
            until(self.granted, Why.FAILED, Reason(Why.FAILED, 1, self.tier), self.key)
        if self.trouble is not None:
            until(whole, self.trouble, Reason(self.trouble, 1, detail=self.detail))
        else:
            chunk = self.found
            if at == prompt_tokens - 1 and chunk * chunk_tokens >= prompt_tokens:
                until(prompt_tokens, Why.LAST)
            until(chunk * chunk_tokens, Why.ENGINE)
            for reason in self.why:
                chunk += reason.chunks
                until(chunk * chunk_tokens, reason.why, reason)
            until(whole, Why.CAPPED, Reason(Why.CAPPED, 1, detail=self.cap))
        until(prompt_tokens, Why.PARTIAL)
        return reasons
