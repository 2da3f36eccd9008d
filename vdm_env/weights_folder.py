"""Folders of this machine where weights of models and rewards may lie, beside the hub's local cache."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "VDM_WEIGHTS"


def given_root() -> Path | None:
    """What VDM_WEIGHTS names, or None."""
    value = os.environ.get(VARIABLE)
    return Path(value).expanduser() if value else None


def home() -> Path:
    """This package's own folder: VDM_WEIGHTS if it is a folder, else `vdm_env/weights` in the user's cache."""
    root = given_root()
    return root if root is not None and root.is_dir() else user_cache()


def user_cache() -> Path:
    """`vdm_env/weights` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdm_env" / "weights"


def home_to_write() -> Path:
    """`home()`, or the user's cache where that may not be written to, as on a shared disk."""
    return home() if os.access(home(), os.W_OK) else user_cache()
