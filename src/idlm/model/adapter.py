"""What conversion adds to a base model: gated LoRA, mask embedding and sampler head.

All three act on mask rows only. PEFT's file format for the LoRA; safetensors throughout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from idlm.errors import AdapterMismatchError, CheckpointError
from idlm.model.config import ModelConfig
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cuda import head as cuda_head
from idlm.model.files import write_json, write_safetensors
from idlm.model.peft_config import PEFT_CONFIG_FILE, PeftConfig

# The fused projections of a layer and the modules (names as in transformers and PEFT) they join.
FUSED_MODULES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
MODULE_PARENT = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}

CONFIG_FILE = "idlm_config.json"
HEAD_FILE = "sampler_head.safetensors"
LORA_FILE = "adapter_model.safetensors"
# The figures of the card, for programs.
RESULTS_FILE = "results.json"
FORMAT_VERSION = 1
# The adapters that the authors of arXiv 2604.11035 published are LoRAs for Qwen3 and nothing else:
# for stride 4, with masks that are an id which Qwen3 does not use.
PUBLISHED_BLOCK_SIZE = 3
PUBLISHED_MASK_TOKEN = 151669
PUBLISHED_FOR = ("qwen3", "sdar")


def module_shapes(config: ModelConfig, fused: str) -> tuple[int, tuple[int, ...]]:
    """Input width of a fused projection and the output width of each module in it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": (hidden, (q, kv, kv)),
        "o": (q, (hidden,)),
        "gate_up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }[fused]


@dataclass(frozen=True)
class AdapterConfig:
    """Shapes of an adapter and the base model it belongs to.

    Attributes:
        rank: rank of every low-rank update.
        alpha: the update is scaled by ``alpha / rank``.
        projections: fused projections that carry a LoRA (keys of `FUSED_MODULES`).
        block_size: longest mask block seen in training (stride - 1).
        head_width: inner width of the sampler head's blocks; 0: no head.
        head_depth: blocks of the sampler head; 0: no head.
        base_fingerprint: `ModelConfig.fingerprint` of the base model; None: not known.
        base_model: name of the base model, for people.
    """

    rank: int
    alpha: float
    projections: tuple[str, ...]
    block_size: int
    head_width: int
    head_depth: int
    base_fingerprint: str | None
    base_model: str

    def __post_init__(self) -> None:
        least = {"rank": 1, "block_size": 1, "head_width": 0, "head_depth": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} is {value!r}, not a whole number from {minimum}")
        if (self.head_width == 0) != (self.head_depth == 0):
            raise ValueError("of head_width and head_depth only one is 0")
        if unknown := set(self.projections) - FUSED_MODULES.keys():
            raise ValueError(f"projections names {sorted(unknown)}, not only {list(FUSED_MODULES)}")


class LoraLinear(nn.Module):
    """Low-rank updates of the modules in one fused projection.

    The down-projections ``A`` of all modules are one product; so are the up-projections ``B``, with
    a block-diagonal weight (on the CPU without its zeros: `cpu_stack`).
    """

    def __init__(self, in_features: int, out_features: tuple[int, ...], rank: int, scale: float):
        super().__init__()
        self.rank, self.scale = rank, scale
        self.A = nn.Parameter(torch.empty(len(out_features) * rank, in_features))
        self.B = nn.ParameterList(torch.zeros(out, rank) for out in out_features)
        nn.init.normal_(self.A, std=in_features**-0.5)
        self._up_OZ: torch.Tensor | None = None

    def freeze(self) -> None:
        """Build the block-diagonal ``B`` once, for inference."""
        self._up_OZ = self._up().detach()

    def add_to(self, y_BRO: torch.Tensor, x_BRI: torch.Tensor, num_masks: int) -> torch.Tensor:
        """``y`` with the update added to its last ``num_masks`` rows; in place if frozen."""
        first = x_BRI.shape[1] - num_masks
        x_BMI = x_BRI[:, first:]
        if self._up_OZ is None:
            update_BMO = F.linear(F.linear(x_BMI, self.A), self._up())
            if first == 0:
                return y_BRO + update_BMO
            return torch.cat((y_BRO[:, :first], y_BRO[:, first:] + update_BMO), dim=1)
        y_BRO[:, first:] += F.linear(F.linear(x_BMI, self.A), self._up_OZ)
        return y_BRO

    def _up(self) -> torch.Tensor:
        return torch.block_diag(*self.B) * self.scale


