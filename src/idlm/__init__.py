"""Introspective Diffusion Language Models: several tokens per forward pass, the same text."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idlm.decoding.params import SamplingParams
    from idlm.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "idlm.llm", "SamplingParams": "idlm.decoding.params"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `idlm --help` does without.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'idlm' has no attribute {name!r}")
