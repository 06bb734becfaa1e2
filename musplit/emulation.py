"""`musplit emulate`, seen from the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from emulation.emulate import emulate, emulated_config
from emulation.fleet import load_fleet
from emulation.report import ProgressView, parse_requirement, print_table, write_junit
from musplit.support import say
from server_node.config import Config, load_config


def run_emulation(
    config_path: Path, overrides: list[str], folder: Path, required: list[str],
    junit: Path | None, output: str, *, resume: bool,
) -> int:  # fmt: skip
    """Emulate, show, judge; returns the exit code: 1 when a requirement does not hold.

    `resume`: the configuration is that of the run in `folder`.
    """
    requirements = [parse_requirement(text) for text in required]
    config = emulated_config(folder) if resume else _config(config_path, overrides)
    with ProgressView(config, sys.stderr) as view:
        summary = emulate(config, folder, view.notify, resume=resume)
    judged = [(requirement, requirement.judge(summary)) for requirement in requirements]
    if output == "json":
        print(json.dumps({**summary, "folder": str(folder)}))
    else:
        print_table(summary, folder, sys.stdout)
    if junit is not None:
        write_junit(junit, judged, summary["seconds"])
    for requirement, why in judged:
        print(f"{'FAILED' if why else 'holds'}: {requirement.text} {why}".rstrip(), file=sys.stderr)
    if summary["outcome"] != "complete":
        say(f"musplit: error: the run {summary['outcome']}: see {folder / 'logs' / 'server.log'}")
        return 1
    return 1 if any(why for _, why in judged) else 0


def _config(path: Path, overrides: list[str]) -> Config:
    """The configuration, with as many devices as its fleet file has."""
    config = load_config(path, overrides)
    if not config.emulation.fleet:
        return config
    fleet = Path(config.emulation.fleet)
    if not fleet.exists() and (path.parent / fleet).exists():  # named by the configuration
        fleet = path.parent / fleet
    count = len(load_fleet(fleet).devices)
    fields = [f"emulation.fleet={str(fleet.resolve())!r}", f"devices.count={count}"]
    return load_config(path, [*overrides, *fields])
