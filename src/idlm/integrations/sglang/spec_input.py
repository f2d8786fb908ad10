"""What SGLang carries beside a batch: between forwards, and into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType


@dataclass
class Pending(SpecInput):
    """Between forwards: the pending tokens (int64) and the lengths that are in the cache.

    Drafts stay on the device (`Slots`). Under overlap scheduling the host relays the tokens
    itself, by ``future_indices``.
    """

    bonus_tokens: torch.Tensor
    new_seq_lens: torch.Tensor
    future_indices: torch.Tensor | None = None
    # What the host's relay reads of the algorithms that have it.
    topk_p = topk_index = hidden_states = None

    def __post_init__(self) -> None:
        super().__init__(SpecInputType.DFLASH_DRAFT)
        self.num_tokens_per_req = self.num_tokens_for_logprob_per_req = 1

    def filter_batch(self, new_indices: torch.Tensor, *args: Any, **kw: Any) -> None:
        """Keep the requests at ``new_indices`` (int64)."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
        else:
            self.bonus_tokens = self.bonus_tokens[new_indices]
            self.new_seq_lens = self.new_seq_lens[new_indices]

    def merge_batch(self, other: Pending) -> None:
        """Append the requests of ``other``."""
        if self.future_indices is not None and other.future_indices is not None:
            self.future_indices = torch.cat((self.future_indices, other.future_indices))
        else:
            self.bonus_tokens = torch.cat((self.bonus_tokens, other.bonus_tokens))
            self.new_seq_lens = torch.cat((self.new_seq_lens, other.new_seq_lens))


@dataclass
class Rows(SpecInput):
    """Into a forward: ``draft_token_num`` rows of each request, causal; hidden states are kept."""

    positions: torch.Tensor | None
    draft_token_num: int
    topk: int = 1
    custom_mask: torch.Tensor | None = None
    capture_hidden_mode: CaptureHiddenMode = CaptureHiddenMode.FULL

    def __post_init__(self) -> None:
        super().__init__(SpecInputType.DFLASH_VERIFY)
        self.num_tokens_per_req = self.num_tokens_for_logprob_per_req = self.draft_token_num
