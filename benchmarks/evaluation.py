"""The evaluators of a run: fixed prompts and noise of each split, and all that is measured beside the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NUM_VIDEOS = 6


def evaluators(
    env: Any,
    splits: Sequence[str],
    *,
    num_prompts: int,
    noise_seeds: Sequence[int],
    heldout: Sequence[str] = (),
    num_videos: int = NUM_VIDEOS,
    guidance_scale: float | None = None,
    **changes: Any,
) -> tuple[Any, ...]:
    """An evaluator for each split; the first keeps videos.

    Args:
        env: the training environment, on whose networks they work.
        splits: names of prompts.
        num_prompts: of each split, spread over it.
        noise_seeds: videos of each prompt.
        heldout: names of rewards that are never optimised; an embedded world gives its own ones.
        num_videos: prompts of the first split whose first video is kept.
        guidance_scale: of the policy during an evaluation; None: as it is.
        changes: see `env.derive`.

    Raises:
        ValueError: an unknown split or reward, or one that is optimised.
    """
    import algos
    from algos.measures import default_features

    found: list[Any] = []
    rewards, features = _heldout(env, heldout), default_features(env)
    for place, split in enumerate(splits):
        held_out = env.derive(split=split, group_size=1, decode_frames=None, **changes)
        evaluator = algos.Evaluator(
            held_out,
            spread(held_out.prompt_ids(split), num_prompts),
            noise_seeds,
            num_videos=0 if place else num_videos,
            heldout=rewards,
            features=features,
        )
        found.append(evaluator if guidance_scale is None else AtGuidance(evaluator, guidance_scale))
    return tuple(found)


def _heldout(env: Any, names: Sequence[str]) -> dict[str, Any]:
    """Rewards by name.

    Raises:
        ValueError: an unknown name, or a reward that is optimised.
    """
    from algos.measures import heldout_rewards

    optimised = {term.rpartition("*")[2] for term in env.mdp.reward.name.split("+")}
    for name in names:
        if name in optimised:
            raise ValueError(f"held-out reward {name!r} is optimised by {env.config.id}, so it is not held out")
    return heldout_rewards(env, names)


class AtGuidance:
    """An evaluator that samples with a guidance scale of its own, whatever the policy trains with."""

    def __init__(self, evaluator: Any, guidance_scale: float) -> None:
        self.evaluator, self.guidance_scale = evaluator, float(guidance_scale)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.evaluator, name)

    def evaluate(self, policy: Any, *given: Any, **options: Any) -> Any:
        """See `algos.Evaluator.evaluate`."""
        trained_with, policy.guidance_scale = policy.guidance_scale, self.guidance_scale
        try:
            return self.evaluator.evaluate(policy, *given, **options)
        finally:
            policy.guidance_scale = trained_with


def spread(prompt_ids: Sequence[int], count: int) -> list[int]:
    """At most `count` of the prompts, evenly spread, because neighbours resemble each other."""
    if count >= len(prompt_ids):
        return list(prompt_ids)
    return [prompt_ids[place * len(prompt_ids) // count] for place in range(count)]
