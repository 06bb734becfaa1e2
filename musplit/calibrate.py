"""`musplit calibrate`: a board's own profile, from what `musplit bench` measured on it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from musplit.support import fail, format_option, guarded, say

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("evidence", type=_FILE)
@click.option("--profile", required=True, help="The profile to start from, by name or path.")
@click.option("--out", required=True, type=_FILE, metavar="FILE.toml", help="Profile to write.")
@format_option
def calibrate(evidence: Path, profile: str, out: Path, output: str) -> None:
    """Write a profile in which EVIDENCE, a folder of `musplit bench`, replaces assumed numbers.

    The raw samples are checked and computed anew. Step times go to speed.calibrated, by graph;
    idle and load power are replaced when they were measured. Every replaced number names the
    evidence's digest and date. OUT is for `--profile` and for fleets of emulated devices.

    \b
    musplit calibrate evidence --profile rpi-4b --out my-board.toml
    """
    with guarded():
        from edge_client.bench.calibrate import calibrate as calibrated
        from edge_client.bench.calibrate import write_profile
        from edge_client.bench.compute import compute_results
        from edge_client.bench.evidence import Evidence
        from firmware_profiles.catalogue import load_profile

        if out.suffix != ".toml":
            fail(f"--out {out}: a profile's file name ends in .toml", 2)
        results = compute_results(Evidence.open(evidence))
        result = calibrated(results, load_profile(profile))
        write_profile(result.profile, out)
    for reason in results.not_reportable:
        say(f"note: the evidence is not reportable: {reason}")
    if output == "json":
        print(json.dumps({
            "profile": str(out), "evidence_sha256": results.evidence_sha256,
            "reportable": results.reportable, "changes": result.changes,
        }))  # fmt: skip
        return
    print(out)
    for change in result.changes:
        print(change)
