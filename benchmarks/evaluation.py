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
        guidance_scale: of the policy during an evaluation, with the guidance_interval in `changes` or else the
            environment's; None: both are as the policy has them.
        changes: see `env.derive`.

    Raises:
        ValueError: an unknown split or reward, one that is optimised, or prompts that the world's gold score cannot
            judge.
    """
    import algos
    from algos.measures import default_features

    found: list[Any] = []
    rewards, features = _heldout(env, heldout), default_features(env)
    if guidance_scale is not None:
        changes["guidance_scale"] = guidance_scale
    for place, split in enumerate(splits):
        held_out = env.derive(split=split, group_size=1, decode_frames=None, **changes)
        prompt_ids = spread(held_out.prompt_ids(split), num_prompts)
        check_captions(held_out, prompt_ids)
        evaluator = algos.Evaluator(
            held_out,
            prompt_ids,
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


def check_captions(env: Any, prompt_ids: Sequence[int]) -> None:
    """Refuses prompts of an evaluation that the gold score of an embedded world would refuse.

    Raises:
        ValueError: one that is no caption of the world.
    """
    if env.model.spec.world is None:
        return
    from vdm_env.worlds.moving_shapes.render import parse_caption

    for number in prompt_ids:
        try:
            parse_caption(env.prompts[number])
        except ValueError as error:
            raise ValueError(
                f"the gold score cannot judge a prompt of the evaluation: {error}. Evaluate on captions of the world; "
                "training prompts may be others"
            ) from error


class AtGuidance:
    """An evaluator that samples with the guidance of its own environment, whatever the policy trains with."""

    def __init__(self, evaluator: Any, guidance_scale: float) -> None:
        self.evaluator, self.guidance_scale = evaluator, float(guidance_scale)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.evaluator, name)

    def evaluate(self, policy: Any, *given: Any, **options: Any) -> Any:
        """See `algos.Evaluator.evaluate`."""
        trained_with = policy.guidance_scale, policy.guidance_interval
        policy.guidance_scale = self.guidance_scale
        policy.guidance_interval = self.evaluator.env.config.guidance_interval
        try:
            return self.evaluator.evaluate(policy, *given, **options)
        finally:
            policy.guidance_scale, policy.guidance_interval = trained_with


def spread(prompt_ids: Sequence[int], count: int) -> list[int]:
    """At most `count` of the prompts, evenly spread, because neighbours resemble each other."""
    if count >= len(prompt_ids):
        return list(prompt_ids)
    return [prompt_ids[place * len(prompt_ids) // count] for place in range(count)]
