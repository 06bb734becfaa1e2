"""The white start: what its weights are, and that they draw from the seed."""

import numpy as np
import pytest
import torch
from torch import nn

from export.models import build_model
from export.start import assumed_covariance


@pytest.fixture
def model():
    return build_model("alexnet-white:10:w8", 0, None).module


def test_the_first_filters_whiten_patches_of_the_assumed_covariance_and_come_in_both_signs(model):
    kernels = model.conv1[0].weight.detach().reshape(8, -1).numpy()
    np.testing.assert_array_equal(kernels[:4], -kernels[4:])
    variances = kernels[:4] @ assumed_covariance(3, 3) @ kernels[:4].T
    np.testing.assert_allclose(np.diag(variances), 1.0, atol=0.1)
    np.testing.assert_allclose(variances, np.diag(np.diag(variances)), atol=1e-5)


def test_the_other_layers_are_orthogonal_and_biases_zero(model):
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert not layer.bias.any()
        if isinstance(layer, nn.Linear):
            weight = layer.weight
        elif isinstance(layer, nn.Conv2d) and not name.startswith("conv1"):
            weight = layer.weight[:, :, 1, 1] / 2**0.5
            assert torch.count_nonzero(layer.weight) == torch.count_nonzero(weight)
        else:
            continue
        rows, columns = weight.shape
        gram = weight @ weight.T if rows <= columns else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)


def test_the_seed_decides(model):
    again = build_model("alexnet-white:10:w8", 0, None).module
    other = build_model("alexnet-white:10:w8", 1, None).module
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(model.fc1.weight, other.fc1.weight)
