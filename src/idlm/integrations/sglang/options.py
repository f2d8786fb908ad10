"""How a server is told to use I-DLM, in SGLang's own options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm.decoding.layout import Layout
from idlm.decoding.verify import check_rule
from idlm.errors import InvalidRequestError
from idlm.integrations.sglang.published import as_causal_model

NAME = "IDLM"
VERIFICATION = "IDLM_VERIFICATION"
DEFAULT_STRIDE = 4
BACKENDS = {"cuda": ("triton",), "cpu": ("torch_native",)}

# Settings of the server that are not implemented: name, the values that are, remedy.
_OFF = (None, False)
_UNSUPPORTED = (
    ("pp_size", (1,), "--pp-size 1"),
    ("enable_dp_attention", _OFF, "data parallelism without it"),
    ("enable_lora", _OFF, "a model with the LoRA merged"),
    ("enable_mixed_chunk", _OFF, "no --enable-mixed-chunk"),
    ("enable_two_batch_overlap", _OFF, "no --enable-two-batch-overlap"),
    ("enable_pdmux", _OFF, "no --enable-pdmux"),
    ("enable_strict_thinking", _OFF, "no --enable-strict-thinking"),
    ("attn_cp_size", (1,), "--attn-cp-size 1"),
    ("dcp_size", (1,), "--dcp-size 1"),
    ("enable_torch_compile", _OFF, "no --enable-torch-compile"),
    ("speculative_adaptive", _OFF, "no --speculative-adaptive"),
    ("speculative_eagle_topk", (None, 1), "no --speculative-eagle-topk"),
    ("disaggregation_mode", ("null",), "prefill and decoding in one server"),
)


@dataclass(frozen=True)
class Options:
    """How a server decodes.

    Attributes:
        layout: the rows of one forward, of the linear layout.
        rule: `rejection` or `coupled` (`idlm.decoding.verify`).
        adapter: folder or hub id of an adapter; None: a fully converted model.
    """

    layout: Layout
    rule: str
    adapter: str | None

    @classmethod
    def of(cls, server_args: Any) -> Options:
        """The options in ``server_args``, once `configure` has been through them."""
        return cls(
            Layout.named("linear", server_args.speculative_num_steps + 1),
            check_rule(os.environ.get(VERIFICATION, "rejection")),
            server_args.speculative_draft_model_path,
        )


def configure(server_args: Any) -> None:
    """Check the options of a server and fill in those that follow from others.

    Raises:
        InvalidRequestError: a setting that is not supported, or options that contradict.
    """
    for name, values, remedy in _UNSUPPORTED:
        if (value := getattr(server_args, name)) not in values:
            raise InvalidRequestError(
                f"{NAME} does not support {name}={value!r} in SGLang yet; use {remedy}."
            )
    if server_args.speculative_num_steps is None:
        server_args.speculative_num_steps = DEFAULT_STRIDE - 1
    server_args.speculative_eagle_topk = 1
    layout = Options.of(server_args).layout
    if layout.stride < 2:
        raise InvalidRequestError(
            f"--speculative-num-steps must be at least 1 with {NAME}: it is the stride minus one."
        )
    if server_args.speculative_num_draft_tokens not in (None, layout.num_rows):
        raise InvalidRequestError(
            f"Leave out --speculative-num-draft-tokens: with {server_args.speculative_num_steps} "
            f"steps a forward has {layout.num_rows} rows."
        )
    server_args.speculative_num_draft_tokens = layout.num_rows
    _choose_attention(server_args)
    as_causal_model(server_args)
    _check_ranks(server_args)
    if server_args.max_running_requests is None:
        server_args.max_running_requests = 256
    path = server_args.speculative_draft_model_path
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise InvalidRequestError(
            f"--speculative-draft-model-path {path} is no folder; give that of an adapter."
        )


def _choose_attention(server_args: Any) -> None:
    kind = "cpu" if server_args.device == "cpu" else "cuda"
    if server_args.attention_backend is None:
        server_args.attention_backend = BACKENDS[kind][0]
    backends = {
        server_args.attention_backend,
        server_args.prefill_attention_backend,
        server_args.decode_attention_backend,
    }
    if not backends <= {*BACKENDS[kind], None}:
        raise InvalidRequestError(
            f"{NAME} supports --attention-backend {' or '.join(BACKENDS[kind])} on this device."
        )
    if kind == "cpu":
        server_args.disable_overlap_schedule = True  # as the host's own algorithms do


def _check_ranks(server_args: Any) -> None:
    """Refuse a model that the host cannot cut, where it would fail an assertion (or, on CPUs, pad).

    The host gives each rank the same number of attention heads, heads of keys and values (or
    several ranks the same one) and columns of the feed-forward network.
    """
    ranks = server_args.tp_size
    if ranks == 1:
        return
    model = server_args.get_model_config()
    heads, shared = model.num_attention_heads, model.get_total_num_kv_heads()
    inner = model.hf_text_config.intermediate_size

    def fits(n: int) -> bool:
        return not (heads % n or inner % n or (shared % n and n % shared))

    if not fits(ranks):
        raise InvalidRequestError(
            f"--tp-size {ranks} does not divide this model: it has {heads} attention heads, "
            f"{shared} of keys and values, and an inner width of {inner}. Use "
            f"{', '.join(str(n) for n in range(1, heads + 1) if fits(n))}, or whole replicas "
            "(--dp-size)."
        )
