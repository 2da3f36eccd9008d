"""Registration with Gymnasium: `gymnasium.make("vdm_env/MovingShapes-HPS-v0")` and `gymnasium.make_vec(...)`.

Entry points are strings, so registering imports neither a network nor torchrl. Gymnasium has no plug-in mechanism of
its own: import `vdm_env` first, or write `gymnasium.make("vdm_env:vdm_env/MovingShapes-HPS-v0")`. Its ids allow
neither "+" nor "*"; for several rewards pass `reward={"HPS": 1.0, "Aesthetic": 0.1}`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from vdm_env.env import DenoisingVectorEnv
    from vdm_env.single import DenoisingEnv

NAMESPACE = "vdm_env"


def register_envs(ids: Iterable[str]) -> None:
    """Registers `vdm_env/<id>-v0` for each id, unless it is there already."""
    for env_id in ids:
        name = f"{NAMESPACE}/{env_id}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point="vdm_env.gym:make_single",
                vector_entry_point="vdm_env.gym:make_vector",
                kwargs={"env_id": env_id},
            )


def make_single(
    env_id: str,
    *,
    render_mode: str | None = None,
    observe_embedding: bool = True,
    action_bound: float | None = None,
    **options: Any,
) -> DenoisingEnv:
    """What `gymnasium.make` calls: the single numpy env; `options` as in `vdm_env.make`."""
    from vdm_env.making import make
    from vdm_env.single import DenoisingEnv

    refused = sorted({"num_envs", "group_size", "api"} & set(options))
    if refused:
        raise ValueError(
            f"{refused} do not fit a single env; use gymnasium.make_vec or vdm_env.make for several videos"
        )
    env = make(env_id, render_mode=render_mode, **options)
    return DenoisingEnv(env, observe_embedding=observe_embedding, action_bound=action_bound)


def make_vector(env_id: str, *, num_envs: int = 1, **options: Any) -> DenoisingVectorEnv:
    """What `gymnasium.make_vec` calls: the torch-native vector env; `options` as in `vdm_env.make`."""
    from vdm_env.making import make

    if "api" in options:
        raise ValueError("api does not fit gymnasium.make_vec; use vdm_env.make(..., api='torchrl')")
    return make(env_id, num_envs=num_envs, **options)
