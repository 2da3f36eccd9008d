"""The denoising process of video diffusion models as a reinforcement-learning environment.

    from vdm_env import make
    env = make("MovingShapes-HPS", num_envs=4)

Importing this registers `vdm_env/<Model>-<Reward>-v0` with Gymnasium, as strings: no network code is imported for it.
"""

from vdm_env.checker import check_env_spec, check_model, check_reward
from vdm_env.env import DenoisingVectorEnv
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.gym import register_envs
from vdm_env.making import make
from vdm_env.mdp import DenoisingMDP
from vdm_env.policy import DenoisingPolicy, MeanNormal
from vdm_env.prompt_sets import list_prompt_sets, read_prompts
from vdm_env.registry import list_envs, list_models, list_rewards, register_model, register_reward
from vdm_env.rewards import Reward, RewardContext

__version__ = "0.1.0"

__all__ = [
    "CorruptWeightsError",
    "DenoisingMDP",
    "DenoisingPolicy",
    "DenoisingVectorEnv",
    "MeanNormal",
    "MissingWeightsError",
    "Reward",
    "RewardContext",
    "check_env_spec",
    "check_model",
    "check_reward",
    "list_envs",
    "list_models",
    "list_prompt_sets",
    "list_rewards",
    "make",
    "read_prompts",
    "register_model",
    "register_reward",
]

register_envs(list_envs())