class SamplerHead(nn.Module):
    """Recurrent head that turns the marginals of a mask block into a chain.

    ``depth`` gated blocks update the state one after the other, each by
    ``s = s + W_o (silu(g) * u)`` with ``[g, u] = W_h h_j + W_e e(x_{j-1}) + W_s norm(s)``. They
    begin with the state of place ``j - 1`` (0 at the first place) and end with ``s_j``; the logits
    of place ``j`` are the model's own output layer applied to ``h_j + s_j`` (after Apple's sampler
    head, arXiv 2507.11851 section 3.3, made recurrent as in ReDrafter, arXiv 2403.09919).
    """

    def __init__(self, hidden_size: int, width: int, depth: int, eps: float) -> None:
        super().__init__()
        self.from_hidden = nn.Linear(hidden_size, depth * 2 * width, bias=True)
        self.from_token = nn.Linear(hidden_size, depth * 2 * width, bias=False)
        self.token_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.blocks = nn.ModuleList(HeadBlock(hidden_size, width, eps) for _ in range(depth))

    def project(self, hidden_BMH: torch.Tensor) -> torch.Tensor:
        """The share of the mask rows' hidden states, for all places of the block at once."""
        return _linear(hidden_BMH, self.from_hidden)

    def step(
        self, projected_BW: torch.Tensor, token_BH: torch.Tensor, state_BH: torch.Tensor
    ) -> torch.Tensor:
        """The state ``s_j`` from place ``j``'s projection, ``e(x_{j-1})`` and ``s_{j-1}``."""
        if not torch.is_grad_enabled() and cuda_head.takes(token_BH, self.from_token.weight):
            return cuda_head.step(self, projected_BW, token_BH, state_BH)
        given_BW = projected_BW + _linear(_norm(token_BH, self.token_norm), self.from_token)
        for block, part_BW in zip(self.blocks, given_BW.chunk(len(self.blocks), -1), strict=True):
            state_BH = block(part_BW, state_BH)
        return state_BH


class HeadBlock(nn.Module):
    """One gated update of the sampler head's state."""

    def __init__(self, hidden_size: int, width: int, eps: float) -> None:
        super().__init__()
        self.from_state = nn.Linear(hidden_size, 2 * width, bias=False)
        self.state_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, given_BW: torch.Tensor, state_BH: torch.Tensor) -> torch.Tensor:
        state_BW = _linear(_norm(state_BH, self.state_norm), self.from_state)
        gate, up = (given_BW + state_BW).chunk(2, dim=-1)
        return state_BH + _linear(F.silu(gate) * up, self.out)


def _linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    if cpu_kernels.usable(x):
        return cpu_kernels.linear(x, layer.weight, layer.bias)
    return layer(x)


def _norm(x: torch.Tensor, layer: nn.RMSNorm) -> torch.Tensor:
    if cpu_kernels.usable(x) and layer.eps is not None:
        return cpu_kernels.rms_norm(x, layer.weight, layer.eps)
    return layer(x)


