"""What the commands leave alone: the folder of another run, and the stream of machine output."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from musplit.cli import main

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
