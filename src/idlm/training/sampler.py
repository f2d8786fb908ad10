"""Batch sampler: many conversations at once, one token per slot and step.

Everything about a slot is a device tensor that a step updates in place, so that on CUDA a step is
one captured graph; the host looks in every few steps to exchange the finished conversations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from idlm.model.decoder import Decoder
from idlm.training.compilation import compile_layers, compiled
from idlm.training.slot_attention import SlotAttention

# Steps between two looks at which conversations have ended.
STEPS_PER_LOOK = 16
# A user turn that ends with less room for the answer than this ends the conversation.
MIN_ANSWER_ROOM = 32
# User turns are kept sensible by a floor on the probability, relative to the likeliest token.
USER_MIN_P = 0.05


@dataclass(frozen=True)
class Script:
    """What a conversation begins with and how it is sampled.

    Attributes:
        prefix: token ids that are given.
        answering: the model continues with an answer, not with a user turn.
        more_turns: user turns after the first answer.
        temperature: of the answers; 0: greedy.
        user_temperature: of the user turns.
        source: names what the prefix was made from, if others are made from the same.
    """

    prefix: tuple[int, ...]
    answering: bool
    more_turns: int
    temperature: float
    user_temperature: float
    source: str = ""


@dataclass(frozen=True)
class Limits:
    """Longest conversation, user turn and answer, in tokens."""

    length: int = 640
    user: int = 160
    answer: int = 400


class BatchSampler:
    """Samples conversations from a decoder.

    Args:
        to_answer, to_user: token ids forced at the end of a user turn (of an answer), the token
            that ends the turn first; empty for models without turns.
        stop_ids: tokens that end an answer.
        slots: conversations at once.
        seed: of the noise.
    """

    def __init__(
        self,
        decoder: Decoder,
        to_answer: Sequence[int],
        to_user: Sequence[int],
        stop_ids: Sequence[int],
        *,
        slots: int,
        limits: Limits,
        seed: int,
    ) -> None:
        weight = decoder.embed.weight
        c, device = decoder.config, weight.device
        self.decoder, self.slots, self.limits, self.device = decoder, slots, limits, device
        cache = (c.num_layers, slots, c.num_kv_heads, limits.length, c.head_dim)
        k, v = (torch.zeros(cache, dtype=weight.dtype, device=device) for _ in range(2))
        # Token ids; -1: not there yet. What is there already is forced.
        self.script_BS = torch.full((slots, limits.length), -1, device=device)
        self.index_B, self.turn_start_B, self.turns_B = torch.zeros(
            (3, slots), dtype=torch.long, device=device
        )
        self.answering_B = torch.zeros(slots, dtype=torch.bool, device=device)
        self.done_B = torch.ones(slots, dtype=torch.bool, device=device)
        self.temperature_B, self.user_temperature_B = torch.zeros((2, slots), device=device)
        self._attention = SlotAttention(k, v, self.index_B)
        self._noise_BV = torch.empty((slots, c.vocab_size), device=device)
        self._generator = torch.Generator(device).manual_seed(seed)
        width = max(len(to_answer), len(to_user), 1)
        self._to_answer_P = _padded(to_answer, width, device)
        self._to_user_P = _padded(to_user, width, device)
        self._room = max(len(to_answer), len(to_user)) + MIN_ANSWER_ROOM
        # By "an answer follows": length of the transition, and of the longest turn.
        self._turn_lengths_2 = torch.tensor([len(to_user), len(to_answer)], device=device)
        self._turn_limits_2 = torch.tensor([limits.user, limits.answer], device=device)
        self._user_end = to_answer[0] if to_answer else -1
        self._answer_end = to_user[0] if to_user else -1
        self._stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            compile_layers(decoder)

    @torch.inference_mode()
    def run(self, scripts: Iterator[Script]) -> Iterator[list[tuple[Script, list[int]]]]:
        """Sample without end: after every few steps, the conversations that have ended.

        Yields:
            pairs of a script and the token ids of the whole conversation.
        """
        playing: list[Script | None] = [None] * self.slots
        while True:
            ended = self._ended(playing)
            slots = self.done_B.nonzero()[:, 0].tolist()
            for slot in slots:
                playing[slot] = next(scripts)
            self._restart(slots, [s for s in (playing[i] for i in slots) if s is not None])
            self._advance()
            yield ended

    def step(self) -> None:
        """One token in every slot."""
        token_B1 = self.script_BS.gather(1, self.index_B[:, None])
        hidden_B1H = self.decoder(token_B1, self.index_B[:, None], self._attention)
        logits_BV = self.decoder.logits(hidden_B1H[:, 0])
        self._noise_BV.exponential_(generator=self._generator)
        temperature_B = torch.where(self.answering_B, self.temperature_B, self.user_temperature_B)
        choose = compiled(_choose) if logits_BV.is_cuda else _choose
        self._write(choose(logits_BV, self._noise_BV, temperature_B, ~self.answering_B))

    def _write(self, sampled_B: torch.Tensor) -> None:
        """Put the new tokens into the scripts and update the state of every slot."""
        length, script_BS = self.limits.length, self.script_BS
        next_B = (self.index_B + 1).clamp_(max=length - 1)
        there_B = script_BS.gather(1, next_B[:, None])[:, 0]
        free_B = (there_B < 0) & ~self.done_B
        token_B = torch.where(free_B, sampled_B, there_B)
        script_BS.scatter_(1, next_B[:, None], token_B[:, None])

        stops_B = free_B & (token_B[:, None] == self._stop_ids).any(-1)
        user_ends_B = free_B & ~self.answering_B & (token_B == self._user_end)
        answer_ends_B = stops_B & self.answering_B
        fits_B = next_B + self._room < length
        to_answer_B = user_ends_B & fits_B
        to_user_B = answer_ends_B & fits_B & (self.turns_B > 0) & (token_B == self._answer_end)
        self._force(to_answer_B, to_user_B, next_B)
        switch_B = to_answer_B | to_user_B

        written_B = next_B + 1 - self.turn_start_B
        limit_B = self._turn_limits_2[self.answering_B.long()]
        over_B = free_B & ~switch_B & (written_B >= limit_B)
        ends_B = (user_ends_B | stops_B) & ~switch_B
        full_B = next_B >= length - 1
        index_B = torch.where(self.done_B, self.index_B, next_B)
        lengths_B = self._turn_lengths_2[to_answer_B.long()]
        self.turn_start_B.copy_(torch.where(switch_B, next_B + lengths_B, self.turn_start_B))
        self.turns_B.sub_(to_user_B.long())
        self.answering_B.logical_xor_(switch_B)
        self.done_B.logical_or_(over_B | ends_B | full_B)
        self.index_B.copy_(index_B)

    def _force(
        self, to_answer_B: torch.Tensor, to_user_B: torch.Tensor, next_B: torch.Tensor
    ) -> None:
        """Write the template's transition after the end of a turn (whose token is its first)."""
        P = len(self._to_answer_P)
        index_BP = next_B[:, None] + torch.arange(P, device=self.device)
        index_BP = index_BP.clamp_(max=self.limits.length - 1)
        old_BP = self.script_BS.gather(1, index_BP)
        new_BP = torch.where(to_answer_B[:, None], self._to_answer_P, self._to_user_P)
        switch_B1 = (to_answer_B | to_user_B)[:, None]
        self.script_BS.scatter_(1, index_BP, torch.where(switch_B1, new_BP, old_BP))

    def _advance(self) -> None:
        if self.device.type == "cuda" and self._graph is None:
            self._graph = self._capture()
        for _ in range(STEPS_PER_LOOK):
            if self._graph is None:
                self.step()
            else:
                self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """One step as a graph; the warm-up steps are real ones."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def _ended(self, playing: Sequence[Script | None]) -> list[tuple[Script, list[int]]]:
        slots = self.done_B.nonzero()[:, 0]
        tokens = self.script_BS[slots].tolist()
        lengths = (self.index_B[slots] + 1).tolist()
        return [
            (script, row[:length])
            for slot, row, length in zip(slots.tolist(), tokens, lengths, strict=True)
            if (script := playing[slot]) is not None
        ]

    def _restart(self, slots: Sequence[int], scripts: Sequence[Script]) -> None:
        if not slots:
            return
        at = torch.tensor(slots, device=self.device)
        rows = torch.full((len(slots), self.limits.length), -1)
        for row, script in zip(rows, scripts, strict=True):
            row[: len(script.prefix)] = torch.tensor(script.prefix)
        self.script_BS[at] = rows.to(self.device)
        self.index_B[at] = 0
        self.done_B[at] = False
        columns = (
            (self.turn_start_B, [len(s.prefix) for s in scripts]),
            (self.turns_B, [s.more_turns for s in scripts]),
            (self.answering_B, [s.answering for s in scripts]),
            (self.temperature_B, [s.temperature for s in scripts]),
            (self.user_temperature_B, [s.user_temperature for s in scripts]),
        )
        for state_B, values in columns:
            state_B[at] = torch.tensor(values, dtype=state_B.dtype, device=self.device)


def _choose(
    logits_BV: torch.Tensor,
    noise_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    floor_B: torch.Tensor,
) -> torch.Tensor:
    """One token per row by the Gumbel-max trick (``noise`` is exponential); argmax at T = 0.

    Args:
        floor_B: rows where tokens under `USER_MIN_P` of the likeliest one are left out.
    """
    logits_BV = logits_BV.float()
    greedy_B1 = (temperature_B == 0)[:, None]
    z_BV = logits_BV / torch.where(greedy_B1, 1.0, temperature_B[:, None])
    cut_B1 = z_BV.amax(-1, keepdim=True) + math.log(USER_MIN_P)
    z_BV = z_BV.masked_fill(floor_B[:, None] & (z_BV < cut_B1), float("-inf"))
    scores_BV = torch.where(greedy_B1, logits_BV, z_BV - noise_BV.clamp(min=1e-9).log())
    return scores_BV.argmax(-1)


def _padded(ids: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([*ids, *[-1] * (width - len(ids))], device=device)
