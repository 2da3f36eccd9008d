"""Long videos from a model that animates an image: the last frame of a clip is the image that the next one starts from.

One episode makes several clips, one after the other (VADER, arXiv 2407.08737, makes three with Stable Video Diffusion
and rewards the whole). It is the same kind of environment as every other, by the mask in the transition

    x' = m (A_k x + B_k a) + (1 - m) x :

the latents are those of all clips side by side, [B, C, N F, H, W] for N clips of F latent frames, all of them noise at
first. Steps 0 .. S-1 denoise clip 0, steps S .. 2S-1 clip 1, and so on; m is 1 on the clip that is being made and 0 on
the others. So the state is complete (a stored observation can be stepped again), the final latents are the whole video,
and the reward is 0 until the last step and then the score of the joined video.

What the network is conditioned on is part of the observation (as with `observe_embedding=True`): the image in clip 0,
afterwards the last frame of the clip before, decoded and encoded again with noise of its own. It is worked out once for
each clip. Log-probabilities and divergences are over the clip that is being made; actions elsewhere have no influence.

    env = make("SVD-VJEPA", num_envs=2, images="my_pictures")
    long = ContinuationVectorEnv(env, clips=3)

Clip 0 has the noise of a single video with the same seed, so with a deterministic sampler it is that video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from vdm_env import noise
from vdm_env.config import EnvConfig
from vdm_env.env import DenoisingVectorEnv
from vdm_env.host import on_host, take, upload
from vdm_env.mdp import DenoisingMDP
from vdm_env.models.base import Condition
from vdm_env.models.continued import CLIP, ContinuationModel
from vdm_env.rewards.base import FramePolicy
from vdm_env.transition import TransitionTable


class ContinuationMDP(DenoisingMDP):
    """The process of N clips; see the module. Arguments as in `DenoisingMDP`, for a `ContinuationModel`.

    Args:
        single: the process of one clip, on the same networks.
        keep_graph: whether gradients pass from a clip through its last frame into the next clip's condition.
    """

    model: ContinuationModel

    def __init__(self, *arguments: Any, single: DenoisingMDP, keep_graph: bool, **options: Any) -> None:
        self.single, self.keep_graph = single, keep_graph
        super().__init__(*arguments, **options)

    @property
    def clips(self) -> int:
        """N."""
        return self.model.clips

    @property
    def steps_per_clip(self) -> int:
        """S."""
        return self.num_steps // self.clips

    def make_table(self, num_steps: int, sampler: str, noise_level: float | Sequence[float] | None) -> TransitionTable:
        """The base table for each clip in turn; noise levels are S numbers for every clip, or N S for all."""
        clips = self.model.clips
        levels: list[Any] = [noise_level] * clips
        if isinstance(noise_level, Sequence) and len(noise_level) == clips * num_steps and clips > 1:
            levels = [noise_level[c * num_steps : (c + 1) * num_steps] for c in range(clips)]
        tables = [super(ContinuationMDP, self).make_table(num_steps, sampler, level) for level in levels]
        columns: dict[str, Any] = {
            name: torch.cat([getattr(table, name) for table in tables])
            for name in ("A", "B", "sigma", "timesteps", "x0_A", "x0_B", "input_scale")
        }
        dt = None if tables[0].dt is None else torch.cat([table.dt for table in tables])  # type: ignore[misc]
        return TransitionTable(**columns, dt=dt, name=tables[0].name)

    def clip_of(self, step: Tensor) -> Tensor:
        """The clip that is made at steps [B]; of a finished video the last."""
        return (step // self.steps_per_clip).clamp(max=self.clips - 1)

    def free(self, step: Tensor) -> Tensor:
        """The mask m of steps [B]: bool [B,1,N F,1,1], True on the clip that is being made."""
        frames = self.latent_shape[1] // self.clips
        number = torch.arange(self.latent_shape[1], device=step.device) // frames
        return (number == self.clip_of(step)[:, None])[:, None, :, None, None]

    def initial_latents(self, video_seeds: Tensor) -> Tensor:
        """Noise of every clip, each keyed by itself."""
        channels, frames, *size = self.latent_shape
        shape = (channels, frames // self.clips, *size)
        drawn = [noise.normal(video_seeds, noise.of_clip(noise.INITIAL, c), shape) for c in range(self.clips)]
        return upload(torch.cat(drawn, dim=2), self.device, self.dtype) * self.schedule.init_sigma

    def step(self, x: Tensor, a: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        free = upload(self.free(k), x.device)
        return super().step(x, a, k, free if mask is None else free * mask)

    def x0(self, x: Tensor, a: Tensor, step: Tensor) -> Tensor:
        """Clean latents of the clip in the making; earlier clips are clean already, later ones still noise."""
        return torch.where(upload(self.free(step), x.device), super().x0(x, a, step), x)

    def action_scale(self, obs: Mapping[str, Tensor]) -> Tensor:
        """[B,1,N F,1,1]: `action_std` on the clip in the making, 0 elsewhere."""
        scale = obs["action_std"].view(-1, 1, 1, 1, 1)
        return torch.where(self.free(obs["step"]), scale, torch.zeros_like(scale))

    def condition_of(self, obs: Mapping[str, Tensor]) -> Condition:
        """What the observation says; worked out from its latents where it does not."""
        names = self.unconditional(1).keys()
        keys = set(obs.keys())
        return {name: obs[name] for name in names} if keys.issuperset(names) else self.work_out(obs)

    def work_out(self, obs: Mapping[str, Tensor]) -> Condition:
        """Condition of these states from latents [B,C,N F,H,W], step, prompt_id and video_seed."""
        clip = self.clip_of(on_host(obs["step"]))
        batch = len(clip)
        found: Condition = {}
        for c in sorted(set(clip.tolist())):
            rows = (clip == c).nonzero().flatten()
            some = take({name: obs[name] for name in ("latents", "prompt_id", "video_seed")}, rows)
            if c == 0:
                part = self.single.condition(some["prompt_id"], some["video_seed"])
            else:
                part = self._continued(some["latents"], c, some["video_seed"])
            rows = upload(rows, self.device)
            for name, value in part.items():
                empty = found.get(name, value.new_zeros(batch, *value.shape[1:]))
                found[name] = empty.index_put((rows,), value)
        return found | {CLIP: upload(clip, self.device)}

    def _continued(self, latents: Tensor, clip: int, video_seeds: Tensor) -> Condition:
        """Condition of a clip after the first."""
        with nullcontext() if self.keep_graph else torch.no_grad():
            before = latents.chunk(self.clips, dim=2)[clip - 1]
            last = torch.full((len(before), 1), self.single.num_frames - 1)
            image = self.model.base.decode(before, last)[:, 0]
            size = (3, self.height, self.width)
            drawn = noise.normal(video_seeds, noise.of_clip(noise.CONDITIONING, clip), size).to(self.device)
            return self.model.encode_images(list(image), drawn)

    def condition(
        self, prompt_ids: Tensor | Sequence[int], video_seeds: Tensor | Sequence[int] | None = None
    ) -> Condition:
        """Of the first clip; it names no clip, so that the network cannot be called with it by mistake."""
        return self.single.condition(prompt_ids, video_seeds)


class ContinuationVectorEnv(DenoisingVectorEnv):
    """N clips in one episode, each starting from the last frame of the one before; see the module.

    Observation, action and everything else as in `DenoisingVectorEnv`, with N F latent frames, N S steps, and the
    condition of the clip in the making in the observation.

    Args:
        env: the environment of one clip (`make("SVD-...")`): networks, reward, images, sampler, number of envs.
        clips: N.
        keep_graph: let gradients pass from a clip through its last frame into the next. Without it the reward's
            gradient reaches every clip through the joined video alone, at less memory.
        decode_frames: which frames of the joined video the reward sees; the policy of `env` if None.

    Raises:
        ValueError: a model that animates no images, less than one clip, or frames that are none of the joined video's.
    """

    def __init__(
        self,
        env: DenoisingVectorEnv,
        clips: int = 3,
        *,
        keep_graph: bool = False,
        decode_frames: FramePolicy | None = None,
    ) -> None:
        if isinstance(clips, bool) or not isinstance(clips, int) or clips < 1:
            raise ValueError(f"clips={clips!r}: expected a whole number of at least 1")
        if not env.mdp.on_images or isinstance(env, ContinuationVectorEnv):
            raise ValueError(
                f"{env.config.id} cannot be continued: that needs an environment whose model animates an image, such "
                "as make('SVD-HPS')"
            )
        self.single, self.clips, self.keep_graph, self._frames = env, clips, keep_graph, decode_frames
        frames, height, width = env.config.size
        model = ContinuationModel(base=env.model, clips=clips, denoiser=env.model.denoiser)
        config = replace(
            env.config,
            id=f"{env.config.id} x{clips}",
            model=model,
            size=(clips * frames, height, width),
            decode_frames=env.config.decode_frames if decode_frames is None else decode_frames,
            observe_embedding=True,
        )
        self._kept: Condition = {}
        self._kept_clip = torch.zeros(env.num_envs, dtype=torch.int64)
        self._stale = torch.ones(env.num_envs, dtype=torch.bool)
        super().__init__(config, env.render_mode)

    def _make_mdp(self, config: EnvConfig, kind: Any = ContinuationMDP) -> DenoisingMDP:
        def build(*arguments: Any, **options: Any) -> DenoisingMDP:
            return kind(*arguments, **options, single=self.single.mdp, keep_graph=self.keep_graph)

        return super()._make_mdp(config, build)

    def _restarted(self, mask: Tensor) -> None:
        self._stale = self._stale | mask

    def _observed_condition(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The condition of each env's clip, worked out when the clip begins and kept until it ends."""
        mdp = self.mdp
        assert isinstance(mdp, ContinuationMDP)
        clip = mdp.clip_of(self._step)
        stale = self._stale | (self._kept_clip != clip)
        if bool(stale.any()):
            rows = stale.nonzero().flatten()
            fresh = mdp.work_out(take(obs, rows))
            rows = upload(rows, self.device)
            if bool(stale.all()):
                self._kept = fresh
            else:
                self._kept = {name: self._kept[name].index_put((rows,), value) for name, value in fresh.items()}
            self._stale, self._kept_clip = torch.zeros_like(stale), clip
        return {name: value.clone() for name, value in self._kept.items()}

    def derive(self, **changes: Any) -> ContinuationVectorEnv:
        """Another environment on the same networks; changes as in `DenoisingVectorEnv.derive`, those of one clip.

        Except `decode_frames`, which are those of the joined video.
        """
        frames = changes.pop("decode_frames", self._frames)
        single = self.single.derive(**changes)
        return ContinuationVectorEnv(single, self.clips, keep_graph=self.keep_graph, decode_frames=frames)

    def to_torchrl(self) -> NoReturn:
        """Refused: TorchRL's actors know one standard deviation a video, and here it holds for one clip only."""
        raise ValueError(
            "a continued video cannot go through TorchRL: its actors take one standard deviation for all frames, which "
            "would give wrong log-probabilities. Use this vector env, or env.single.to_torchrl() for one clip"
        )
