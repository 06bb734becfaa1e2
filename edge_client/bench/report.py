"""results.json, plots/ and report.html: written from the raw files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import msgspec

from edge_client.bench.compute import compute_results
from edge_client.bench.evidence import PLOTS_FOLDER, Evidence
from edge_client.bench.page import page
from edge_client.bench.plots import all_plots
from edge_client.bench.results import Results
from edge_client.files import replacing

RESULTS_FILE: Final = "results.json"
REPORT_FILE: Final = "report.html"


class Written(msgspec.Struct, frozen=True):
    """What `write_report` did to a derived file."""

    path: Path
    change: Literal["unchanged", "written", "rewritten"]


def write_report(evidence: Evidence) -> tuple[Results, list[Written]]:
    """Compute and write everything that is derived. Raises EvidenceError."""
    results = compute_results(evidence)
    plots = all_plots(evidence, results)
    files = {RESULTS_FILE: msgspec.json.format(msgspec.json.encode(results)).decode() + "\n"}
    files |= {f"{PLOTS_FOLDER}/{name}.svg": svg + "\n" for name, svg in plots.items()}
    files[REPORT_FILE] = page(results, list(plots.values()))
    (evidence.folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    return results, [_replace(evidence.folder / name, text) for name, text in files.items()]


def _replace(path: Path, text: str) -> Written:
    data = text.encode()
    there = path.read_bytes() if path.is_file() else None
    if there == data:
        return Written(path, "unchanged")
    with replacing(path) as file:
        file.write(data)
    return Written(path, "written" if there is None else "rewritten")