class Adapter(nn.Module):
    """Gated LoRA, learned mask embedding and sampler head of a converted model.

    Attributes:
        head: None: a place's logits are those of its mask row alone.
        mask_token_id: the token of the base model whose embedding masks have (`share_embedding`);
            None: they have one of their own.
    """

    def __init__(self, config: AdapterConfig, base: ModelConfig) -> None:
        super().__init__()
        self.config = config
        scale = config.alpha / config.rank
        self.lora = nn.ModuleList(
            nn.ModuleDict(
                {
                    fused: LoraLinear(*module_shapes(base, fused), config.rank, scale)
                    for fused in config.projections
                }
            )
            for _ in range(base.num_layers)
        )
        self.mask_embedding = nn.Parameter(torch.randn(base.hidden_size) * 0.02)
        self.mask_token_id: int | None = None
        self.head: SamplerHead | None = None
        if config.head_width:
            self.head = SamplerHead(
                base.hidden_size, config.head_width, config.head_depth, base.rms_norm_eps
            )

    def layer(self, index: int) -> dict[str, LoraLinear]:
        """The LoRAs of one decoder layer by fused projection."""
        return dict(self.lora[index].items())  # type: ignore[operator]

    @property
    def frozen(self) -> bool:
        """Whether `freeze` has been called."""
        return not self.mask_embedding.requires_grad

    def freeze(self) -> Adapter:
        """Prepare for inference: no gradients, fused up-projections. Returns self."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, LoraLinear):
                module.freeze()
        return self.eval()

    def share_embedding(self, embed_VH: torch.Tensor) -> Adapter:
        """Take the mask embedding from the base model's, if it is one of its. Returns self."""
        if self.mask_token_id is not None:
            self.mask_embedding.data.copy_(embed_VH[self.mask_token_id])
        return self

    def save(self, folder: Path) -> None:
        """Write PEFT's two files, the sampler head and `idlm_config.json` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        c = self.config
        write_safetensors(folder / LORA_FILE, dict(self._peft_tensors()))
        write_safetensors(folder / HEAD_FILE, dict(self._head_tensors()))
        modules = [module for fused in c.projections for module in FUSED_MODULES[fused]]
        PeftConfig(c.rank, c.alpha, c.base_model).write(folder, modules)
        write_json(folder / CONFIG_FILE, {"format": FORMAT_VERSION, **asdict(c)})

    @classmethod
    def load(
        cls, folder: Path, base: ModelConfig, *, device: torch.device, dtype: torch.dtype
    ) -> Adapter:
        """Read an adapter that belongs to ``base``, frozen for inference.

        A folder of PEFT without our files is a LoRA alone; its masks have the embedding of the
        base model's mask token, which `share_embedding` fetches.

        Raises:
            CheckpointError: a file is missing or damaged.
            AdapterMismatchError: made for another base model, or shapes differ.
            UnsupportedModelError: a PEFT adapter that is no plain LoRA.
        """
        config = load_adapter_config(folder)
        if config.base_fingerprint not in (None, base.fingerprint()):
            raise AdapterMismatchError(
                f"The adapter in {folder} was made for another base model ({config.base_model}, "
                f"fingerprint {config.base_fingerprint[:12]}, not {base.fingerprint()[:12]}); "
                "use it with that model, or convert this one."
            )
        adapter = cls(replace(config, base_fingerprint=base.fingerprint()), base)
        given, own = _read(folder / LORA_FILE), dict(adapter._peft_tensors())
        if _is_lora_alone(folder):
            adapter.mask_token_id = _mask_token(base, folder)
            # PEFT may leave out layers, or some of the modules that are one projection here.
            _fill(own, _zeros(own, given) | given, folder)
        else:
            own |= adapter._head_tensors()
            _fill(own, given | _read(folder / HEAD_FILE), folder)
        return adapter.to(device=device, dtype=dtype).freeze()

    def _peft_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, layer in enumerate(self.lora):
            for fused, lora in layer.items():  # type: ignore[operator]
                A_parts = lora.A.split(self.config.rank)
                for module, A, B in zip(FUSED_MODULES[fused], A_parts, lora.B, strict=True):
                    name = _peft_name(index, fused, module)
                    yield f"{name}.lora_A.weight", A
                    yield f"{name}.lora_B.weight", B

    def _head_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "mask_embedding", self.mask_embedding
        if self.head is not None:
            yield from ((f"head.{name}", tensor) for name, tensor in self.head.named_parameters())


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter, ours or a LoRA of PEFT."""
    return (folder / CONFIG_FILE).exists() or (folder / PEFT_CONFIG_FILE).exists()


