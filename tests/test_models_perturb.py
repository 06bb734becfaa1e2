"""What the device perturbs: names, norms, adapters, nothing; the rest stays, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emulation.inprocess import InProcessFleet
from export.client_half import read_client_half
from export.errors import ModelError
from export.exporter import export_model, load_halves
from export.trained import whole_state
from server_node.config import Config
from server_node.prepare import Experiment, prepare
from server_node.replay import replay
from server_node.run import Run
from server_node.summary import result_of, summarise
from server_node.trained import evaluate_run, export_run
from tests.core_support import tiny_config
from wire_protocol.manifest import Manifest, sha256


def run_of(config: Config, folder: Path) -> tuple[Experiment, Run]:
    experiment = prepare(config, folder)
    return experiment, InProcessFleet(experiment).run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A client half that is perturbed as a whole."""
    return export_model("lenet", "conv2", tmp_path_factory.mktemp("all"), seed=1).manifest


@pytest.mark.parametrize(
    ("perturb", "trained"),
    [
        (["conv1.0.weight"], {"conv1.0.weight"}),
        (["conv*.bias"], {"conv1.0.bias", "conv2.0.bias"}),
        (["norms"], {"conv1.0.bias", "conv2.0.bias"}),
        (["adapters:2"], {"conv1.0.adapter_b", "conv2.0.adapter_b"}),
        (["none"], set()),
    ],
)
def test_only_what_is_chosen_is_a_parameter(
    perturb: list[str], trained: set[str], whole: Manifest, tmp_path: Path
) -> None:
    result = export_model("lenet", "conv2", tmp_path, seed=1, perturb=perturb)
    tensors = result.manifest.tensors
    assert {t.name for t in tensors if t.kind == "parameter"} == trained
    plain = sum(t.size_bytes // 4 for t in tensors if t.name in {u.name for u in whole.tensors})
    assert plain == whole.parameters  # nothing is lost
    assert result.manifest.parameters == sum(
        t.size_bytes // 4 for t in tensors if t.kind == "parameter"
    )
    assert any("frozen" in note for note in result.notes)


def test_adapters_start_as_the_model_and_merge_into_it(tmp_path: Path) -> None:
    plain = export_model("lenet", "fc1", tmp_path / "plain", seed=1)
    adapted = export_model("lenet", "fc1", tmp_path / "adapted", seed=1, perturb=["adapters:3"])
    x = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(plain.halves.client.module(x), adapted.halves.client.module(x))
    bundle = read_client_half(adapted.client)
    client = np.linspace(-0.1, 0.1, bundle.manifest.parameters, dtype=np.float32)
    halves = load_halves(adapted.server)
    server = torch.cat([p.flatten() for p in halves.server.module.parameters()]).detach().numpy()
    state = whole_state(adapted.server, bundle, client, server)
    assert not [name for name in state if "adapter" in name]
    model = export_model("lenet", "fc1", tmp_path / "again", seed=1).halves.client
    own = {name: state[full] for own, full in model.parameter_names.items() for name in [own]}
    torch.nn.utils.vector_to_parameters(
        torch.from_numpy(client), adapted.halves.client.module.parameters()
    )
    with torch.no_grad():
        want = adapted.halves.client.module(x)
        got = torch.func.functional_call(model.module, own, (x,))
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(got, plain.halves.client.module(x), atol=1e-3)


@pytest.mark.parametrize("perturb", ['["fc1.0.bias"]', '["adapters:2"]'])
def test_a_run_replays_and_leaves_the_frozen_alone(perturb: str, tmp_path: Path) -> None:
    config = tiny_config(f"model.perturb={perturb}")
    experiment, run = run_of(config, tmp_path)
    assert replay(tmp_path, tmp_path).matches is True
    assert not np.array_equal(run.client, experiment.client.initial_parameters())
    assert len(run.client) == experiment.exported.manifest.parameters < 64 * 12
    out = export_run(tmp_path, tmp_path / "out")
    assert out.max_relative_error <= 1e-5
    state = whole_state(tmp_path / "server", experiment.client, run.client, run.server)
    start = whole_state(
        tmp_path / "server", experiment.client, experiment.client.initial_parameters(), run.server
    )
    changed = {name for name in state if not torch.equal(state[name], start[name])}
    assert changed == ({"fc1.0.bias"} if "bias" in perturb else {"fc1.0.weight"})
    assert evaluate_run(tmp_path, None)["accuracy"] is not None


def test_a_device_that_trains_nothing(tmp_path: Path) -> None:
    config = tiny_config('model.perturb=["none"]')
    experiment, run = run_of(config, tmp_path)
    assert run.terms.directions == 0
    assert run.welcome(0, 0, 1).directions == 0
    assert run.client.shape == (0,)
    result = replay(tmp_path, tmp_path)
    assert result.matches is True
    assert result.client_sha256 == sha256(b"")
    assert "trains nothing" in experiment.no_control
    summary = summarise(experiment, result_of(run, 1.0, 0), experiment.no_control, None)
    assert summary["parameters_client"] == 0
    assert "frozen client" in summary["accuracy_frozen_client_reason"]
    # The same training of the server half as the control of a run that does train its device.
    both = prepare(tiny_config(), tmp_path / "both")
    control = InProcessFleet(both).run(frozen=True)
    assert np.array_equal(control.server, run.server)
    assert export_run(tmp_path, tmp_path / "out").max_relative_error <= 1e-5


@pytest.mark.parametrize(
    ("perturb", "told"),
    [
        (["conv1.0.wieght"], "conv1.0.weight"),
        (["fc3.weight"], "no tensor of the client half"),
        (["none", "norms"], "'none' stands alone"),
        (["adapters:2", "adapters:3"], "one rank"),
        (["adapters:0"], "no tensor"),
    ],
)
def test_a_wrong_choice_is_told(perturb: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        export_model("lenet", "conv1", tmp_path, seed=0, perturb=perturb)
    assert "\n" not in str(caught.value)


def test_a_half_without_biases_has_no_norms(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Linear(8, 4, bias=False),"
        " nn.Linear(4, 3))\n"
    )
    with pytest.raises(ModelError, match="no normalisation layer and no bias"):
        export_model(f"{file}:make", "0", tmp_path, seed=0, input_shape=[8], perturb=["norms"])
