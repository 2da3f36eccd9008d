"""Ids, `make`, plug-ins, Gymnasium registration, and weight files that are missing or damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from models import PROMPTS, brightness, tiny_env, tiny_model

import vdm_env
from vdm_env import CorruptWeightsError, MissingWeightsError, make, registry
from vdm_env.models import moving_shapes
from vdm_env.rewards.loading import RewardContext
from vdm_env.worlds.moving_shapes import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def plug_in(monkeypatch):
    """A registered model "TinyFlow" and reward "Pixels"; all tables are put back afterwards."""
    for table in (registry.MODELS, registry.REWARDS, gymnasium.registry):
        for name in table.keys():
            monkeypatch.setitem(table, name, table[name])
    before = [(t, set(t)) for t in (registry.MODELS, registry.REWARDS, gymnasium.registry)]
    vdm_env.register_model("TinyFlow", lambda *, weights, scale, device, dtype, seed: tiny_model())
    vdm_env.register_reward("Pixels", lambda context: brightness)
    yield "TinyFlow-Pixels"
    for table, names in before:
        for name in set(table) - names:
            del table[name]


def test_ids_are_parsed():
    assert registry.parse_id("MovingShapes-HPS") == ("MovingShapes", {"HPS": 1.0})
    assert registry.parse_id("vdm_env/VideoCrafter2-HPS+0.1*Aesthetic-v0") == (
        "VideoCrafter2",
        {"HPS": 1.0, "Aesthetic": 0.1},
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("MovingShape-HPS", "unknown model 'MovingShape': did you mean MovingShapes"),
        ("movingshapes-HPS", "did you mean MovingShapes"),
        ("MovingShapes-HSP", "unknown reward 'HSP': did you mean HPS"),
        ("MovingShapes-HPS+Asthetic", "did you mean Aesthetic"),
        ("Zzz-HPS", "known: .*MovingShapes.*VideoCrafter2"),
        ("MovingShapes", "expected <Model>-<Reward>"),
        ("MovingShapes-", "expected <Model>-<Reward>"),
        ("MovingShapes-HPS+HPS", "names reward 'HPS' twice"),
        ("MovingShapes-x*HPS", "weight 'x' of 'HPS' is not a number"),
    ],
)
def test_unknown_ids_name_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_lists_and_registration():
    assert {"MovingShapes-HPS", "MovingShapesUNet-HPS", "VideoCrafter2-HPS"} <= set(vdm_env.list_envs())
    for env_id in vdm_env.list_envs():
        spec = gymnasium.registry[f"vdm_env/{env_id}-v0"]
        assert isinstance(spec.entry_point, str) and isinstance(spec.vector_entry_point, str)
    count = len(gymnasium.registry)
    vdm_env.register_envs(vdm_env.list_envs())
    assert len(gymnasium.registry) == count


def test_importing_imports_no_network_and_no_torchrl():
    code = (
        "import sys, vdm_env, gymnasium, importlib\n"
        "assert 'vdm_env/MovingShapes-HPS-v0' in gymnasium.registry\n"
        "importlib.reload(vdm_env)\n"
        "heavy = {'torchrl', 'diffusers', 'open_clip', 'vdm_env.models.unet3d', 'vdm_env.models.moving_shapes'}\n"
        "sys.exit(f'imported: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:gymnasium", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_plug_ins_reach_every_entrance(plug_in):
    options = {"prompts": PROMPTS, "num_steps": 2}
    assert plug_in in vdm_env.list_envs()
    with pytest.raises(ValueError, match="registered already"):
        vdm_env.register_model("TinyFlow", lambda **_: None)
    with pytest.raises(ValueError, match="without '-'"):
        vdm_env.register_reward("my-reward", lambda context: brightness)
    vector = make(plug_in, **options)
    wide = gymnasium.make_vec(f"vdm_env/{plug_in}-v0", num_envs=3, **options)
    single = gymnasium.make(f"vdm_env/{plug_in}-v0", render_mode="rgb_array", **options)
    torchrl = make(plug_in, api="torchrl", **options)
    assert (
        wide.num_envs == 3
        and isinstance(wide.unwrapped, vdm_env.DenoisingVectorEnv)
        and single.unwrapped.num_steps == 2
    )
    with pytest.raises(ValueError, match="num_envs.*do not fit a single env"):
        gymnasium.make(f"vdm_env/{plug_in}-v0", num_envs=2)

    # The same seed is the same episode through all four.
    policy = vector.make_policy(lora_rank=2)
    wide_policy = wide.unwrapped.make_policy(lora_rank=2)
    with torch.no_grad():
        obs, _ = vector.reset(seed=6)
        first, (flat, _) = wide.reset(seed=6)[0], single.reset(seed=6)
        torchrl.set_seed(6)
        td = torchrl.reset()
        reward = 0.0
        for _ in range(2):
            for name, value in obs.items():
                assert torch.equal(first[name][:1], value) and torch.equal(td[name], value), name
                assert np.array_equal(flat[name].reshape(value.shape), value.numpy()), name
            action, many = policy(obs), wide_policy(first)
            torch.testing.assert_close(many[:1], action, rtol=0, atol=1e-5)
            many = torch.cat([action, many[1:]])
            obs, reward, *_ = vector.step(action)
            first, wide_reward, *_ = wide.step(many)
            flat, flat_reward, *_ = single.step(action[0].numpy())
            td = torchrl.step(td.set("action", action))["next"]
    assert float(reward) == flat_reward == float(td["reward"]) != 0
    assert float(wide_reward[0]) == pytest.approx(flat_reward, abs=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_check_env_passes_on_what_gymnasium_makes(plug_in):
    check_env(gymnasium.make(f"vdm_env/{plug_in}-v0", prompts=PROMPTS, num_steps=2).unwrapped)


def test_entry_point_plug_ins_are_listed_without_being_imported(monkeypatch):
    class Point:
        name = "Elsewhere"

        def load(self):
            raise ImportError("broken plug-in")

    registry._plugins.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()] if group == "vdm_env.models" else [])
    try:
        assert "Elsewhere" in vdm_env.list_models()
        with pytest.raises(ImportError, match="broken plug-in"):
            make("Elsewhere-Brightness")
    finally:
        registry._plugins.cache_clear()


def test_rewards_combine_by_weight():
    env = tiny_env(reward={"Brightness": 2.0, "JPEGCompressibility": 0.5}, num_steps=1)
    obs, _ = env.reset(seed=0)
    _, reward, _, _, info = env.step(obs["latents"])
    parts = info["reward_parts"]
    torch.testing.assert_close(reward, 2 * parts["Brightness"] + 0.5 * parts["JPEGCompressibility"])
    with pytest.raises(ValueError, match="names no reward"):
        tiny_env(reward={})


def test_a_sampler_brings_its_own_noise_level():
    assert not tiny_env(sampler="flow_ode").mdp.table.stochastic.any()
    assert tiny_env(sampler="cps").mdp.table.stochastic.any()


def test_random_weights_need_no_file_and_warn():
    with pytest.warns(UserWarning, match="random weights"):
        a = make(
            "ModelScope-Brightness", weights="random", scale="tiny", height=16, width=16, num_frames=1, num_steps=1
        )
    with pytest.warns(UserWarning):
        b = make(
            "ModelScope-Brightness", weights="random", scale="tiny", height=16, width=16, num_frames=1, num_steps=1
        )
    pairs = zip(a.model.denoiser.parameters(), b.model.denoiser.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    obs, _ = a.reset(seed=0)
    assert torch.isfinite(a.step(a.make_policy(lora_rank=2)(obs))[1]).all()


def test_missing_pretrained_weights_say_what_works_now():
    with pytest.raises(MissingWeightsError, match=r"VideoCrafter/VideoCrafter2.*make\(\"MovingShapes-HPS\"\)"):
        make("VideoCrafter2-HPS")
    with pytest.raises(ValueError, match="scale='tiny' has no pretrained weights"):
        make("VideoCrafter2-HPS", scale="tiny")


# ----------------------------------------------------------------------------------------- the embedded weight files


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("part", ["flow/transformer", "shared/vae", "shared/text_encoder"])
@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "other"])
def test_damaged_model_files_are_named(tmp_path, part, harm):
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights", ignore=shutil.ignore_patterns("unet", "rewards"))
    (file,) = (folder / part).glob("*.safetensors")
    error: type[Exception] = CorruptWeightsError
    if harm == "truncated":
        truncate(file)
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "other":
        shutil.copy(
            next((folder / ("shared/vae" if part != "shared/vae" else "flow/transformer")).glob("*.safetensors")), file
        )
    else:
        file.unlink()
        error = MissingWeightsError
    with pytest.raises(error, match=part):
        moving_shapes.load(
            moving_shapes.FLOW_SPEC, weights="pretrained", device="cpu", dtype=torch.float32, folder=folder
        )


def test_a_damaged_reward_file_is_named(tmp_path):
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights", ignore=shutil.ignore_patterns("unet", "flow"))
    context = RewardContext(world="moving_shapes", folder=folder)
    registry.build_reward({"HPS": 1.0}, context)
    truncate(folder / "rewards" / "clip" / "model.safetensors")
    with pytest.raises(CorruptWeightsError, match="rewards/clip/model.safetensors is damaged or truncated"):
        registry.build_reward({"HPS": 1.0}, context)


def test_the_embedded_world_is_made_by_name():
    env = make("MovingShapes-HPS", num_envs=2, num_steps=2)
    assert len(env.prompts) == 112 and len(env.prompt_ids("test")) == 16 and env.mdp.reward.differentiable
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    for _ in range(2):
        obs, reward, *_ = env.step(policy(obs))
    reward.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.trainable_parameters())
    assert (
        env.mdp.gold(env.mdp.decode(obs["latents"]).detach(), [env.prompts[int(i)] for i in obs["prompt_id"]])
        is not None
    )
