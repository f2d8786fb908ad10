"""Captured decoding cycles of models with random weights, where it is times that count."""

from __future__ import annotations

import numpy as np
import torch
from random_models import DEVICE, DTYPE, bandwidth, random_model

from idlm import SamplingParams
from idlm.decoding.cycle import Method, State
from idlm.decoding.layout import Layout
from idlm.decoding.propose import num_candidates
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.graphs import LEAST_TEXT, Graphs
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache
from idlm.engine.texts import Prompts

TEXT, BLOCKS = 300, 40  # tokens and blocks of a request


class Cycles:
    """Cycles of ``135M`` or ``8B``, texts of 300 tokens: what drafts are worth shows in no time.

    Args:
        rank, width: of the adapter, as `random_model` takes them.
    Attributes:
        heading: lines on the device, its memory and the weights.
    """

    def __init__(self, model: str, rank: int | None = None, width: int | None = None) -> None:
        copied, read = bandwidth()
        self._decoder, self._adapter = random_model(model, rank, width)
        config = self._decoder.config
        tokens = 131_072 if model == "135M" else 40_000
        cache = KVCache(config, DEVICE, DTYPE, tokens, wanted=0)
        self._blocks = cache.pool.capacity // BLOCK_TOKENS - 1  # the first is nobody's
        self._candidates = num_candidates(DEVICE, config.vocab_size)
        self._graphs = Graphs(cache, DEVICE, 512, 7, self._candidates, config.vocab_size)
        # AR reads them all, but for the embeddings where the output layer has weights of its own.
        weights = sum(parameter.nbytes for parameter in self._decoder.parameters())
        weights -= 0 if config.tie_word_embeddings else self._decoder.embed.weight.nbytes
        floor = weights / copied / 1e3
        self.heading = (
            f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {model}\n"
            f"# copy {copied:.0f} GB/s, sum {read:.0f} GB/s\n"
            f"# {weights / 1e6:.0f} MB of weights, {floor:.0f} us as fast as a copy"
        )

    def capture(self, case: str) -> torch.cuda.CUDAGraph:
        """A new graph of ``layout:stride:requests[:temperature][+rows]``, rows of prompts."""
        case, _, prompts = case.partition("+")
        name, stride, count, *rest = case.split(":")
        layout, B = Layout.named(name, int(stride)), int(count)
        params = SamplingParams(temperature=float(rest[0]) if rest else 0.0)
        candidates = 1 if params.greedy else self._candidates
        blocks = torch.arange(B * BLOCKS, device=DEVICE) % self._blocks + 1
        M, V = layout.block_size, self._decoder.config.vocab_size
        ids = torch.randint(V, (B, M, candidates), device=DEVICE)
        full_B = torch.full((B,), M, device=DEVICE)
        drafts = Drafts(ids[..., 0].clone(), ids, torch.rand(ids.shape, device=DEVICE), full_B)
        state = State(
            torch.randint(V, (B,), device=DEVICE),
            torch.full((B,), TEXT, device=DEVICE),
            drafts if M else Drafts.none(B, DEVICE),
        )
        empty: list[list[int]] = [[]] * B
        sampling = Sampling.of([params] * B, list(range(B)), empty, empty, V, DEVICE)
        method = Method(self._decoder, self._adapter if M else None, layout, "rejection")
        self._graphs._graphs.clear()
        seats = self._graphs.seat(blocks.view(B, BLOCKS).int(), state, sampling)
        if prompts:
            self._graphs.decode_with(method, seats, self._prompts(int(prompts), params))
        else:
            self._graphs.decode(method, seats)
        (graph,) = self._graphs._graphs.values()
        return graph.graph

    def _prompts(self, count: int, params: SamplingParams) -> Prompts:
        """Of which as many tokens as fit into a row of each are not cached."""
        V, same, C = self._decoder.config.vocab_size, np.ones(count, np.int64), LEAST_TEXT
        columns = Sampling.columns([params] * count, range(count), params.wants, V)
        table_BP = np.arange(1, count * 4 + 1, dtype=np.int32).reshape(count, 4)
        tokens_BC = np.arange(count * C).reshape(count, C)
        return Prompts(table_BP, tokens_BC, C * same, 32 * same, same.astype(bool), columns)
