"""`musplit doctor`: on the board, before a run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click

from musplit.support import SECONDS, format_option, guarded, parse_address

_MARKS = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}


@click.command()
@click.option("--profile", "profile_name", metavar="PROFILE",
              help="Compare with this board's profile: its name, or a file.")  # fmt: skip
@click.option("--broker", metavar="HOST[:PORT]",
              help="Connect to this broker; port 1883 if none, 8883 with --identity.")  # fmt: skip
@click.option("--identity", type=click.Path(path_type=Path), metavar="DIR",
              help="Check the certificates in this folder, and use them.")  # fmt: skip
@click.option("--insecure", is_flag=True, help="Allow a plain link to a broker beyond loopback.")
@click.option("--url", metavar="URL", help="Compare the clock with this enrolment server's.")
@click.option("--fleet", default="lab", show_default=True, help="The server's run.fleet.")
@click.option("--state", type=click.Path(path_type=Path), default=Path("musplit-state"),
              show_default=True, help="Where the device keeps its state.")  # fmt: skip
@click.option("--connect-s", default=5.0, type=SECONDS, show_default=True, metavar="S",
              help="How long to try to reach the broker.")  # fmt: skip
@format_option
def doctor(
    profile_name: str | None, broker: str | None, identity: Path | None, insecure: bool,
    url: str | None, fleet: str, state: Path, connect_s: float, output: str,
) -> None:  # fmt: skip
    """Look for what would keep this board from taking part, and say what to do.

    System, Python, processor, onnxruntime (in a child process: a crash is a finding), memory, disk,
    power supply, temperature, sensors, clock; with --identity certificates, with --broker the
    broker. Exit code 1 when there is an error; warnings alone do not fail.

    \b
    musplit doctor
    musplit doctor --profile rpi-4b --broker 192.168.1.10 --identity /var/lib/musplit/identity
    """
    with guarded():
        from edge_client.doctor.diagnose import diagnose_system, probe
        from edge_client.doctor.findings import ERRORS_FOUND, Board, Finding
        from firmware_profiles.catalogue import load_profile

        findings: list[Finding] = []

        def take(found: Iterable[Finding]) -> None:
            for finding in found:
                findings.append(finding)
                if output == "text":
                    _show(finding)

        profile = load_profile(profile_name) if profile_name else None
        board = Board(profile=profile)
        outcome = probe()
        usable = outcome is None or outcome.imports_numpy  # what follows needs numpy
        address = parse_address(broker, tls=identity is not None) if broker and usable else None
        if address is not None:
            from wire_protocol.tls import tls_for

            tls_for(address, identity, insecure=insecure)  # a wrong command line ends it here
        take(diagnose_system(board, outcome))
        if usable:
            from edge_client.doctor.surroundings import Questions, diagnose_surroundings
            from wire_protocol.tls import TlsFiles

            tls = TlsFiles.in_folder(identity) if identity else None
            asked = Questions(state, address, tls, url, fleet, connect_s)
            take(diagnose_surroundings(board, asked))
        levels = Counter(finding.level for finding in findings)
    if output == "json":
        print(json.dumps({
            "profile": profile.name if profile else None,
            "errors": levels["error"], "warnings": levels["warning"], "ok": levels["ok"],
            "findings": [{name: getattr(finding, name) for name in finding.__struct_fields__}
                         for finding in findings],
        }))  # fmt: skip
    else:
        print(f"errors {levels['error']}, warnings {levels['warning']}, in order {levels['ok']}")
    sys.exit(ERRORS_FOUND if levels["error"] else 0)


def _show(finding: object) -> None:
    check, level, what, why, remedy = (
        getattr(finding, name) for name in ("check", "level", "what", "why", "remedy")
    )
    print(f"{_MARKS[level]:8} {check:16} {what}", flush=True)
    if level != "ok":
        print(f"{'':25} why: {why}\n{'':25} do:  {remedy}", flush=True)
