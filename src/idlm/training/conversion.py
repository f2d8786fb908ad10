"""The two kinds of conversion: what is trained, by which objective, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch.distributed.tensor import DTensor

from idlm.errors import InvalidRequestError
from idlm.model.adapter import Adapter, AdapterConfig
from idlm.model.checkpoint import save_checkpoint
from idlm.model.decoder import Decoder
from idlm.training.config import ConvertConfig
from idlm.training.full import FullObjective
from idlm.training.lossless import LosslessObjective
from idlm.training.objective import Objective
from idlm.training.optimizer import Group, MasterAdamW, Optimizer
from idlm.training.parallel import ALONE, Parallel, shard

# Gathering the layers of a small model takes longer than running them.
SPREAD_ABOVE = 0.2


class Conversion(Protocol):
    """A model in training.

    Attributes:
        title: what the result is, for its card.
        summary: a sentence about it.
        base_model: name of the model that is converted.
        base_fingerprint: `ModelConfig.fingerprint` of it.
        parameters: how many are trained.
        device: where it is trained.
    """

    title: str
    summary: str
    base_model: str
    base_fingerprint: str
    parameters: int
    device: torch.device
    objective: Objective
    optimizer: Optimizer

    def save(self, folder: Path) -> None:
        """Write the result, of the averaged weights if there are such; called by all."""
        ...


class LosslessConversion:
    """An adapter for a frozen decoder.

    Each of several processes holds the whole adapter, and the decoder's weights too unless they
    take more than `SPREAD_ABOVE` of its memory: then these are spread over the processes.

    Args:
        decoder: the base model on its device, in the dtype to compute in.
        base_model: name of the base model, for the adapter's card.
    """

    title = "Adapter for"
    summary = (
        "Gated LoRA, mask embedding and recurrent sampler head of a lossless conversion: they act "
        "on mask rows only, so the text stays the base model's own."
    )

    def __init__(
        self,
        decoder: Decoder,
        config: ConvertConfig,
        base_model: str,
        parallel: Parallel = ALONE,
    ) -> None:
        self.base_model, self.base_fingerprint = base_model, decoder.config.fingerprint()
        self.device, self._parallel = decoder.embed.weight.device, parallel
        self._base = decoder.config
        torch.manual_seed(config.seed)
        adapter_config = AdapterConfig(
            rank=config.rank,
            alpha=config.alpha,
            projections=config.projections,
            block_size=config.block_size,
            head_width=config.head_width,
            head_depth=config.head_depth,
            base_fingerprint=self.base_fingerprint,
            base_model=base_model,
        )
        adapter = Adapter(adapter_config, decoder.config)
        torch.nn.init.normal_(adapter.mask_embedding, std=_token_scale(decoder))
        if config.init_adapter is not None:
            _fill(adapter, Path(config.init_adapter), decoder)
        self.parameters = sum(p.numel() for p in adapter.parameters())
        self.adapter = adapter.to(device=self.device, dtype=decoder.embed.weight.dtype)
        self.objective: Objective = LosslessObjective(decoder, self.adapter, config)
        if parallel.world > 1 and _share_of_memory(decoder) > SPREAD_ABOVE:
            shard(decoder, parallel.mesh(self.device), decoder.embed.weight.dtype)
        self.optimizer: Optimizer = MasterAdamW(self.adapter, config, parallel)

    def result(self) -> Adapter:
        """The trained adapter in bf16, on the CPU."""
        adapter = Adapter(self.adapter.config, self._base)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                parameter.copy_(self.optimizer.averages[name])
        return adapter.to(torch.bfloat16)

    def save(self, folder: Path) -> None:
        """Write the adapter."""
        if self._parallel.main:
            self.result().save(folder)


class FullConversion:
    """A decoder all of whose weights are trained.

    fp32 weights, gradients and optimizer state are spread over the processes; a process that is
    alone takes the same way, with a group of one.

    Args:
        decoder: the model on its device, in fp32.
        base_model: name of the model, for the card.
        dtype: to compute in.
        mask_token_id: token whose embedding stands for a mask (`mask_token`).
        source: folder of the model, for its config and tokenizer.
    """

    title = "I-DLM of"
    summary = (
        "A full conversion: all weights were trained, so the text is this model's own, not the "
        "base model's. Masks are a token of the vocabulary (`mask_token_id` in `config.json`)."
    )

    def __init__(
        self,
        decoder: Decoder,
        config: ConvertConfig,
        base_model: str,
        parallel: Parallel = ALONE,
        *,
        dtype: torch.dtype,
        mask_token_id: int,
        source: Path,
    ) -> None:
        self.base_model, self.base_fingerprint = base_model, decoder.config.fingerprint()
        self.device = decoder.embed.weight.device
        self._decoder, self._parallel, self._source = decoder, parallel, source
        if decoder.config.mask_token_id != mask_token_id:
            generator = torch.Generator().manual_seed(config.seed)
            row_H = torch.randn(decoder.config.hidden_size, generator=generator)
            with torch.no_grad():
                decoder.embed.weight[mask_token_id] = row_H * _token_scale(decoder)
            decoder.config = replace(decoder.config, mask_token_id=mask_token_id)
        self.parameters = sum(p.numel() for p in decoder.parameters())
        self.objective: Objective = FullObjective(decoder, config, dtype)
        shard(decoder, parallel.mesh(self.device), dtype)
        group = Group(dict(decoder.named_parameters()), config.lr)
        self.optimizer: Optimizer = Optimizer([group], config)

    def result(self) -> Decoder | None:
        """The trained decoder in bf16, on the CPU, in the main process; called by all."""
        weights = {}
        for name, average in self.optimizer.averages.items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if self._parallel.main:
                weights[name] = whole.detach().to("cpu", torch.bfloat16)
        if not self._parallel.main:
            return None
        with torch.device("meta"):
            decoder = Decoder(self._decoder.config)
        decoder.load_state_dict(weights, assign=True)
        return decoder

    def save(self, folder: Path) -> None:
        """Write the model in Hugging Face form."""
        decoder = self.result()
        if decoder is not None:
            save_checkpoint(decoder, folder, self._source, self._decoder.config.mask_token_id)


def _fill(adapter: Adapter, folder: Path, decoder: Decoder) -> None:
    """Give ``adapter`` the weights of the one in ``folder``."""
    given = Adapter.load(
        folder, decoder.config, device=torch.device("cpu"), dtype=torch.float32
    ).share_embedding(decoder.embed.weight)
    for name in ("rank", "alpha", "projections", "head_width", "head_depth"):
        own, theirs = getattr(adapter.config, name), getattr(given.config, name)
        if own != theirs:
            raise InvalidRequestError(
                f"The adapter in {folder} has {name} {theirs!r}, not {own!r}; set "
                f"--{name.replace('_', '-')} as it has it, or train a new one."
            )
    adapter.load_state_dict(given.state_dict())


def _share_of_memory(decoder: Decoder) -> float:
    """Share of its device's memory that the weights take."""
    device = decoder.embed.weight.device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = psutil.virtual_memory().total
    return sum(p.numel() * p.element_size() for p in decoder.parameters()) / total


def _token_scale(decoder: Decoder) -> float:
    """Root mean square of the embeddings.

    A mask has to enter the residual stream at the scale of a token: much smaller, and its gradient
    (through the first norm) would be as much too large.
    """
    return decoder.embed.weight.detach().float().square().mean().sqrt().item()
