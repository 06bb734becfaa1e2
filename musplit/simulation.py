"""`musplit simulate`, seen from the terminal."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from emulation.report import ProgressView, parse_requirement, print_table
from emulation.simulate import simulate
from server_node.config import load_config


def run_simulation(
    config_path: Path, overrides: list[str], folder: Path, required: list[str], output: str
) -> int:
    """Simulate, show, judge; returns the exit code: 1 when a requirement does not hold."""
    requirements = [parse_requirement(text) for text in required]
    config = load_config(config_path, overrides)
    stdout = sys.stdout
    with ProgressView(config, sys.stderr) as view, redirect_stdout(sys.stderr):
        summary = simulate(config, folder, view.notify)
    if output == "json":
        print(json.dumps({**summary, "folder": str(folder)}))
    else:
        print_table(summary, folder, stdout)
    judged = [(requirement, requirement.judge(summary)) for requirement in requirements]
    for requirement, why in judged:
        print(f"{'FAILED' if why else 'holds'}: {requirement.text} {why}".rstrip(), file=sys.stderr)
    return 1 if any(why for _, why in judged) else 0
