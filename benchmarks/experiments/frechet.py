"""Frechet distance of the videos an algorithm trains on to rendered ones, reported by every update.

`Watched` is any algorithm of the zoo with that distance among its numbers, for
`--algo benchmarks.experiments.frechet:Watched`. The features are those of the embedded world's own small VideoMAE (the
action classifier), not of I3D: it is no FVD that other papers' numbers could stand beside. The rendered videos show the
captions of the prompts trained on, and are the same in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RENDERED = 320
"""Rendered videos that the distance is measured to."""
_SEED = 20412


class _Watching:
    """An environment that remembers the videos it finished."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.videos: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: Any) -> Any:
        """See `vdm_env.env.DenoisingVectorEnv.step`."""
        result = self._env.step(action)
        if "video" in result[-1]:
            self.videos.append(result[-1]["video"].detach())
        return result


class Watched:
    """An algorithm of the zoo whose updates report `frechet` beside its own numbers; smaller is better.

    Args:
        env: vector env of an embedded world, whose reward looks at whole videos.
        policy: from `env.make_policy`.
        algo: name in the zoo.
        seed: of the algorithm.
        settings: fields of its config that differ from the model's preset.

    Raises:
        ValueError: an env whose videos are not decoded whole, or without features of its own; whatever the algorithm
            refuses.
    """

    def __init__(self, env: Any, policy: Any, algo: str = "online_vpo", seed: int = 0, **settings: Any) -> None:
        from dataclasses import replace

        from algos import load
        from algos.measures import default_features

        features = default_features(env)
        if features is None or env.mdp.decode_frames != "all":
            raise ValueError(
                f"the Frechet distance is of whole videos of an embedded world, but {env.config.id} decodes "
                f"{env.mdp.decode_frames!r}; take a MovingShapes environment with decode_frames='all'"
            )
        self.features = features
        algorithm, config = load(algo)
        self.watching = _Watching(env)
        self.config = replace(config.preset(env.model.spec.name), **settings, seed=seed)
        self.algorithm = algorithm(self.watching, policy, self.config)
        self.env, self.policy = env, policy
        self.rendered = features(rendered_videos([env.prompts[index] for index in env.prompt_ids()]))

    def update(self) -> dict[str, float]:
        """One update of the algorithm.

        Returns:
            Its numbers, and `frechet` of the videos it sampled if there were two or more.
        """
        from vdm_env.metrics.fvd import frechet_distance

        self.watching.videos.clear()
        row = self.algorithm.update()
        made = [self.features(video) for video in self.watching.videos]
        if sum(map(len, made)) < 2:
            return row
        import torch

        return {**row, "frechet": float(frechet_distance(self.rendered, torch.cat(made)))}

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict()` was taken."""
        self.algorithm.load_state_dict(state)


def rendered_videos(captions: list[str], count: int = RENDERED) -> Tensor:
    """Videos [count,F,3,H,W] in [0,1] that show the captions in turn, the same at every call."""
    import torch

    from vdm_env.worlds.moving_shapes.render import parse_caption, render, sample_scenes

    labels = [parse_caption(captions[index % len(captions)]) for index in range(count)]
    return render(sample_scenes(labels, torch.Generator().manual_seed(_SEED)))
