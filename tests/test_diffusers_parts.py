"""The families that are diffusers pipelines, part by part: autoencoders, prompts, memory, types, Wan 2.2's experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from tests.families import NAMES, PROMPTS, latents, new_tiny, tiny
from vdm_env import make
from vdm_env.models import animatediff, hunyuan_video, wan
from vdm_env.models.parts import all_latents, video_codec

# -------------------------------------------------------------------------------------------------------- autoencoders

LONG = {"LTXVideo": 33, "Mochi": 19, "AnimateDiff": 4, "HunyuanVideo": 33}


@pytest.mark.parametrize("name", NAMES)
def test_chosen_frames_are_those_of_the_whole_video(name: str) -> None:
    model, count = tiny(name), LONG.get(name, 17)
    size = 32 if name in ("Wan2.2_5B", "LTXVideo") else 16
    multiple = max(model.spec.size_multiple, model.spec.spatial_stride)
    size = max(size, multiple)
    z = torch.randn(2, *model.latent_shape(count, size, size), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model.decode(z)
        assert whole.shape == (2, count, 3, size, size) and whole.min() >= 0 and whole.max() <= 1
        for rows in ([[0], [1]], [[2, 0], [5, 3]], [[count - 1, 0], [1, 2]], [[min(13, count - 1)], [0]]):
            chosen = torch.tensor(rows).clamp(max=count - 1)
            want = torch.stack([whole[i, row] for i, row in enumerate(chosen)])
            torch.testing.assert_close(model.decode(z, chosen), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "last", "latents"),
    [
        ("Wan2.1_1.3B", [0, 1, 4, 5, 80], [1, 2, 2, 3, 21]),
        ("Mochi", [0, 1, 6, 7, 18], [1, 2, 2, 3, 4]),
        ("CogVideoX2B", [0, 8, 9, 16, 17, 48], [3, 3, 5, 5, 7, 13]),
        ("HunyuanVideo", [0, 12, 13, 24, 25, 128], [5, 5, 8, 8, 11, 33]),
        ("LTXVideo", [0, 160], [21, 21]),
    ],
)
def test_latents_needed_for_early_frames(name: str, last: list[int], latents: list[int]) -> None:
    codec, total = tiny(name).codec, max(latents)
    assert [codec.needed(codec.vae, total, j) for j in last] == latents
    assert codec.needed(codec.vae, 1, 0) == 1


@pytest.mark.parametrize("name", ["CogVideoX5B", "Wan2.1_1.3B", "HunyuanVideo", "LTXVideo", "Mochi"])
def test_latents_are_normalised_as_published(name: str) -> None:
    model = new_tiny(name)
    vae, spec = model.codec.vae, model.spec
    video = torch.rand(1, spec.num_frames, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mean
        z = model.encode(video)
        if name == "LTXVideo":
            vae.latents_mean.fill_(0.5)
            vae.latents_std.fill_(4.0)
            torch.testing.assert_close(model.encode(video), (raw - 0.5) / 4)
        factor = {"CogVideoX5B": 0.7, "HunyuanVideo": 0.476986}.get(name)
        if factor is not None:
            torch.testing.assert_close(z, raw * factor)
        if name in ("Wan2.1_1.3B", "Mochi"):
            mean, std = (
                torch.tensor(v)[None, :, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std)
            )
            torch.testing.assert_close(z, (raw - mean) / std, atol=1e-5, rtol=1e-4)
            decoded = vae.decode(z * std + mean).sample.transpose(1, 2)
            torch.testing.assert_close(model.decode(z), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert z.shape == (1, *model.latent_shape(spec.num_frames, spec.height, spec.width)) and not z.requires_grad


def test_gradients_reach_latents_through_a_chosen_frame_and_none_behind_it() -> None:
    model = tiny("Wan2.1_1.3B")
    z = torch.randn(1, *model.latent_shape(17, 16, 16), generator=torch.Generator().manual_seed(0)).requires_grad_()
    model.decode(z, torch.tensor([[4]])).sum().backward()
    assert z.grad is not None and bool((z.grad[0, :, :2].abs().amax((0, 2, 3)) > 0).all())
    assert z.grad[0, :, 2:].abs().max() == 0


def test_a_decoder_with_timesteps_is_given_clean_latents() -> None:
    """Later autoencoders of LTX-Video."""
    sizes = {k: v for k, v in tiny("LTXVideo").codec.vae.config.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo(**(sizes | {"timestep_conditioning": True}))
    codec = video_codec(vae, all_latents)
    z = latents(tiny("LTXVideo"))
    with torch.no_grad():
        got = codec.decode(z)
        want = vae.decode(z, torch.zeros(2)).sample.transpose(1, 2)
        other = vae.decode(z, torch.full((2,), 0.5)).sample.transpose(1, 2)
    torch.testing.assert_close(got, (want / 2 + 0.5).clamp(0, 1))
    assert (want - other).abs().max() > 1e-5


def test_tiles() -> None:
    model = new_tiny("Wan2.1_1.3B")
    vae = model.codec.vae
    model.tile_decoding()
    assert vae.use_tiling and vae.use_slicing
    model.tile_decoding(False)
    assert not vae.use_tiling


# ------------------------------------------------------------------------------------------------------------- prompts


def test_padding_of_wan_is_zero() -> None:
    condition = tiny("Wan2.1_1.3B").encode_prompts(["abc", "a  longer&amp;text"])
    assert set(condition) == {"text"} and condition["text"].shape[:2] == (2, 32)
    lengths = [4, len("a longer&text") + 1]  # bytes and the end token, after cleaning
    for row, length in enumerate(lengths):
        assert condition["text"][row, :length].abs().amax(-1).min() > 0
        assert condition["text"][row, length:].abs().max() == 0


def test_encoders_rest_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device for the prompts only, and once for each prompt."""
    model = new_tiny("Mochi")
    encoder, moves = model.text.encoder, []  # type: ignore[attr-defined]
    move = type(encoder).to

    def record(self: torch.nn.Module, *places: object) -> torch.nn.Module:
        moves.append(str(places[0]))
        return move(self, *places)

    monkeypatch.setattr(type(encoder), "to", record)
    env = make(model=model, reward=lambda video, _: video.mean((1, 2, 3, 4)), prompts=PROMPTS, num_envs=2, num_steps=2)
    for _ in range(3):
        env.mdp.condition([0, 1])
    assert moves == ["cpu", "cpu"]  # there and back, a single time
    other = dataclasses.replace(model.text, device=torch.device("meta"))  # type: ignore[type-var]
    with pytest.raises(Exception, match="meta"):
        other(PROMPTS)
    assert moves[2:] == ["meta", "cpu"]


