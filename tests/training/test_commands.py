"""`idlm synthesize` and `idlm convert` on a tiny model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from idlm.cli import convert, synthesize
from idlm.errors import InvalidRequestError
from idlm.model.adapter import load_adapter_config
from idlm.model.checkpoint import load_config


def run(*argv: str) -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    synthesize.add_parser(subparsers)
    convert.add_parser(subparsers)
    args = parser.parse_args(argv)
    args.run(args)


CONVERT = (
    *("--batch", "2", "--length", "192", "--anchors", "16", "--rank", "4", "--alpha", "8"),
    *("--head-width", "16", "--eval-rows", "2", "--log-every", "2", "--projections", "o,down"),
)
SHORT = ("--slots", "16", "--max-length", "100", "--max-user", "60", "--max-answer", "30")


def test_convert_from_data(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    command = ("convert", str(model_dir), "-o", str(out), "--data", str(data_dir), *CONVERT)
    run(*command, "--steps", "4", "--name", "tiny")
    config = load_adapter_config(out)
    assert (config.rank, config.projections, config.block_size) == (4, ("o", "down"), 7)
    for name in ("adapter_model.safetensors", "sampler_head.safetensors"):
        assert all(t.dtype == torch.bfloat16 for t in load_file(out / name).values())
    card = (out / "README.md").read_text()
    assert "# Adapter for tiny" in card
    results = json.loads((out / "results.json").read_text())
    assert len(results["greedy"]) == len(results["sampled"]) == config.block_size
    assert all(f"{name}: {value:.2f}" in card for name, value in results["tpf"].items())
    assert yaml.safe_load((out / "train_config.yaml").read_text())["steps"] == 4
    records = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [2, 4]
    # The same command again has nothing left to train.
    run(*command, "--steps", "4", "--name", "tiny")
    records = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [2, 4]


def test_convert_from_conversations(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "chat.jsonl", tmp_path / "out"
    turns = [("user", "Why {}?"), ("assistant", "The fox number {} jumps over the dog.")]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": t.format(i)} for r, t in turns]}) + "\n"
            for i in range(30)
        )
    )
    run("convert", str(model_dir), "-o", str(out), "--data", str(path), *CONVERT, "--steps", "1")
    assert load_adapter_config(out).rank == 4
    assert "  records: 30\n" in capsys.readouterr().err
    path.write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n')
    with pytest.raises(InvalidRequestError, match="can be trained on: dropped: no answer"):
        run("convert", str(model_dir), "-o", str(out), "--data", str(path), "--steps", "1")


def test_convert_to_the_full_kind(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    run(
        *("convert", str(model_dir), "-o", str(out), "--data", str(data_dir), "--kind", "full"),
        *("--mask-token", "<|endoftext|>", "--steps", "4", "--batch", "2", "--length", "192"),
        *("--anchors", "16", "--eval-rows", "2", "--log-every", "2", "--name", "tiny"),
    )
    assert load_config(out).mask_token_id == 0
    assert "# I-DLM of tiny" in (out / "README.md").read_text()
    written = yaml.safe_load((out / "train_config.yaml").read_text())
    assert (written["kind"], written["block_size"]) == ("full", 3) and "rank" not in written


def test_convert_synthesises_first(model_dir: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("steps: 9\nseed: 3\n")
    run(
        *("convert", str(model_dir), "-o", str(tmp_path / "out"), "--tokens", "300", *SHORT),
        *(*CONVERT, "--config", str(settings), "--steps", "1"),
    )
    assert list((tmp_path / "out" / "data").glob("train-*.parquet"))
    written = yaml.safe_load((tmp_path / "out" / "train_config.yaml").read_text())
    assert (written["steps"], written["seed"]) == (1, 3)


def test_bad_input_is_refused_before_any_work(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidRequestError, match="--minutes"):
        run("convert", str(model_dir), "-o", str(out))
    with pytest.raises(InvalidRequestError, match="no free token"):
        run("convert", str(model_dir), "-o", str(out), "--kind", "full", "--steps", "1")
    with pytest.raises(InvalidRequestError, match="belongs to the full kind"):
        run("convert", str(model_dir), "-o", str(out), "--clean-weight", "2", "--steps", "1")
    with pytest.raises(InvalidRequestError, match="device"):
        run("synthesize", str(model_dir), "-o", str(out), "--device", "cuda:77")
    with pytest.raises(InvalidRequestError, match="--max-answer"):
        run("synthesize", str(model_dir), "-o", str(out), "--max-answer", "900")
    assert not out.exists()


def test_synthesize_answers_to_prompts(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    command = ("synthesize", str(model_dir), "-o", str(out), "--tokens", "600", *SHORT)
    with pytest.raises(InvalidRequestError, match=r"prompts\.txt cannot be read"):
        run(*command, "--prompts", str(path))
    path.write_text("Why?\nTell me about the fox.\n")
    run(*command, "--prompts", str(path))
    assert list(out.glob("train-*.parquet"))
    written = capsys.readouterr().err
    assert " of 600 tokens (" in written and " tokens/s" in written
    assert "  documents: " in written


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("500k", 500_000), ("20M", 20_000_000), ("1.5b", 1_500_000_000)]
)
def test_count(text: str, number: int) -> None:
    assert synthesize.count(text) == number


def test_count_rejects_words() -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        synthesize.count("many")


def test_help_needs_no_torch() -> None:
    code = "import sys; from idlm.cli import convert, synthesize; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
