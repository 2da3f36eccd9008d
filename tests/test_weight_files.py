"""Weight files that are damaged, tampered with, half written or written twice; checksums beside them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from tests.test_lvdm import PLACE, SIZES, brightness, checkpoint
from vdm_env import make
from vdm_env.checksums import MANIFEST, check_file, expected_sha256, read_manifest, write_manifest
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models import lvdm, unet3d
from vdm_env.models.checkpoint_files import read_checkpoint
from vdm_env.models.loading import load_folder
from vdm_env.models.opensora_weights import read_tensors, read_text
from vdm_env.worlds.moving_shapes.networks import build_tokenizer

VAE: dict[str, Any] = dict(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, sample_size=8)


@pytest.fixture
def small_release(only_here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `only_here`, where a small VideoCrafter2 is the release."""
    monkeypatch.setattr(lvdm, "Sizes", lambda: SIZES)
    return only_here


def flip_bit(file: Path, place: int) -> None:
    """Changes one bit of the byte at this place (negative: from the end)."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def inside_a_tensor(file: Path) -> int:
    """A place in the values of a torch archive's largest entry."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    return largest.header_offset + 200


# ------------------------------------------------------------------------------------------------------- conversion


def test_a_checkpoint_in_the_folder_of_its_models_name_is_converted(small_release: Path) -> None:
    """Where `VDM_WEIGHTS/VideoCrafter2/model.ckpt` lies, the converted folders go beside it."""
    place = small_release / "VideoCrafter2"
    place.mkdir()
    torch.save({"state_dict": checkpoint()}, place / "model.ckpt")
    options: dict[str, Any] = dict(reward=brightness, num_steps=1, num_frames=2, height=64, width=64, prompts=["a"])
    env = make(model="VideoCrafter2", **options)
    assert lvdm.is_converted(place / "converted") and (place / "model.ckpt").is_file()
    written = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()}
    again = make(model="VideoCrafter2", **options)
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()} == written, "converted once"
    x, t, condition = torch.ones(1, 4, 2, 8, 8), torch.tensor([500]), env.mdp.condition([0])
    with torch.no_grad():
        assert torch.equal(env.model.predict(x, t, condition), again.model.predict(x, t, condition))


def test_converted_weights_of_another_checkpoint_are_not_taken(small_release: Path) -> None:
    file, state = small_release / "model.ckpt", checkpoint()
    torch.save({"state_dict": state}, file)
    unet3d.load_videocrafter2(**PLACE)
    os.utime(file, (1, 1))  # a copy looks newer or older, and is the same
    unet3d.load_videocrafter2(**PLACE)
    name = lvdm.UNET_PREFIX + "out.2.bias"
    torch.save({"state_dict": state | {name: state[name] + 1}}, file)  # trained on: as many bytes
    with pytest.raises(CorruptWeightsError, match=r"converted weights of another checkpoint than .*; remove"):
        unet3d.load_videocrafter2(**PLACE)
    shutil.rmtree(small_release / "VideoCrafter2")
    unet3d.load_videocrafter2(**PLACE)


