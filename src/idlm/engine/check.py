"""Whether a request can be run at all."""

from __future__ import annotations

from collections.abc import Sequence

from idlm.decoding.params import SamplingParams
from idlm.errors import InvalidRequestError


def check_request(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    vocab_size: int,
    context: int,
    room: int,
) -> None:
    """Check a request against the model and the memory.

    Args:
        context: tokens that the model can attend to.
        room: tokens of prompt and answer that fit into the KV cache.
    Raises:
        InvalidRequestError: it cannot be run.
    """
    if not prompt_token_ids:
        raise InvalidRequestError("The prompt is empty; give at least one token.")
    for token in prompt_token_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"Token id {token!r} is not in the vocabulary (0 to {vocab_size - 1})."
            )
    for token in [*(params.logit_bias or {}), *(params.stop_token_ids or ())]:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"Token id {token} in logit_bias or stop_token_ids is not in the vocabulary "
                f"(0 to {vocab_size - 1})."
            )
    prompt = len(prompt_token_ids)
    if prompt >= context:
        raise InvalidRequestError(
            f"The prompt has {prompt} tokens; the context holds {context}, and the answer needs "
            "at least one. Shorten the prompt."
        )
    answer = min(params.max_tokens or 1, context - prompt)
    if prompt + answer > room:
        raise InvalidRequestError(
            f"A prompt of {prompt} tokens and an answer of up to {answer} do not fit into the KV "
            f"cache, which has room for {max(room, 0)}. Shorten the prompt, lower max_tokens, or "
            "raise kv_cache_tokens."
        )