def load_adapter_config(folder: Path) -> AdapterConfig:
    """Read `idlm_config.json`, or `adapter_config.json` where PEFT's files are all there is.

    Raises:
        CheckpointError: the file is missing or damaged, or of a newer format.
        UnsupportedModelError: a PEFT adapter that is no plain LoRA.
    """
    if _is_lora_alone(folder):
        return _published_config(folder)
    try:
        fields: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
        version = fields.pop("format")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"The adapter in {folder} is of format {version}; upgrade idlm to read it."
            )
        return AdapterConfig(**{**fields, "projections": tuple(fields["projections"])})
    except FileNotFoundError as error:
        raise CheckpointError(
            f"No adapter in {folder}: {CONFIG_FILE} is missing; give the folder that `idlm "
            "convert` wrote."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged ({error}).") from error


def _is_lora_alone(folder: Path) -> bool:
    ours = (folder / CONFIG_FILE).exists() or (folder / HEAD_FILE).exists()
    return (folder / PEFT_CONFIG_FILE).exists() and not ours


def _published_config(folder: Path) -> AdapterConfig:
    """What PEFT's files say; the projections are those that have a module in the weights."""
    peft = PeftConfig.read(folder)
    parts = [name.split(".") for name in _read(folder / LORA_FILE)]
    modules = {part[-3] for part in parts if len(part) > 3}
    return AdapterConfig(
        rank=peft.rank,
        alpha=peft.alpha,
        projections=tuple(f for f, names in FUSED_MODULES.items() if modules.intersection(names)),
        block_size=PUBLISHED_BLOCK_SIZE,
        head_width=0,
        head_depth=0,
        base_fingerprint=None,
        base_model=peft.base_model,
    )


def _zeros(
    own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Updates by nothing, for the modules of ``own`` that have no LoRA in ``given``."""
    there = {_module(name) for name in given}
    return {name: torch.zeros_like(t) for name, t in own.items() if _module(name) not in there}


def _module(name: str) -> str:
    return name.rpartition(".lora_")[0]


@torch.no_grad()
def _fill(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy the tensors ``given`` in ``folder`` into those that an adapter has."""
    if unknown := sorted(own.keys() ^ given.keys()):
        raise AdapterMismatchError(
            f"The tensors in {folder} are not those its config names: {unknown[0]!r} and "
            f"{len(unknown) - 1} more are missing or unexpected; fetch or convert it again."
        )
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise AdapterMismatchError(
                f"{name} in {folder} has shape {tuple(given[name].shape)}, the base model "
                f"needs {tuple(tensor.shape)}; use the model the adapter was made for."
            )
        tensor.copy_(given[name])


def _mask_token(base: ModelConfig, folder: Path) -> int:
    """The mask token of a base model whose adapter brings no mask embedding."""
    if base.mask_token_id is not None:
        return base.mask_token_id
    if base.model_type in PUBLISHED_FOR and base.vocab_size > PUBLISHED_MASK_TOKEN:
        return PUBLISHED_MASK_TOKEN
    raise AdapterMismatchError(
        f"The adapter in {folder} brings no mask embedding ({CONFIG_FILE} is missing), and the "
        "base model has no mask token; add mask_token_id to its config.json, or convert it."
    )


def _peft_name(layer: int, fused: str, module: str) -> str:
    return f"base_model.model.model.layers.{layer}.{MODULE_PARENT[fused]}.{module}"


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}); fetch or convert the adapter again."
        ) from error
