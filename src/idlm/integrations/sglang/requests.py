"""Requests of SGLang in our terms, and what of them is refused."""

from __future__ import annotations

import hashlib
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang.srt.sampling.sampling_params import SamplingParams as HostParams

from idlm.decoding.params import SamplingParams
from idlm.errors import InvalidRequestError
from idlm.integrations.sglang.options import NAME

_REQUEST_FEATURES = {
    "return_logprob": "log-probabilities",
    "return_hidden_states": "hidden states",
    "custom_logit_processor": "custom logit processors",
    "lora_path": "LoRA adapters",
    "input_embeds": "input embeddings",
    "positional_embed_overrides": "input embeddings",
    "max_thinking_tokens": "limits of thinking",
    "session_params": "sessions",
}
_SAMPLING_FEATURES = {
    "json_schema": "constrained texts",
    "regex": "constrained texts",
    "ebnf": "constrained texts",
    "structural_tag": "constrained texts",
    "min_new_tokens": "min_new_tokens",
}


def check_request(request: Any, preferred: dict[str, Any] | None) -> None:
    """Refuse what would be ignored or wrong.

    Args:
        preferred: the server's own sampling parameters, for what the request leaves open.

    Raises:
        InvalidRequestError: the request uses a feature that is not supported, or a parameter is
            out of range.
    """
    if not isinstance(request, GenerateReqInput):
        raise InvalidRequestError(f"A server with {NAME} generates text only.")
    params = HostParams(**(preferred or {}) | request.sampling_params)
    for features, source in ((_REQUEST_FEATURES, request), (_SAMPLING_FEATURES, params)):
        for name, feature in features.items():
            if getattr(source, name, None):
                raise InvalidRequestError(
                    f"{NAME} does not support {feature} in SGLang ({name}); leave it out, or "
                    f"start the server without --speculative-algorithm {NAME}."
                )
    sampling_params(params)


def sampling_params(params: HostParams) -> SamplingParams:
    """How a request wants its tokens chosen; what ends it is the host's business.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """
    return SamplingParams(
        temperature=0.0 if params.top_k == 1 else float(params.temperature),
        top_k=0 if params.top_k == TOP_K_ALL else params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias={int(token): bias for token, bias in (params.logit_bias or {}).items()},
        seed=params.sampling_seed,
        max_tokens=None,
    )


def seed_of(params: SamplingParams, request_id: str, server_seed: int) -> int:
    """The request's seed, or one of its own: the same in all processes of a server."""
    if params.seed is not None:
        return params.seed
    digest = hashlib.blake2b(f"{server_seed} {request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
