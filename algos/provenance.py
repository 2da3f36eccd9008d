"""What `run.json` says: with what a run was made, without the names of machines or people."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from algos.meter import finite
from vdm_env.rewards.remote import remote_parts, serving_devices

_PACKAGES = ("numpy", "gymnasium", "diffusers", "transformers", "peft", "safetensors", "torchrl")


def provenance(
    device: torch.device | str, *, processes: int = 1, reward: Any = None, reward_devices: int | None = None
) -> dict[str, Any]:
    """The part of `run.json` that the machine and the software determine; unknown values are None.

    Args:
        device: of the policy.
        processes: that train together, each on a device of its own.
        reward: trained on.
        reward_devices: accelerators that only serve it; None: what it says, see `vdm_env.rewards.remote.remote_parts`.
    """
    device = torch.device(device)
    remote = remote_parts(reward)
    silent = [str(part.name) for part in remote if part.devices is None] if reward_devices is None else []
    if reward_devices is None:
        reward_devices = serving_devices(reward)
    commit = _git("rev-parse", "HEAD")
    return {
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device.type,
        "gpu_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu_name": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "num_gpus_policy": processes if device.type == "cuda" else 0,
        "num_gpus_reward": reward_devices,
        **({"remote_rewards": [str(part.name) for part in remote]} if remote else {}),
        **({"reward_devices_note": _NOT_SAID.format(", ".join(silent))} if silent else {}),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


_NOT_SAID = (
    "The server of {} does not say how many accelerators it holds: none of them is counted in the cost; "
    "give run(reward_devices=...)."
)


def _git(*arguments: str) -> str | None:
    """Output of git in this package's own repository, or None where there is none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository further up would be somebody else's
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def plain(value: Any) -> Any:
    """A config as JSON can hold it: dataclasses become dicts, unknown objects their text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    return value if value is None or isinstance(value, str | int) else str(value)
