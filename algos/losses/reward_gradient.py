"""Losses of rewards that carry a gradient. B: videos of the batch."""

from __future__ import annotations

from torch import Tensor

from algos.losses.checks import check_vectors, check_videos


def target_l1(reward: Tensor, target: float, scale: float = 1.0) -> Tensor:
    """Distance to a reward that is out of reach.

        L = scale mean_B | R - target |

    Source: Prabhudesai et al. 2024 (VADER, arXiv:2407.08737): aesthetic target 10, scale 0.1; PickScore target 100,
    scale 0.01 (there written |1 - s/100|).

    Args:
        reward: [B], carries the gradient.
        target: in units of the reward.
        scale: > 0, multiplies the gradient (AdamW hardly sees it; gradient clipping does).

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, or scale <= 0.
    """
    check_vectors(reward=reward)
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a number > 0")
    return scale * (reward - target).abs().mean()


def one_minus(reward: Tensor) -> Tensor:
    """For rewards that are similarities with maximum 1.

        L = mean_B (1 - R)

    Source: VADER (arXiv:2407.08737) and AlignProp (arXiv:2310.03739), for HPS.

    Args:
        reward: [B], carries the gradient.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector.
    """
    check_vectors(reward=reward)
    return (1 - reward).mean()


def negative_mean(reward: Tensor) -> Tensor:
    """Plain ascent, for rewards without a natural maximum.

        L = -mean_B R

    Source: Clark et al. 2023 (DRaFT, arXiv:2309.17400).

    Args:
        reward: [B], carries the gradient.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector.
    """
    check_vectors(reward=reward)
    return -reward.mean()


def hinge(reward: Tensor, target: float, scale: float = 1.0) -> Tensor:
    """Distance to a reward that is good enough: no gradient beyond it.

        L = scale mean_B max(0, target - R)

    Source: Xu et al. 2023 (ImageReward, arXiv:2304.05977), ReFL; its released trainer has target 2 and scale 1e-3 for
    ImageReward, which has mean 0 and standard deviation 1.

    Args:
        reward: [B], carries the gradient.
        target: in units of the reward.
        scale: > 0, multiplies the gradient (AdamW hardly sees it; gradient clipping does).

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, or scale <= 0.
    """
    check_vectors(reward=reward)
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a number > 0")
    return scale * (target - reward).clamp(min=0).mean()


def reward_loss(reward: Tensor, kind: str, *, target: float = 0.0, scale: float = 1.0) -> Tensor:
    """One of the losses above, by its name in the configs.

    Args:
        reward: [B], carries the gradient.
        kind: "one_minus", "negative", "target_l1" (of `target` and `scale`) or "hinge" (of `target`).
        target: in units of the reward.
        scale: > 0.

    Raises:
        TypeError, ValueError: reward is not a floating-point vector, scale <= 0, or another name.
    """
    if kind == "one_minus":
        return one_minus(reward)
    if kind == "negative":
        return negative_mean(reward)
    if kind == "target_l1":
        return target_l1(reward, target, scale)
    if kind == "hinge":
        return hinge(reward, target)
    raise ValueError(f"kind is {kind!r}, expected one_minus, negative, target_l1 or hinge")


def temporal_attenuation(frames: Tensor, num_frames: int, rate: float, *, normalised: bool = False) -> Tensor:
    """How much each frame's score counts: most in the middle of the video.

        c_f = exp(-lambda |f - F//2|)

    Not normalised the c_f of one video's frames are what is published, and the reward shrinks as lambda grows;
    normalised they are divided by their mean, so that mean_f c_f r_f is a weighted mean of the r_f.

    Source: Yuan et al. 2023 (InstructVideo, arXiv:2312.12490), temporally attenuated reward; lambda 1 in its released
    configuration (ali-vilab/VGen).

    Args:
        frames: [B,n] integers in 0..F-1, the frames that are scored.
        num_frames: F.
        rate: lambda >= 0, per frame.
        normalised: divide by the mean over n.

    Returns:
        c [B,n], float32, in (0, 1], or with mean 1 for each video.

    Raises:
        TypeError: frames are not integers.
        ValueError: frames are not [B,n] or leave 0..F-1, or rate < 0.
    """
    if not isinstance(frames, Tensor) or frames.is_floating_point() or frames.is_complex():
        given = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames is {given}, expected an integer tensor [B,n]")
    if frames.ndim != 2 or frames.numel() == 0:
        raise ValueError(f"frames has shape {tuple(frames.shape)}, expected [B,n]: the scored frames of each video")
    if int(frames.min()) < 0 or int(frames.max()) >= num_frames:
        raise ValueError(f"frames has {int(frames.min())}..{int(frames.max())}, expected 0..{num_frames - 1}")
    if not rate >= 0:
        raise ValueError(f"rate is {rate}, expected a number >= 0 (InstructVideo: 1; 0: all frames count alike)")
    exponent = -rate * (frames - num_frames // 2).abs().double()
    if normalised:
        return (exponent.softmax(1) * frames.shape[1]).float()
    return exponent.exp().float()


def attenuated_one_minus(score: Tensor, coefficient: Tensor) -> Tensor:
    """Losses of videos whose frames are scored one by one.

        L = mean_B ( 1 - mean_n c_f r_f )

    Source: Yuan et al. 2023 (InstructVideo, arXiv:2312.12490), segmental and temporally attenuated reward.

    Args:
        score: r [B,n] of the frames, carries the gradient.
        coefficient: c [B,n], see `temporal_attenuation`; taken as constant.

    Raises:
        TypeError, ValueError: not floating-point tensors of one shape [B,n].
    """
    check_videos(score=score, coefficient=coefficient)
    return (1 - (coefficient.detach() * score).flatten(1).mean(1)).mean()
