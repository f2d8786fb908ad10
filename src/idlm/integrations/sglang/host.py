"""What depends on the version of SGLang: names to hook into, and what its algorithms lack."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from idlm.errors import UnsupportedModelError
from idlm.integrations.sglang.options import NAME

SUPPORTED = ("0.5.17",)

# The host reads the folder of a draft model to resolve the algorithm's name.
ALIAS = "sglang.srt.arg_groups.speculative_hook._resolve_speculative_algorithm_alias"
# The host looks for the KV cache of a draft model.
DRAFT_KV = "sglang.srt.mem_cache.kv_cache_builder.get_draft_kv_pool"
# Where a request is checked before it is queued: a ValueError is the client's error 400.
VALIDATION = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"


def supported() -> bool:
    """Whether the installed SGLang is one of `SUPPORTED`."""
    return version("sglang") in SUPPORTED


def refuse(server_args: Any) -> None:
    """Stop a server of another version.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"idlm runs inside SGLang {', '.join(SUPPORTED)}, not {version('sglang')}: "
        f"pip install sglang=={SUPPORTED[-1]}, or start without --speculative-algorithm {NAME}."
    )


class Algorithm(CustomSpecAlgo):
    """What the host asks of an algorithm and does not answer for registered ones."""

    def has_draft_kv(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def create_future_map(self, *args: Any, **kw: Any) -> Any:
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(args[0], self, *args[1:], **kw)


def _tables_are_read(result: Any, runner: Any, *args: Any, **kw: Any) -> None:
    """Let the host prepare its next step while the graph of a forward of ours runs.

    It waits for whole forwards, unless it is told when one has read the tables that it goes on to
    change; that is before the graph, and it knows so of its own algorithms only.
    """
    if runner.model_runner.spec_algorithm.name == NAME:
        event = runner.device_module.Event()
        event.record()
        runner.model_runner.war_fastpath_read_done_event = event


def _of_capture(result: Any, runner: Any, num_tokens: int) -> Any:
    return _rows_for_capture(result, runner.model_runner.spec_algorithm, runner.captured_req_width)


def _of_warm_up(
    result: Any, algorithm: Any, server_args: Any, custom_mask: Any, width: int, *rest: Any
) -> Any:
    return _rows_for_capture(result, algorithm, width)


def _rows_for_capture(result: Any, algorithm: Any, width: int) -> Any:
    """CUDA graphs are captured with the spec input that a forward will have."""
    if result is not None or algorithm.name != NAME:
        return result
    from idlm.integrations.sglang.spec_input import Rows

    return Rows(positions=None, draft_token_num=width)


_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
# What is run after functions of the host's.
AFTER = {
    f"{_GRAPHS}.get_spec_info": _of_capture,
    f"{_GRAPHS}.load_batch": _tables_are_read,
    "sglang.srt.speculative.spec_info.create_dummy_verify_input": _of_warm_up,
}
