"""Prompts for the default model."""

from __future__ import annotations

from pathlib import Path

from idlm.model.tokenizer import Tokenizer

TASKS = (
    "Explain in a few sentences what {} is.",
    "Write a short story about {}.",
)
TOPICS = ("rain", "a lighthouse", "gravity", "bread")


def prompts(model: Path) -> list[list[int]]:
    """Eight requests, as the model's chat template writes them."""
    tokenizer = Tokenizer.load(model)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": task.format(topic)}])
        for task in TASKS
        for topic in TOPICS
    ]
