"""One cycle of Introspective Strided Decoding: one forward pass that verifies and proposes.

rows    pending  d_1 ... d_M  [mask blocks]
verify  the rows of pending .. d_M give p for d_1 .. d_M and for the token after them
commit  the accepted drafts and one more token; their keys are where they belong already
propose the mask block that follows the committed tokens gives the next drafts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from idlm.decoding.layout import Layout, RowTables, row_tables
from idlm.decoding.propose import from_whole_vocabulary, propose
from idlm.decoding.sampling import Sampling
from idlm.decoding.settle import settle
from idlm.decoding.verify import Drafts, Verdict, verify
from idlm.model.adapter import Adapter
from idlm.model.attention import PagedAttention
from idlm.model.cuda import head as cuda_head
from idlm.model.decoder import Decoder, Part

# Rows of a forward up to which mask blocks that will not be used go through the output layer too.
ONE_PASS_ROWS = {"cpu": 12, "cuda": 128}


@dataclass(frozen=True)
class Method:
    """A converted model and how it is decoded.

    Attributes:
        adapter: None for a bare base model (layout `ar`) or a fully converted model.
        rule: `rejection` or `coupled` (`idlm.decoding.verify`).
    """

    decoder: Decoder
    adapter: Adapter | None
    layout: Layout
    rule: str


@dataclass
class State:
    """What ``B`` requests carry from one forward to the next.

    Attributes:
        pending_B: last committed token; its key and value are not cached yet. int64.
        length_B: tokens in the cache, which is the position of pending. int64.
        drafts: proposals for the positions after pending.
        counts_BV, prompt_BV: what penalties look at, as in `Sampling`; None where there are none.
    """

    pending_B: torch.Tensor
    length_B: torch.Tensor
    drafts: Drafts
    counts_BV: torch.Tensor | None = None
    prompt_BV: torch.Tensor | None = None

    @classmethod
    def cat(cls, states: Sequence[State]) -> State:
        """The requests of all ``states``, in order."""
        return cls(
            torch.cat([s.pending_B for s in states]),
            torch.cat([s.length_B for s in states]),
            Drafts.cat([s.drafts for s in states]),
            _cat([s.counts_BV for s in states], states),
            _cat([s.prompt_BV for s in states], states),
        )

    def part(self, first: int, end: int) -> State:
        """Views of the requests from ``first`` up to ``end``."""
        return State(
            self.pending_B[first:end],
            self.length_B[first:end],
            self.drafts.part(first, end),
            None if self.counts_BV is None else self.counts_BV[first:end],
            None if self.prompt_BV is None else self.prompt_BV[first:end],
        )

    def select(self, rows: torch.Tensor) -> State:
        """The requests at ``rows`` (int64)."""
        return State(
            self.pending_B[rows],
            self.length_B[rows],
            self.drafts.select(rows),
            None if self.counts_BV is None else self.counts_BV[rows],
            None if self.prompt_BV is None else self.prompt_BV[rows],
        )


def _cat(parts: Sequence[torch.Tensor | None], states: Sequence[State]) -> torch.Tensor | None:
    """``parts`` of ``states`` together, zeros where there is none; None if there is none at all."""
    some = next((part for part in parts if part is not None), None)
    if some is None:
        return None
    return torch.cat(
        [
            some.new_zeros(len(state.pending_B), some.shape[1]) if part is None else part
            for part, state in zip(parts, states, strict=True)
        ]
    )


@dataclass(frozen=True)
class Texts:
    """Prompts that are not cached yet, in ``E`` rows of up to ``C`` tokens; longer ones take more.

    Attributes:
        table_EP, tokens_EC, count_E, start_E: as in `prefill`. A row may start where another ends.
        last_E: bool; whether its text ends with it, so that an answer begins.
    """

    table_EP: torch.Tensor
    tokens_EC: torch.Tensor
    count_E: torch.Tensor
    start_E: torch.Tensor
    last_E: torch.Tensor


@dataclass
class Outcome:
    """What one forward brought.

    Attributes:
        packed_BX: what the host is told, ``[B, 2 N + 1]`` int64: the tokens, accepted drafts, those
            that were tested, and the bits of the verdict's overlap.
        tokens_BN: committed tokens, the first ``accepted_B + 1`` of each row.
        verdict: accepted drafts and the token after them.
        logits_BNV: the base model's raw logits behind ``tokens_BN``.
        state: for the next forward.
        rows: clean and mask rows of each request that took part.
    """

    packed_BX: torch.Tensor
    tokens_BN: torch.Tensor
    verdict: Verdict
    logits_BNV: torch.Tensor
    state: State
    rows: int


def decode(
    method: Method,
    k_LNKTD: torch.Tensor,
    v_LNKTD: torch.Tensor,
    table_BP: torch.Tensor,
    state: State,
    sampling: Sampling,
) -> Outcome:
    """Run one cycle for ``B`` requests; their blocks need room for ``layout.num_rows`` more."""
    layout = method.layout
    # Drafts of a forward with another stride: what is too long is cut.
    drafts = state.drafts.resized(layout.block_size)
    state = State(state.pending_B, state.length_B, drafts)
    # Nobody has drafts: no rows for them. Elsewhere, to look would be to wait for the device.
    if layout.block_size and drafts.count_B.device.type == "cpu" and not drafts.count_B.any():
        return prefill(
            method,
            k_LNKTD,
            v_LNKTD,
            table_BP,
            state.pending_B[:, None],
            torch.ones_like(state.length_B),
            state.length_B,
            sampling,
        )
    part = _decoding(method, k_LNKTD, v_LNKTD, table_BP, state)
    (hidden_BRH,) = method.decoder.together([part], method.adapter)
    block_after_NN = row_tables(layout, table_BP.device).block_after_NN
    return _conclude(method, hidden_BRH, layout.num_masks, block_after_NN, state, sampling)


def decode_with(
    method: Method,
    k_LNKTD: torch.Tensor,
    v_LNKTD: torch.Tensor,
    table_BP: torch.Tensor,
    state: State,
    texts: Texts,
    sampling: Sampling,
) -> Outcome:
    """`decode` of ``B`` requests and `prefill` of others as one forward.

    Their rows go through the layers together, so that the weights are read once for both.

    Args:
        sampling: of the requests of ``state``, then of each row of ``texts``.
    Returns:
        Of the requests of ``state``, then of each row of ``texts``; nobody wants what a row brings
        that is not the last of its text.
    """
    layout, M = method.layout, method.layout.block_size
    state = State(state.pending_B, state.length_B, state.drafts.resized(M))
    caches = k_LNKTD, v_LNKTD
    given = texts.table_EP, texts.tokens_EC, texts.count_E, texts.start_E
    parts = [
        _decoding(method, *caches, table_BP, state),
        _causal(method, *caches, *given, M, texts.last_E),
    ]
    hidden_BRH, hidden_ERH = method.decoder.together(parts, method.adapter)
    begun, ends_E1H = _ends(texts.tokens_EC, texts.count_E, texts.start_E, hidden_ERH)
    # As rows of requests that have no drafts: pending, and the block of masks behind it.
    E, C = texts.tokens_EC.shape
    begun_ERH = hidden_BRH.new_zeros(E, *hidden_BRH.shape[1:])
    begun_ERH[:, :1] = ends_E1H
    begun_ERH[:, layout.stride : layout.stride + M] = hidden_ERH[:, C:]
    return _conclude(
        method,
        torch.cat((hidden_BRH, begun_ERH)),
        layout.num_masks,
        row_tables(layout, table_BP.device).block_after_NN,
        State.cat([state, begun]),
        sampling,
    )


def _decoding(
    method: Method,
    k_LNKTD: torch.Tensor,
    v_LNKTD: torch.Tensor,
    table_BP: torch.Tensor,
    state: State,
) -> Part:
    """The rows of requests that decode."""
    tables = row_tables(method.layout, state.pending_B.device)
    tokens_BN, positions_BR, visible_BRR = _rows(tables, state)
    attention = PagedAttention(
        k_LNKTD,
        v_LNKTD,
        table_BP,
        state.length_B,
        positions_BR,
        visible_BRR,
        method.decoder.config.sliding_window,
    )
    return Part(tokens_BN, attention, method.layout.num_masks)


def _rows(tables: RowTables, state: State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of the model's own rows; where all rows stand, and which rows they see."""
    pending_B, length_B, drafts = state.pending_B, state.length_B, state.drafts
    if cuda_head.usable(pending_B.device):
        given = pending_B, length_B, drafts.tokens_BM, drafts.count_B
        return cuda_head.arrange(*given, tables.offsets_NR, tables.visible_NRR)
    return (
        torch.cat((pending_B[:, None], drafts.tokens_BM), dim=1),
        length_B[:, None] + tables.offsets_NR[drafts.count_B],
        tables.visible_NRR[drafts.count_B],
    )