def test_an_interrupted_conversion_leaves_nothing_half_done(
    small_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": checkpoint()}, small_release / "model.ckpt")
    target = small_release / "VideoCrafter2" / "converted"
    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(lvdm, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            unet3d.load_videocrafter2(**PLACE)
    assert not target.exists() and not [left for left in target.parent.iterdir() if left.is_dir()]
    killed = target.with_name(".converted-killed")  # a killed process cannot clean up
    (killed / "unet").mkdir(parents=True)
    unet3d.load_videocrafter2(**PLACE)
    assert lvdm.is_converted(target) and not killed.exists()


def test_two_that_convert_at_once_share_one_result(small_release: Path) -> None:
    file, target = small_release / "model.ckpt", small_release / "out" / "converted"
    torch.save({"state_dict": checkpoint()}, file)
    done: list[Path] = []
    both = [threading.Thread(target=lambda: done.append(lvdm.convert_file(file, target))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert done == [target, target] and lvdm.is_converted(target)


def test_a_folder_that_may_not_be_written_to(small_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared disk, say: the converted weights then go to the user's cache, and are found there."""
    torch.save({"state_dict": checkpoint()}, small_release / "model.ckpt")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    unet3d.load_videocrafter2(**PLACE)
    assert not (small_release / "VideoCrafter2").exists()
    (small_release / "model.ckpt").unlink()
    unet3d.load_videocrafter2(**PLACE)


# -------------------------------------------------------------------------------------------------------- checksums


def test_manifests_are_what_sha256sum_writes(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("unet/a.bin", "b with spaces.json"):
        (tmp_path / name).write_text(name)
    entries = write_manifest(tmp_path, [tmp_path / "unet" / "a.bin"])
    assert entries == {"unet/a.bin": hashlib.sha256(b"unet/a.bin").hexdigest()}
    write_manifest(tmp_path, [tmp_path / "b with spaces.json"])  # what is known already stays
    assert set(read_manifest(tmp_path)) == {"unet/a.bin", "b with spaces.json"}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    result = subprocess.run(["sha256sum", "-c", MANIFEST], cwd=tmp_path, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    check_file(tmp_path / "unet" / "a.bin")
    (tmp_path / MANIFEST).write_text("no checksum\n")
    with pytest.raises(CorruptWeightsError, match="SHA256SUMS is damaged .*'no checksum'"):
        check_file(tmp_path / "unet" / "a.bin")


def test_a_file_of_the_hubs_cache_carries_its_checksum_in_its_name(tmp_path: Path) -> None:
    content = b"some weights"
    blob = tmp_path / "models--a--b" / "blobs" / hashlib.sha256(content).hexdigest()
    file = tmp_path / "models--a--b" / "snapshots" / "0" / "unet" / "weights.bin"
    for place in (blob, file):
        place.parent.mkdir(parents=True)
    blob.write_bytes(content)
    file.symlink_to(blob)
    check_file(file)
    flip_bit(blob, 3)
    with pytest.raises(CorruptWeightsError, match="weights.bin .*its sha256 is"):
        check_file(file)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "conditioning"])
def test_a_flipped_bit_in_converted_weights_is_found(part: str, small_release: Path) -> None:
    folder = lvdm.save_folders(lvdm.convert(checkpoint(), SIZES), small_release / "VideoCrafter2", SIZES)
    (file,) = (folder / part).glob("*.safetensors")
    flip_bit(file, -5)
    with pytest.raises(CorruptWeightsError) as caught:
        unet3d.load_videocrafter2(**PLACE)
    assert str(file) in str(caught.value) and "sha256" in str(caught.value)


def test_a_changed_config_of_converted_weights_is_found(small_release: Path) -> None:
    folder = lvdm.save_folders(lvdm.convert(checkpoint(), SIZES), small_release / "VideoCrafter2", SIZES)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.28215"))
    with pytest.raises(CorruptWeightsError, match=r"vae.config\.json .*sha256"):
        unet3d.load_videocrafter2(**PLACE)


# ------------------------------------------------------------------------------------------- files without checksums


@pytest.mark.parametrize("name", ["model.ckpt", "unet_lora.pt", "weights.pth"])
def test_a_flipped_bit_in_a_torch_archive_is_found(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, file)
    assert expected_sha256(file) is None
    assert torch.equal(read_checkpoint(file)["weight"], torch.ones(1000))
    flip_bit(file, inside_a_tensor(file))
    assert not torch.equal(torch.load(file, weights_only=True)["state_dict"]["weight"], torch.ones(1000))
    with pytest.raises(CorruptWeightsError, match=f"{name} .*the checksum of its entry .* is wrong"):
        read_checkpoint(file)


def saved_vae(folder: Path, *, safe: bool = True) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(**VAE).save_pretrained(folder, safe_serialization=safe)
    return folder


def test_torch_archives_serve_where_there_are_no_safetensors(tmp_path: Path) -> None:
    """Zeroscope's network and autoencoder were published as these alone."""
    old, new = saved_vae(tmp_path / "old", safe=False), saved_vae(tmp_path / "new")
    assert [file.suffix for file in old.iterdir() if file.suffix != ".json"] == [".bin"]
    a, b = (load_folder(AutoencoderKL, folder, **PLACE).state_dict() for folder in (old, new))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    (file,) = old.glob("*.bin")
    flip_bit(file, inside_a_tensor(file))
    with pytest.raises(CorruptWeightsError, match=r"model\.bin .*the checksum of its entry"):
        load_folder(AutoencoderKL, old, **PLACE)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptWeightsError, match="old"):
        load_folder(AutoencoderKL, old, **PLACE)


def test_zeroscope_is_read_from_its_own_folder(small_release: Path) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        made: Any = unet3d.load(unet3d.ZEROSCOPE, weights="random", scale="tiny", **PLACE)
    folder = small_release / "cerspense" / "zeroscope_v2_576w"
    made.denoiser.save_pretrained(folder / "unet", safe_serialization=False)
    made.codec.vae.save_pretrained(folder / "vae", safe_serialization=False)
    made.text.encoder.config.save_pretrained(folder / "text_encoder")
    torch.save(made.text.encoder.state_dict(), folder / "text_encoder" / "pytorch_model.bin")
    assert not list(folder.rglob("*.safetensors"))
    read: Any = unet3d.load(unet3d.ZEROSCOPE, weights="pretrained", scale="full", **PLACE)
    assert (read.spec.num_frames, read.spec.height, read.spec.width) == (24, 320, 576)
    x, t, text = torch.ones(1, 4, 2, 8, 8), torch.tensor([500]), read.encode_prompts(["a dog"])
    with torch.no_grad():
        assert torch.equal(read.predict(x, t, text), made.predict(x, t, made.encode_prompts(["a dog"])))
    with pytest.raises(MissingWeightsError, match="ali-vilab"):
        unet3d.load(unet3d.MODELSCOPE, weights="pretrained", scale="full", **PLACE)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"norm_num_groups": 0}',
        '{"block_out_channels": "wide"}',
        '{"down_block_types": ["NoSuchBlock"]}',
        '{"layers_per_block": null}',
    ],
)
def test_a_tampered_config_is_one_clear_error(config: str, tmp_path: Path) -> None:
    folder = saved_vae(tmp_path / "vae")
    (folder / "config.json").write_text(config)
    with pytest.raises(CorruptWeightsError, match=r"vae does not (hold|fit).*AutoencoderKL"):
        load_folder(AutoencoderKL, folder, **PLACE)


def test_tampered_safetensors_are_one_clear_error(tmp_path: Path) -> None:
    folder = saved_vae(tmp_path / "vae")
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    wrong_length = bytes([content[0] + 1]) + content[1:]
    header = content.replace(b'"F32"', b'"F99"', 1)
    offsets = content.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    for changed in (b"", content[:5], content[:-1], content + b"more", wrong_length, header, offsets):
        assert changed != content
        file.write_bytes(changed)
        with pytest.raises(CorruptWeightsError, match="safetensors is damaged or truncated"):
            load_folder(AutoencoderKL, folder, **PLACE)
        with pytest.raises(CorruptWeightsError, match="safetensors is damaged or truncated"):
            read_tensors(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(CorruptWeightsError, match="vae does not fit AutoencoderKL"):
        load_folder(AutoencoderKL, folder, **PLACE)


def test_open_soras_text_encoder_is_read_strictly(tmp_path: Path) -> None:
    """Its release has torch archives; every way they can be wrong is an error that names folder or file."""
    sizes = dict(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    encoder = T5EncoderModel(T5Config(**sizes, use_cache=False))
    encoder.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file, config = tmp_path / "pytorch_model.bin", tmp_path / "config.json"
    torch.save(encoder.state_dict(), file)
    build_tokenizer().save_pretrained(tmp_path)
    text = read_text(tmp_path, 6, torch.float32, device="cpu")
    ids, mask = text.tokenize(["a red circle"])
    assert ids.shape == mask.shape == (1, 6) and mask.sum() > 0
    states, good, described = text(["a red circle"])["text"], file.read_bytes(), config.read_text()
    with torch.no_grad():
        assert states.shape == (1, 6, 8)

    def refused(message: str) -> None:
        with pytest.raises(CorruptWeightsError, match=message):
            read_text(tmp_path, 6, torch.float32, device="cpu")
        file.write_bytes(good)
        config.write_text(described)

    file.write_bytes(good[: len(good) // 2])
    refused("pytorch_model.bin|T5EncoderModel")
    flip_bit(file, inside_a_tensor(file))
    refused("pytorch_model.bin .*checksum of its entry")
    missing = {name: value for name, value in encoder.state_dict().items() if "layer_norm" not in name}
    torch.save(missing, file)
    refused("does not fit T5EncoderModel.*layer_norm")
    config.write_text("{")
    refused("T5EncoderModel")
    config.write_text(described.replace('"d_model": 8', '"d_model": 16'))
    refused("T5EncoderModel")
    (tmp_path / "tokenizer.json").write_text("{")
    refused("does not hold a tokenizer")
    file.unlink()
    with pytest.raises(MissingWeightsError, match="no weights of T5EncoderModel"):
        read_text(tmp_path, 6, torch.float32, device="cpu")
