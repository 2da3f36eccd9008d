"""Errors about weight files, one class for each thing a user can do about them."""

from __future__ import annotations


class MissingWeightsError(FileNotFoundError):
    """Pretrained weights are not on this machine.

    The message names the repository and the files, how to fetch them, and an environment that works without them.
    """


class CorruptWeightsError(ValueError):
    """A weight file is there but cannot be used: truncated, damaged, of another architecture, or unsafe to unpickle."""


class ContractError(ValueError):
    """A plugged-in environment, reward or model breaks its contract; the message says where and what to do."""


def expect(condition: bool, message: str) -> None:
    """Raises ContractError with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)