def prefill(
    method: Method,
    k_LNKTD: torch.Tensor,
    v_LNKTD: torch.Tensor,
    table_BP: torch.Tensor,
    tokens_BC: torch.Tensor,
    count_B: torch.Tensor,
    start_B: torch.Tensor,
    sampling: Sampling,
) -> Outcome:
    """A cycle with nothing to verify: the end of a prompt, its last token pending.

    Args:
        tokens_BC: what stands at positions ``start`` and after, int64; a mask block follows.
        count_B: how many of the ``C`` are tokens, at least 1, int64; the rest fills up.
        start_B: tokens before it whose keys are cached (see `cache`), int64.
    Returns:
        The first token after the prompt, and proposals for those that follow it.
    """
    C, masks = tokens_BC.shape[1], method.layout.block_size
    part = _causal(method, k_LNKTD, v_LNKTD, table_BP, tokens_BC, count_B, start_B, masks)
    (hidden_BRH,) = method.decoder.together([part], method.adapter)
    state, ends_B1H = _ends(tokens_BC, count_B, start_B, hidden_BRH)
    return _conclude(
        method,
        torch.cat((ends_B1H, hidden_BRH[:, C:]), dim=1),
        masks,
        row_tables(method.layout, tokens_BC.device).block_after_NN[:1, :1],
        state,
        sampling,
    )


