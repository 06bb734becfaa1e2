"""`musplit report`: a bench's figures, plots and page, made again from its raw samples."""

from __future__ import annotations

from pathlib import Path

import click

from musplit.support import format_option, guarded, say


@click.command()
@click.argument("evidence", type=click.Path(path_type=Path))
@format_option
def report(evidence: Path, output: str) -> None:
    """Check the raw samples of EVIDENCE and make its results, plots and page again.

    EVIDENCE is a folder of `musplit bench`. Every raw file must have the digest that
    MANIFEST.sha256 tells; what is computed from them is the same bytes on every machine, and what
    differed is said.

    \b
    musplit report evidence
    """
    with guarded():
        from edge_client.bench.evidence import Evidence
        from edge_client.bench.report import write_report
        from edge_client.bench.summary import as_json, table

        results, written = write_report(Evidence.open(evidence))
    if output == "json":
        files = {str(file.path.relative_to(evidence)): file.change for file in written}
        print(as_json(results, files=files))
        return
    print(table(results))
    for file in written:
        if file.change != "unchanged":
            say(f"{file.change}: {file.path}")
    if all(file.change == "unchanged" for file in written):
        say("results, plots and report are what the raw samples give")
