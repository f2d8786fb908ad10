"""Entry point of SGLang's plug-in group ``sglang.srt.plugins``."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from idlm.integrations.sglang import host, published
from idlm.integrations.sglang.options import NAME, configure
from idlm.integrations.sglang.requests import check_request


def register() -> None:
    """Add the algorithm ``IDLM``; called by SGLang at the start of each of its processes."""
    if not host.supported():
        SpeculativeAlgorithm.register(
            NAME, supports_overlap=True, validate_server_args=host.refuse
        )(_worker)
        return
    SpeculativeAlgorithm.register(
        NAME, supports_overlap=True, validate_server_args=configure, spec_class=host.Algorithm
    )(_worker)
    published.register()
    HookRegistry.register(host.ALIAS, _draft_path_is_no_model, HookType.AROUND)
    HookRegistry.register(host.DRAFT_KV, _no_draft_kv, HookType.AROUND)
    HookRegistry.register(host.VALIDATION, _check, HookType.BEFORE)
    for target, function in host.AFTER.items():
        HookRegistry.register(target, function, HookType.AFTER)


def _worker(server_args: Any) -> type:
    # Imported in the scheduler's processes only: it needs the model's layers.
    from idlm.integrations.sglang.worker import Worker

    return Worker


def _draft_path_is_no_model(original: Any, algorithm: str | None, *args: Any, **kw: Any) -> Any:
    """Keep the host from reading our adapter's folder as that of a draft model."""
    return NAME if algorithm == NAME else original(algorithm, *args, **kw)


def _no_draft_kv(original: Any, *, draft_worker: Any, spec_algorithm: Any, **kw: Any) -> Any:
    """There is no draft model, hence no cache of one."""
    if spec_algorithm.name == NAME:
        return None
    return original(draft_worker=draft_worker, spec_algorithm=spec_algorithm, **kw)


def _check(manager: Any, request: Any, *args: Any, **kw: Any) -> None:
    if manager.server_args.speculative_algorithm == NAME:
        check_request(request, manager.preferred_sampling_params)