def _ends(
    tokens_BC: torch.Tensor, count_B: torch.Tensor, start_B: torch.Tensor, hidden_BRH: torch.Tensor
) -> tuple[State, torch.Tensor]:
    """Requests whose last token is pending, and ``[B, 1, H]``: the hidden states of that."""
    last_B1 = (count_B - 1)[:, None]
    ends_B1H = hidden_BRH.gather(1, last_B1[..., None].expand(-1, 1, hidden_BRH.shape[2]))
    pending_B = tokens_BC.gather(1, last_B1).squeeze(1)
    none = Drafts.none(len(pending_B), pending_B.device)
    return State(pending_B, start_B + count_B - 1, none), ends_B1H


def cache(
    method: Method,
    k_LNKTD: torch.Tensor,
    v_LNKTD: torch.Tensor,
    table_BP: torch.Tensor,
    tokens_BC: torch.Tensor,
    start_B: torch.Tensor,
) -> torch.Tensor:
    """Cache keys and values of the tokens (int64) at positions ``start`` (int64) and after.

    Returns:
        Their final hidden states, ``[B, C, H]``; see `logits`.
    """
    count_B = torch.full_like(start_B, tokens_BC.shape[1])
    part = _causal(method, k_LNKTD, v_LNKTD, table_BP, tokens_BC, count_B, start_B, 0)
    return method.decoder.together([part], None)[0]


