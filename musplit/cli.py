"""The command line. Heavy imports stay inside the commands, so that help works on a bare board."""

from __future__ import annotations

import click

from musplit.bench import bench
from musplit.calibrate import calibrate
from musplit.doctor import doctor
from musplit.export import evaluate, export
from musplit.flash import flash, wheelhouse
from musplit.fleet import broker, device, replay, serve, shard
from musplit.identity import ca, enroll_device
from musplit.laptop import emulate, plan, simulate, study
from musplit.power import power
from musplit.profiles import profiles
from musplit.report import report
from musplit.stem import stem
from musplit.warmup import warmup

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="musplit", message="musplit %(version)s")
def main() -> None:
    """Split federated learning for boards: forward-only devices, zeroth-order updates, MQTT.

    \b
    On a laptop, everything at once:   musplit emulate
    On a lab bench:                    musplit ca init --host HOST   (docs/security.md)
                                       musplit broker --listen 0.0.0.0 --tls broker
                                       musplit shard DATA --devices 8 --out shards
                                       musplit serve CONFIG --broker HOST --identity DIR
    and on each board:                 musplit enroll ..
                                       musplit device --id ID --broker HOST --identity DIR ..
    """


for _command in (
    bench, broker, ca, calibrate, device, doctor, emulate, evaluate, export, flash, plan, power,
    profiles, replay, report, serve, shard, simulate, stem, study, warmup, wheelhouse,
):  # fmt: skip
    main.add_command(_command)
main.add_command(enroll_device, "enroll")
