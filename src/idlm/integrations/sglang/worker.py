"""One step of SGLang's scheduler: one forward that verifies, commits and proposes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from torch import nn

from idlm.decoding.layout import row_tables
from idlm.decoding.propose import num_candidates, propose
from idlm.decoding.sampling import Sampling
from idlm.decoding.settle import settle
from idlm.decoding.verify import Drafts, verify
from idlm.errors import CheckpointError
from idlm.integrations.sglang.decoder import HostDecoder
from idlm.integrations.sglang.masks import Masks
from idlm.integrations.sglang.options import Options
from idlm.integrations.sglang.rows import locate, mask_rows, report
from idlm.integrations.sglang.sampling import BatchSampling, greedy_sampling
from idlm.integrations.sglang.shares import of_first_rank
from idlm.integrations.sglang.slots import Slots
from idlm.integrations.sglang.spec_input import Pending, Rows
from idlm.model import checkpoint
from idlm.model.adapter import Adapter


class Worker(BaseSpecWorker):
    """Drives the host's model worker.

    A forward holds, for each request, the pending token, its drafts and a mask block, in the
    linear layout. A request without drafts (its first forward, and after a rejection) has the
    mask block right after the pending token and rows that nothing sees at the end, so that all
    requests have the same number of rows and attention is causal.

    Raises:
        CheckpointError: there is neither an adapter nor a mask token.
        AdapterMismatchError: the adapter is for another model.
    """

    def __init__(
        self, server_args: Any, gpu_id: int, ps: Any, nccl_port: int, target_worker: Any
    ) -> None:
        super().__init__()
        self._target_worker = target_worker
        self._runner = target_worker.model_runner
        self.device = torch.device(self._runner.device)
        options = Options.of(server_args)
        self.layout, self.rule = options.layout, options.rule
        self._block_after_NN = row_tables(self.layout, self.device).block_after_NN
        folder = checkpoint.resolve(server_args.model_path)
        config = checkpoint.load_config(folder)
        self._adapter = self._load_adapter(options, config)
        if self._adapter is None and config.mask_token_id is None:
            raise CheckpointError(
                f"{server_args.model_path} names no mask token in its config.json, so it is no "
                "converted model; give an adapter for it by --speculative-draft-model-path."
            )
        self._mask_token_id = config.mask_token_id
        self._decoder = HostDecoder(self._runner.model, config)
        self._masks = Masks(self.layout, self._runner.model, self._adapter, config)
        if self._adapter is not None:
            self._adapter.lora = nn.ModuleList()  # the projections have their shares of it
        self._sampling = BatchSampling(config.vocab_size, target_worker.random_seed, self.device)
        # Whether graphs may write their greedy verdict to the slots; the same, on the device.
        self._greedy = True
        self._greedy_1 = torch.ones((), dtype=torch.bool, device=self.device)
        self._runner.capture_tail_hooks.append(self._captured)

    def _load_adapter(self, options: Options, config: Any) -> Adapter | None:
        if options.adapter is None:
            return None
        folder = checkpoint.resolve(Path(options.adapter))
        dtype = self._runner.dtype
        adapter = Adapter.load(folder, config, device=self.device, dtype=dtype)
        return adapter

    @property
    def draft_worker(self) -> None:
        """There is no draft model."""
        return None

    def alloc_memory_pool(
        self,
        memory_pool_config: Any = None,
        req_to_token_pool: Any = None,
        token_to_kv_pool_allocator: Any = None,
    ) -> None:
        """Make room for the host's request slots."""
        super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)
        self._slot_tokens = req_to_token_pool.req_to_token
        self._slots = self._masks.slots = Slots(
            len(self._slot_tokens),
            self.layout.block_size,
            num_candidates(self.device, self._sampling.vocab_size),
            self.device,
        )

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        """The model has its new weights; mask rows follow."""
        self._masks.refresh()
        return True, "Succeeded to update model weights."

    update_weights_from_ipc = update_weights_from_disk

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        """The model's weights are the host's; mask rows follow."""
        result = self._target_worker.update_weights_from_tensor(recv_req)
        self._masks.refresh()
        return result

    @torch.inference_mode()
    def forward_batch_generation(
        self, batch: Any, on_publish: Any = None, **kw: Any
    ) -> GenerationBatchResult:
        """Run a batch of the scheduler: prompts (or parts of them), or one decoding step."""
        step = self._decode if batch.forward_mode.is_decode() else self._prefill
        result = step(batch)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        return result

    def _prefill(self, batch: Any) -> GenerationBatchResult:
        """Prompts as in plain decoding, and their first token: a forward without drafts."""
        result = self._target_worker.forward_batch_generation(batch, is_verify=True)
        self._slots.clear(batch.req_pool_indices)
        sampling = self._sampling.starting(batch.reqs)
        logits_B1V = self._never_mask(result.logits_output.next_token_logits)[:, None]
        none = Drafts.none(len(logits_B1V), self.device)
        verdict = verify(self.rule, logits_B1V, none, batch.seq_lens, sampling)
        (next_B,) = of_first_rank(verdict.next_B)
        sampling.commit(next_B[:, None], verdict.accepted_B)
        result.next_token_ids = next_B
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = Pending(next_B, batch.seq_lens)
        return result

    def _decode(self, batch: Any) -> GenerationBatchResult:
        slot_B, length_B = batch.req_pool_indices, batch.seq_lens
        if self.device.type == "cuda":  # made on the scheduler's stream, used on this one
            length_B.record_stream(torch.cuda.current_stream())
        sampling = self._sampling.running(batch.reqs)
        greedy = sampling.all_greedy and not sampling.adjusts_logits
        if greedy != self._greedy:
            self._greedy = greedy
            self._greedy_1.fill_(greedy)
        result = self._target_worker.forward_batch_generation(
            batch=None, forward_batch=self._rows(batch), is_verify=True
        )
        output = result.logits_output
        if not (greedy and result.can_run_cuda_graph):
            self._conclude(output, slot_B, length_B, sampling, slot_B)
        output.hidden_states = None  # else the host copies them
        tokens_F, committed_B, new_length_B, pending_B = report(slot_B, length_B, self._slots)
        result.next_token_ids = tokens_F
        result.accept_lens = committed_B
        result.speculative_num_draft_tokens = self.layout.stride
        result.new_seq_lens = new_length_B
        result.next_draft_input = Pending(pending_B, new_length_B)
        return result

    def _rows(self, batch: Any) -> ForwardBatch:
        """The host's forward for all rows; `Masks` fills in what they hold."""
        W, slot_B, length_B = self.layout.num_rows, batch.req_pool_indices, batch.seq_lens
        ids, positions, places = locate(
            batch.spec_info.bonus_tokens, length_B, slot_B, self._slot_tokens, W
        )
        rows = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(slot_B),
            input_ids=ids,
            req_pool_indices=slot_B,
            seq_lens=length_B,
            out_cache_loc=places,
            seq_lens_sum=batch.seq_lens_sum,
            seq_lens_cpu=batch.seq_lens_cpu,
            positions=positions,
            spec_algorithm=batch.spec_algorithm,
            spec_info=Rows(positions, W),
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
        )
        if self.device.type == "cpu":
            # The host's CPU attention takes the forward for one that extends prompts.
            rows.extend_prefix_lens = length_B
            rows.extend_seq_lens = torch.full_like(length_B, W)
            rows.seq_lens = length_B + W
        return rows

    @torch.no_grad()
    def _captured(self, runner: Any, output: Any, batch: Any, num_tokens: int) -> None:
        """In every CUDA graph, after the model: the rest of a step whose requests are greedy.

        Other steps run it for nothing: they send its result to slot 0, and conclude by themselves.
        """
        slot_B = batch.req_pool_indices
        sampling = greedy_sampling(len(slot_B), self.device)
        self._conclude(output, slot_B, batch.seq_lens, sampling, slot_B * self._greedy_1)

    def _conclude(
        self,
        output: Any,
        slot_B: torch.Tensor,
        length_B: torch.Tensor,
        sampling: Sampling,
        to_B: torch.Tensor,
    ) -> None:
        """Verify, commit and propose from the forward's output, and store it in slots ``to``."""
        N, W = self.layout.stride, self.layout.num_rows
        B, M = len(slot_B), self.layout.block_size
        logits_FV = self._never_mask(output.next_token_logits)
        drafts = self._slots.drafts(slot_B, sampling.all_greedy)
        masks_F = mask_rows(drafts.count_B, M)
        logits_BNV = logits_FV.unflatten(0, (B, W))[:, :N]
        verdict = verify(self.rule, logits_BNV, drafts, length_B + 1, sampling)
        settled = settle(verdict, drafts, length_B, self._block_after_NN, W, M)
        tokens_BN = settled.packed_BX[:, :N]
        sampling.commit(tokens_BN, verdict.accepted_B)
        proposals = propose(
            self._decoder.as_decoder(),
            self._adapter,
            output.hidden_states[masks_F].view(B, M, -1),
            logits_FV[masks_F].view(B, M, -1),
            verdict.next_B,
            settled.length_B,
            settled.proposed_B,
            sampling,
            coupled=self.rule == "coupled",
        )
        tokens_BN, accepted_B, proposals.tokens_BM, proposals.count_B = of_first_rank(
            tokens_BN, verdict.accepted_B, proposals.tokens_BM, proposals.count_B
        )
        self._slots.store(to_B, tokens_BN, accepted_B, proposals, sampling.all_greedy)

    def _never_mask(self, logits: torch.Tensor) -> torch.Tensor:
        """The mask token of a fully converted model is never sampled."""
        if self._mask_token_id is not None:
            logits[..., self._mask_token_id] = float("-inf")
        return logits
