"""Errors of the package's own, one class for each thing a user can do about them."""

from __future__ import annotations


class MissingWeightsError(FileNotFoundError):
    """Pretrained weights are not on this machine.

    The message names the repository and the files, how to fetch them, and an environment that works without them.
    """


class CorruptWeightsError(ValueError):
    """A weight file is there but cannot be used: truncated, damaged, of another architecture, or unsafe to unpickle."""


class DownloadError(RuntimeError):
    """Weights could not be fetched; the message says why and what to do."""


class RemoteRewardError(RuntimeError):
    """A reward that lives elsewhere gave no usable score, after all the attempts it was allowed.

    Nothing was scored and nothing changed: once the server answers again, the same call can be made again.
    """


class ContractError(ValueError):
    """A plugged-in environment, reward or model breaks its contract; the message says where and what to do."""


def expect(condition: bool, message: str) -> None:
    """Raises ContractError with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)
