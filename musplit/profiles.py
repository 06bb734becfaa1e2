"""`musplit profiles`: the boards that musplit knows, and a user's own."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from musplit.support import format_option, guarded


@click.group()
def profiles() -> None:
    """List, show and check board profiles; your own are TOML files, named by their path.

    \b
    musplit profiles list
    musplit profiles show rpi-4b:4096
    musplit profiles check my-board.toml
    """


@profiles.command("list")
@format_option
def list_profiles(output: str) -> None:
    """The boards that ship with musplit."""
    with guarded():
        from firmware_profiles.catalogue import as_builtins, catalogue

        known = catalogue()
    if output == "json":
        print(json.dumps([as_builtins(profile) for profile in known]))
        return
    rows = [("name", "board", "memory, MB", "step", "idle W", "load W", "images")]
    rows += [
        (
            profile.name,
            profile.title,
            " ".join(map(str, profile.memory_mb)),
            f"x {profile.speed.factor.value:g}",
            f"{profile.power.idle.value_w:g}",
            f"{profile.power.load.value_w:g}",
            f"{sum(image.supported for image in profile.images)} of {len(profile.images)}",
        )
        for profile in known
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print("step: time relative to a Raspberry Pi 4B; images: supported of known")


@profiles.command()
@click.argument("profile")
@format_option
def show(profile: str, output: str) -> None:
    """Everything that is known of PROFILE, a name or a path, every number with its source."""
    with guarded():
        from firmware_profiles.catalogue import as_builtins, load_profile

        found = as_builtins(load_profile(profile))
    if output == "json":
        print(json.dumps(found))
    else:
        _print_table(found, "")


@profiles.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE..")
@format_option
def check(files: tuple[str, ...], output: str) -> None:
    """Say of each FILE whether it is a profile, and what is wrong; exit code 3 when one is not."""
    with guarded():
        from pathlib import Path

        from firmware_profiles.catalogue import read_profile
        from firmware_profiles.errors import ProfileError

        findings: list[dict[str, Any]] = []
        for file in files:
            try:
                name = read_profile(Path(file)).name
                findings.append({"file": file, "profile": name, "error": None})
            except ProfileError as error:
                findings.append({"file": file, "profile": None, "error": str(error)})
    if output == "json":
        print(json.dumps(findings))
    for finding in findings:
        if finding["error"] is not None:
            print(f"musplit: error: {finding['error']}", file=sys.stderr)
        elif output == "text":
            print(f"{finding['file']}: {finding['profile']}: in order")
    sys.exit(3 if any(finding["error"] for finding in findings) else 0)


def _print_table(table: dict[str, Any], name: str) -> None:
    """Plain fields first, one a line; a number stands with its source; then the tables in it."""
    if "confidence" in table and ("value" in table or "value_w" in table):
        number = table["value"] if "value" in table else table["value_w"]
        where = f", {table['boundary']}" if "boundary" in table else ""
        print(f"{name} = {_plain(number)}  ({table['confidence']}{where}: {table['source']})")
        return
    for key, value in table.items():
        place = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            _print_table(value, place)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                _print_table(item, f"{place}[{index}]")
        else:
            text = " ".join(map(str, value)) or "none" if isinstance(value, list) else value
            print(f"{place} = {text}")


def _plain(number: float) -> str:
    """Without an exponent for anything that a board has: 1800000000, not 1.8e+09."""
    return f"{number:.15g}"