def test_both_encoders_of_hunyuan_stay_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_tiny("HunyuanVideo")
    moves: dict[str, list[str]] = {}
    for part in ("llama", "clip"):
        encoder = getattr(model.text, part)
        kept = moves.setdefault(part, [])

        def record(*places: object, kept: list[str] = kept, move: object = encoder.to) -> torch.nn.Module:
            kept.append(str(places[0]))
            return move(*places)  # type: ignore[operator]

        monkeypatch.setattr(encoder, "to", record)
    env = make(model=model, reward=lambda video, _: video.mean((1, 2, 3, 4)), prompts=PROMPTS, num_envs=2, num_steps=2)
    env.mdp.condition([0, 1])
    assert moves == {"llama": ["cpu", "cpu"], "clip": ["cpu", "cpu"]}
    model.encode_prompts(["another"])  # by itself, a visit of its own
    assert moves["llama"] == ["cpu"] * 4


def test_nothing_is_padding_for_mochi() -> None:
    condition = tiny("Mochi").encode_prompts(["abc", ""])
    assert condition["mask"].sum(1).tolist() == [4, 0]
    with torch.no_grad():
        x = latents(tiny("Mochi"))
        assert torch.isfinite(tiny("Mochi").predict(x, torch.tensor([500.0, 500.0]), condition)).all()
    assert tiny("LTXVideo").encode_prompts([""])["mask"].sum() == 1  # the end token


