"""The model of a run folder: scored again to the bit, and taken out as one file."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from core_support import tiny_config

from emulation.inprocess import InProcessFleet
from musplit.cli import main
from server_node.datasets import load_dataset
from server_node.prepare import prepare
from server_node.run import Run


@dataclass
class Finished:
    """A run in its folder."""

    folder: Path
    run: Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("trained") / "run"
    fleet = InProcessFleet(prepare(tiny_config(), folder))
    run = fleet.run()
    fleet.run(frozen=True)
    return Finished(folder, run)


def musplit(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def evaluated(*arguments: object) -> dict[str, object]:
    result = musplit("evaluate", *arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    facts: dict[str, object] = json.loads(result.stdout)
    return facts


def test_evaluate_repeats_the_runs_scores_to_the_bit(finished: Finished) -> None:
    scores = finished.run.scores
    assert scores is not None
    facts = evaluated(finished.folder)
    assert (facts["accuracy"], facts["loss"]) == (scores.accuracy, scores.loss)
    assert (facts["rounds"], facts["samples"]) == (3, 359)


def test_the_control_is_scored_in_its_own_folder(finished: Finished) -> None:
    assert evaluated(finished.folder / "control")["loss"] != evaluated(finished.folder)["loss"]


def test_a_missing_checkpoint_costs_a_replay_and_is_said(
    finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.npz").unlink()
    facts = evaluated(tmp_path / "run")
    assert facts["loss"] == evaluated(finished.folder)["loss"]
    assert "all rounds are replayed" in str(facts["notes"])


def test_another_data_set_goes_through_the_bundles_transform(
    finished: Finished, tmp_path: Path
) -> None:
    data = load_dataset(tiny_config().data)
    x, y = data.x_test[0][:50], data.y_test[:50]
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    facts = evaluated(finished.folder, "--data", tmp_path / "other.npz")
    assert (facts["samples"], facts["accuracy_of_summary"]) == (50, None)


def test_the_exported_file_scores_raw_samples_as_the_run_did(
    finished: Finished, tmp_path: Path
) -> None:
    result = musplit("export", "--from-run", finished.folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    data = load_dataset(tiny_config().data)
    (scores,) = session.run(None, {"input": data.x_test[0].astype(np.float32)})
    accuracy = float((scores.argmax(1) == data.y_test).mean())
    assert accuracy == evaluated(finished.folder)["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("evaluate", "nowhere"), 3, "nowhere: holds no run"),
        (("export", "--from-run", "nowhere", "--out", "out"), 3, "nowhere: holds no run"),
        (("export", "--from-run", "nowhere"), 2, "needs --out"),
        (("export",), 2, "give MODEL, or --from-run"),
        (("export", "lenet", "--from-run", "nowhere", "--out", "out"), 2, "give MODEL, or"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = musplit(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1)
    assert said in result.stderr


def test_a_run_without_a_closed_round_has_trained_nothing(
    finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "journal.bin").unlink()
    result = musplit("evaluate", tmp_path / "run")
    assert (result.exit_code, "no round was closed" in result.stderr) == (3, True)


def test_other_weights_than_the_journals_are_refused(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    weights = tmp_path / "run" / "client" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    result = musplit("evaluate", tmp_path / "run")
    assert result.exit_code == 3
    assert "weights.bin: digest differs" in result.stderr
