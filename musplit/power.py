"""`musplit power`: which meters are here, and what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from musplit.support import FiniteRange, fail, format_option, guarded, meter_options, say


@click.command()
@meter_options
@click.option("--seconds", default=10.0, type=FiniteRange(0.1, 86_400), show_default=True,
              metavar="S", help="How long to read.")  # fmt: skip
@click.option("--recorded", type=click.Path(path_type=Path), metavar="FILE",
              help="Integrate a CSV file that a meter has recorded, instead.")  # fmt: skip
@click.option("--csv", "samples", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the readings: t_s, power_w.")  # fmt: skip
@format_option
def power(
    profile: str | None, meter: str, meter_hz: float | None, seconds: float,
    recorded: Path | None, samples: Path | None, require_measured: bool, output: str,
) -> None:  # fmt: skip
    """List this machine's power meters, read one for some seconds, and print watts and joules.

    Where there is no meter, it says why, and what the board's model gives for an idle board.

    \b
    musplit power
    musplit power --meter ina226:1-0040 --seconds 30 --csv samples.csv
    musplit power --meter plug-http:shelly2@192.168.1.20 --format json
    musplit power --recorded 'fnb58.csv?time=Time[S]'
    """
    with guarded():
        from edge_client.power.check import check_power, read_file
        from edge_client.power.choose import profile_here
        from edge_client.power.find import MeterOptions
        from firmware_profiles.catalogue import load_profile

        if recorded is not None:
            checked = read_file(str(recorded))
        else:
            board = load_profile(profile) if profile else profile_here()
            options = MeterOptions(meter, meter_hz)
            checked = check_power(options, board, named=profile is not None, seconds=seconds)
        if samples is not None and checked.trace is not None:
            rows = zip(checked.trace.times_s, checked.trace.powers_w, strict=True)
            lines = [f"{time_s:.6f},{watts:.6g}\n" for time_s, watts in rows]
            samples.write_text("t_s,power_w\n" + "".join(lines), encoding="utf-8")
        _show(checked.as_json(), output)
    if require_measured and checked.reason:
        fail(f"energy is not measured here: {checked.reason}", 8)


def _show(checked: dict[str, Any], output: str) -> None:
    if output == "json":
        print(json.dumps(checked))
        return
    for found in checked["meters"]:
        detail = found["detail"].removeprefix(f"{found['kind']}: ")
        print(f"{found['kind']:<8}  {'usable' if found['usable'] else '-':<6}  {detail}")
    if checked["reason"]:
        say(f"not measured: {checked['reason']}")
    energy = checked["energy"]
    match energy["type"]:
        case "measured":
            mean_w = energy["energy_j"] / energy["window_s"]
            print(
                f"measured  {energy['energy_j']:.3f} J +-{energy['uncertainty_j']:.3f} J in "
                f"{energy['window_s']:.2f} s: {mean_w:.3f} W at {energy['origin']['boundary']}\n"
                f"          {energy['samples']} readings of {energy['origin']['driver']}, "
                f"{energy['rate_hz']:.2f} Hz, largest gap {energy['largest_gap_s']:.2f} s"
            )
            if checked["sampler_core"] is not None:
                print(f"          sampler: {100 * checked['sampler_core']:.2f} % of a core")
        case "modelled":
            print(
                f"modelled  {energy['modelled_j']:.3f} J, between {energy['modelled_low_j']:.3f} "
                f"and {energy['modelled_high_j']:.3f} J, for {energy['window_s']:.2f} s of an idle "
                f"board at {energy['boundary']}\n          {energy['model']}; {energy['source']}"
            )
        case _:
            print("energy    none", file=sys.stdout)