def test_hunyuan_crops_the_template() -> None:
    text = tiny("HunyuanVideo").text
    plain = text(PROMPTS)
    assert plain["text"].shape == (2, 32, 16) and plain["pooled"].shape == (2, 16)
    cropped = dataclasses.replace(text, template="??{}", crop=2)(PROMPTS)
    assert cropped["text"].shape == (2, 30, 16) and torch.equal(cropped["pooled"], plain["pooled"])
    assert cropped["mask"].sum(1).tolist() == [len(PROMPTS[0]) + 1, 30]
    published = hunyuan_video.HunyuanText.__dataclass_fields__["crop"].default
    assert published == 95


def test_stable_diffusion_pads_with_its_end_token() -> None:
    ids = animatediff.tokenize(["a dog", ""])
    assert ids.shape == (2, 77) and ids[0, 0] == 49406
    assert (ids[0, 3:] == 49407).all() and (ids[1, 1:] == 49407).all() and (ids[0, :3] < 49407).all()


# ---------------------------------------------------------------------------------------------------- memory and types


@pytest.mark.parametrize("name", ["CogVideoX5B", "Wan2.2_A14B", "HunyuanVideo", "LTXVideo", "Mochi", "AnimateDiff"])
def test_checkpointed_blocks_give_equal_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(model=new_tiny(name), reward=lambda video, _: video.mean((1, 2, 3, 4)), prompts=PROMPTS, num_envs=2)
    policy = env.make_policy(lora_rank=2, guidance_scale=1.0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    x, t = latents(env.model), torch.tensor([900.0, 100.0])
    enabled = []
    network = getattr(env.model.denoiser, "high", env.model.denoiser)
    real = type(network).enable_gradient_checkpointing
    monkeypatch.setattr(type(network), "enable_gradient_checkpointing", lambda self: (enabled.append(1), real(self))[1])

    def gradients(on: bool) -> list[Tensor]:
        policy.gradient_checkpointing = on
        for parameter in policy.trainable_parameters():
            parameter.grad = None
        loss = policy.predict(x, t, [0, 1]).square().mean()
        with torch.no_grad(), policy.reference():
            policy.predict(x, t, [0, 1])  # between a loss and its backward pass: the recomputation must not see it
        loss.backward()
        return [p.grad.clone() for p in policy.trainable_parameters() if p.grad is not None]

    plain = gradients(False)
    assert not enabled
    recomputed = gradients(True)
    assert enabled and not network.is_gradient_checkpointing
    assert len(plain) == len(recomputed) > 0 and any(g.abs().max() > 1e-6 for g in plain)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str) -> None:
    single, half = tiny(name), new_tiny(name, torch.bfloat16)
    assert half.codec.vae.dtype == torch.bfloat16
    if name.startswith("Wan"):
        kept = [n for n, p in half.denoiser.named_parameters() if p.dtype == torch.float32]
        assert any("scale_shift_table" in n for n in kept) and not any("to_q" in n for n in kept)
    x, t, condition = latents(single), torch.tensor([700.0, 300.0]), single.encode_prompts(PROMPTS)
    with torch.no_grad():
        want, got = single.predict(x, t, condition), half.predict(x, t, condition)
    assert got.dtype == torch.float32 and half.decode(x[:1]).dtype == torch.float32
    assert (got - want).abs().mean() < 0.1 * want.abs().mean()


# ----------------------------------------------------------------------------------------------------- Wan 2.2 experts


def test_each_video_goes_to_its_expert() -> None:
    model = new_tiny("Wan2.2_A14B")
    experts = model.denoiser
    x, t = latents(model, 4), torch.tensor([1000.0, 874.9, 875.0, 10.0])
    condition = model.encode_prompts([*PROMPTS, *PROMPTS])
    with torch.no_grad():
        got = model.predict(x, t, condition)
        for row, expert in enumerate([experts.high, experts.low, experts.high, experts.low]):
            one = {k: v[row : row + 1] for k, v in condition.items()}
            want = wan.call_wan(expert, x[row : row + 1], t[row : row + 1], one)
            torch.testing.assert_close(got[row : row + 1], want, atol=1e-5, rtol=1e-4)
        calls: list[int] = []
        experts.low.register_forward_hook(lambda *_: calls.append(1))
        model.predict(x, torch.full((4,), 900.0), condition)
        assert not calls
    assert wan.expert_guidance(4.0, t).tolist() == [4.0, 3.0, 4.0, 3.0]
