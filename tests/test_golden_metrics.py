"""Metrics against the numbers of the programs they come from."""

from __future__ import annotations

import pytest
import torch

from tests.golden import golden_tensors
from tests.golden_numbers import stride
from vdm_env.metrics.fvd import frechet_distance, i3d_input, videomae_input

pytestmark = pytest.mark.golden


def test_frechet_distance() -> None:
    data = golden_tensors("rewards_fvd", "fixture.safetensors")
    real, fake = data["features_real"], data["features_fake"]
    torch.testing.assert_close(frechet_distance(real, fake), data["frechet_unbiased_cov_svd"], rtol=1e-6, atol=0)
    biased = frechet_distance(real, fake, covariance="biased")
    torch.testing.assert_close(biased, data["fvd_biased_cov_sqrtm"], rtol=1e-6, atol=0)


def test_fvd_inputs() -> None:
    data = golden_tensors("rewards_fvd", "fixture.safetensors")
    videos = data["videos_uint8_bthwc"].permute(0, 1, 4, 2, 3).float() / 255
    for name, prepare in (("i3d", i3d_input), ("videomae", videomae_input)):
        found = [key for key in data if key.startswith(f"{name}_input")]
        assert found
        for key in found:
            prepared = prepare(videos)
            step = stride(key, prepared.shape[-1], data[key].shape[-1])
            torch.testing.assert_close(prepared[..., ::step, ::step], data[key], rtol=1e-5, atol=1e-5)
