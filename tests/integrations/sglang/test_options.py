"""How SGLang takes the plug-in up, and what it refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative import spec_registry

from idlm.errors import InvalidRequestError, UnsupportedModelError
from idlm.integrations.sglang import host, plugin
from idlm.integrations.sglang.requests import check_request
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    load_plugins()
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama", intermediate_size=64)


def server_args(model: Path, **options: Any) -> ServerArgs:
    """SGLang's own options of a server, once they have been through all checks."""
    given: dict[str, Any] = {"device": "cpu", "attention_backend": "torch_native"}
    given |= {"disable_cuda_graph": True, "speculative_algorithm": "IDLM"}
    return ServerArgs(model_path=str(model), **given | options)


def test_what_follows_from_a_servers_options(model: Path) -> None:
    args = server_args(model, speculative_num_steps=2)
    assert args.speculative_num_draft_tokens == 5
    assert args.speculative_eagle_topk == 1
    assert args.max_running_requests == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "enable_lora=True"),
        ({"pp_size": 2}, "pp_size=2"),
        ({"enable_mixed_chunk": True}, "enable_mixed_chunk=True"),
        ({"enable_strict_thinking": True}, "enable_strict_thinking=True"),
        ({"dcp_size": 2}, "dcp_size=2"),
        ({"attention_backend": "flashinfer"}, "--attention-backend torch_native"),
        ({"speculative_num_steps": 0}, "at least 1"),
        ({"speculative_num_draft_tokens": 4}, "a forward has 7 rows"),
        ({"speculative_draft_model_path": __file__}, "is no folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_server_cannot_do_is_refused(
    model: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        server_args(model, **options)


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23"])
def test_other_versions_are_refused(
    model: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec_registry, "_REGISTRY", {})
    monkeypatch.setattr(host, "version", lambda package: version)
    plugin.register()
    with pytest.raises(UnsupportedModelError, match=rf"SGLang 0\.5\.17, not {version}"):
        server_args(model)


def test_all_hooks_found_their_place(model: Path) -> None:
    # The host only logs it when one does not.
    assert {host.ALIAS, host.DRAFT_KV, host.VALIDATION, *host.AFTER} <= HookRegistry._patched


@pytest.mark.parametrize(
    ("request_fields", "preferred"),
    [
        ({"return_logprob": True}, None),
        ({"max_thinking_tokens": 9}, None),
        ({"positional_embed_overrides": [[0.0]]}, None),
        ({"sampling_params": {"regex": "a+"}}, None),
        ({}, {"min_new_tokens": 3}),
    ],
)
def test_requests_for_what_it_cannot_do_are_refused(
    request_fields: dict[str, Any], preferred: dict[str, Any] | None
) -> None:
    request = GenerateReqInput(input_ids=[1, 2], **{"sampling_params": {}} | request_fields)
    with pytest.raises(InvalidRequestError, match="IDLM does not support"):
        check_request(request, preferred)
    check_request(GenerateReqInput(input_ids=[1, 2], sampling_params={"top_k": 3}), {"top_p": 0.5})
