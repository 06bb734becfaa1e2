"""What the commands leave alone: the folder of another run, and the stream of machine output."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from musplit.cli import main
from server_node.plot import plot_run

NOISY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        print("HELLO")
        return self.b(self.a(x))
"""


def test_emulate_changes_nothing_in_the_folder_of_another_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "emulated.toml").write_text("of another run")
    result = CliRunner().invoke(main, ["emulate", "--out", str(run)])
    assert result.exit_code == 3
    assert "musplit emulate --resume" in result.stderr
    assert [path.name for path in run.iterdir()] == ["emulated.toml"]


def test_a_model_that_prints_does_not_spoil_machine_output(tmp_path: Path) -> None:
    source = tmp_path / "noisy.py"
    source.write_text(NOISY)
    result = CliRunner().invoke(
        main, ["export", f"{source}:Net", "--input-shape", "4", "--list-cuts", "--format", "json"]
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["cuts"]
    assert "HELLO" in result.stderr


def test_a_damaged_row_is_left_out_of_the_plot(tmp_path: Path) -> None:
    rows = ['{"round": 0, "accuracx": 0.5}', '{"round": 1', "[1]", '{"round": 2, "accuracy": "x"}']
    (tmp_path / "rounds.jsonl").write_text("\n".join(rows) + "\n")
    assert plot_run(tmp_path, "damaged").is_file()
