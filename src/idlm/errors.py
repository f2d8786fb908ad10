"""Errors that a user can act on: one message that names the cause and the remedy."""

import re


class IdlmError(Exception):
    """Base of every error that idlm raises on purpose."""


class UnsupportedModelError(IdlmError):
    """The model's architecture, or a feature that it uses, is not implemented."""


class CheckpointError(IdlmError):
    """A model or adapter on disk is missing, truncated or malformed."""


class AdapterMismatchError(IdlmError):
    """The adapter was made for another base model."""


class InvalidRequestError(IdlmError, ValueError):
    """A prompt or a parameter is out of range."""


class ResourceError(IdlmError):
    """The machine lacks what is needed: memory, disk space, a device, the network."""


def first_words(error: IdlmError) -> str:
    """What an error says, without details and remedy, to count errors of one kind by."""
    return re.split(r" \(|[.:;]", str(error))[0]