def _causal(
    method: Method,
    k_LNKTD: torch.Tensor,
    v_LNKTD: torch.Tensor,
    table_BP: torch.Tensor,
    tokens_BC: torch.Tensor,
    count_B: torch.Tensor,
    start_B: torch.Tensor,
    num_masks: int,
    last_B: torch.Tensor | None = None,
) -> Part:
    """Tokens (and masks) that begin at ``start`` and see all before them.

    Where ``last_B`` (bool) says so (None: everywhere), the masks are wanted.
    """
    C, device = tokens_BC.shape[1], tokens_BC.device
    row_R = torch.arange(C + num_masks, device=device)
    # Masks stand behind the last token, not behind what fills up, and do not see that.
    offset_BR = torch.where(row_R < C, row_R, row_R - C + count_B[:, None])
    real_BR = (row_R < count_B[:, None]) | (row_R >= C)
    attention = PagedAttention(
        k_LNKTD,
        v_LNKTD,
        table_BP,
        start_B,
        start_B[:, None] + offset_BR,
        (row_R[:, None] >= row_R) & real_BR[:, None],
        method.decoder.config.sliding_window,
        None if last_B is None else last_B[:, None] | (row_R < C),
    )
    return Part(tokens_BC, attention, num_masks)


def _conclude(
    method: Method,
    hidden_BRH: torch.Tensor,
    num_masks: int,
    block_after_NN: torch.Tensor,
    state: State,
    sampling: Sampling,
) -> Outcome:
    """Verify, commit and propose, given the final hidden states of a forward's last rows."""
    drafts, (B, R, _), M = state.drafts, hidden_BRH.shape, method.layout.block_size
    N = R - num_masks
    whole = from_whole_vocabulary(method.decoder, method.adapter, hidden_BRH, sampling)
    # The output layer is read once for all rows where that is cheaper than reading it again for
    # the one block that is used.
    few = ONE_PASS_ROWS[hidden_BRH.device.type] >= B * R
    at_once = not whole and (num_masks == M or few)
    logits_BRV = logits(method, hidden_BRH if at_once else hidden_BRH[:, :N])
    logits_BNV = logits_BRV[:, :N]
    verdict = verify(method.rule, logits_BNV, drafts, state.length_B + 1, sampling)
    settled = settle(verdict, drafts, state.length_B, block_after_NN, R, M)
    tokens_BN = settled.packed_BX[:, :N]
    sampling.commit(tokens_BN, verdict.accepted_B)
    if M == 0:
        proposals = Drafts.none(B, settled.length_B.device)
    else:

        def used(rows_BRA: torch.Tensor) -> torch.Tensor:
            """Of the mask rows, those of the block that follows the committed tokens."""
            return rows_BRA[:, N:] if num_masks == M else rows_BRA.flatten(0, 1)[settled.rows_BM]

        block_BMH = used(hidden_BRH).contiguous()
        logits_BMV = None
        if not whole:
            logits_BMV = used(logits_BRV) if at_once else logits(method, block_BMH)
        proposals = propose(
            method.decoder,
            method.adapter,
            block_BMH,
            logits_BMV,
            verdict.next_B,
            settled.length_B,
            settled.proposed_B,
            sampling,
            coupled=method.rule == "coupled",
        )
    seen = sampling.counts_BV, sampling.prompt_BV
    state = State(verdict.next_B, settled.length_B, proposals, *seen)
    return Outcome(settled.packed_BX, tokens_BN, verdict, logits_BNV, state, R)


def logits(method: Method, hidden_BRH: torch.Tensor) -> torch.Tensor:
    """``[B, R, V]``; the mask token of a fully converted model is never sampled."""
    logits_BRV = method.decoder.logits(hidden_BRH)
    if (mask := method.decoder.config.mask_token_id) is not None:
        logits_BRV[..., mask] = float("-inf")
    return logits_BRV
