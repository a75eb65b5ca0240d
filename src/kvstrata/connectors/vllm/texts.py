"""Which texts a request names of its prompt, if it may: by their tokens, a separator, or "auto"."""

from __future__ import annotations

from typing import Any

from kvstrata.blend import boundaries
from kvstrata.blend.segments import MIN_TOKENS, Asked, named, separated
from kvstrata.connectors.vllm.named import Named
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.errors import UsageError
from kvstrata.quality.bound import Bound


class Texts:
    """Lives on the scheduler's one thread.

    Args:
        model_config: the engine's, which knows the tokenizer.
    """

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._tokenizer: Any = None

    def of(self, state: RequestState, asked: Asked) -> Named:
        """What a request names.

        Args:
            state: of a new request.
            asked: its hint.
        Raises:
            UsageError: it may not, or names what is not there.
            ValueError: its bound is none.
        """
        if why := _refused(state):
            raise UsageError(why)
        if asked.quality is not None:
            Bound.parse(asked.quality)
        tokens = state.request.prompt_token_ids
        if asked.segments == "auto":
            texts = boundaries.pieces(tokens)
        elif asked.segments is not None:
            texts = named(asked.segments, len(tokens))
        else:
            assert asked.separator is not None
            texts = separated(tokens, self.separator(asked.separator))
        return Named(asked, [text for text in texts if len(text) >= MIN_TOKENS])

    def separator(self, text: str) -> list[int]:
        """The tokens of a separator.

        Raises:
            UsageError: this engine has no tokenizer.
        """
        if self._tokenizer is None:
            if self._model_config.skip_tokenizer_init:
                raise UsageError("this engine has no tokenizer: name segments by their tokens")
            from vllm.tokenizers import cached_tokenizer_from_config

            try:
                self._tokenizer = cached_tokenizer_from_config(self._model_config)
            except Exception as error:  # of whatever library the tokenizer is
                raise UsageError(f"the tokenizer cannot be loaded: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _refused(state: RequestState) -> str:
    """Why a request cannot be blended, nor its texts be found by others; "" if it can."""
    request, sampling = state.request, state.request.sampling_params
    reasons = {
        state.bypass: bool(state.bypass),
        "requests with media are not blended": bool(request.mm_features),
        "requests with an adapter are not blended": request.lora_request is not None,
        "its prompt's log-probabilities are asked for": sampling is not None
        and sampling.prompt_logprobs is not None,
        "prefill and decode apart are not blended": bool(state.roles.peer or state.roles.lends),
        "sessions are not blended": request.resumable,
    }
    return next((why for why, is_so in reasons.items() if is_so), "")
