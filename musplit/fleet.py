"""The commands of a fleet: shard, device, serve, broker, replay."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from musplit.support import (
    PACKET_BYTES,
    SECONDS,
    FiniteRange,
    broker_options,
    check_alone,
    fail,
    format_option,
    guarded,
    meter_options,
    parse_address,
    resume_option,
    run_folder,
    say,
    set_option,
)

_SEED = click.IntRange(0, (1 << 63) - 1)


@click.command()
@click.argument("data")
@click.option("--devices", type=click.IntRange(1), help="Number of shards.")
@click.option("--alpha", type=FiniteRange(0),
              help="Dirichlet concentration by label; 0 is iid, 0.1 very skewed.  [default: 0]"
              )  # fmt: skip
@click.option("--seed", type=_SEED, help="As run.seed.  [default: 0]")
@click.option("--holdout", type=FiniteRange(0, 1, max_open=True),
              help="Part of the training set to leave out.  [default: 0]")  # fmt: skip
@set_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def shard(
    data: str, devices: int | None, alpha: float | None, seed: int | None, holdout: float | None,
    overrides: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Write the data shards that boards carry: OUT/shard-000.npz and so on.

    DATA is a run's configuration (.toml), whose data, seed and number of devices are used, or a
    data source: 'digits', an npz file, a folder of IDX files, a folder of images by class, or a
    CSV of sensor readings.

    \b
    musplit shard experiments/digits.toml --out shards
    musplit shard digits --devices 8 --out shards
    musplit shard fashion/ --devices 8 --alpha 0.5 --out shards
    musplit shard walks.csv --set data.window=64 --devices 4 --out shards
    """
    with guarded():
        from server_node.config import load_config
        from server_node.datasets import load_dataset
        from server_node.partition import write_shards
        from wire_protocol.messages import printable

        file = Path(data) if data.endswith(".toml") else None
        if file is None and devices is None:
            fail("--devices: how many shards? Only a configuration (.toml) says so itself", 3)
        given = [] if file else [f"data.source={data}"]
        given += [] if holdout is None else [f"data.holdout={holdout}"]
        config = load_config(file, [*given, *overrides])
        dataset = load_dataset(config.data)
        for note in dataset.notes:
            say(printable(f"data: {note}"))
        for path in write_shards(
            dataset, devices or config.devices.count,
            config.data.alpha if alpha is None else alpha,
            config.run.seed if seed is None else seed, out,
        ):  # fmt: skip
            print(path)


@click.command()
@click.option("--id", "device_id", required=True, help="This device's name in the fleet.")
@broker_options
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The data shard.")
@click.option("--fleet", default="lab", show_default=True, help="The server's run.fleet.")
@click.option("--bundle", type=click.Path(path_type=Path),
              help="Use this client bundle instead of fetching it.")  # fmt: skip
@click.option("--state", type=click.Path(path_type=Path),
              help="Where weights and bundles are kept.  [default: musplit-state/ID]")  # fmt: skip
@click.option("--threads", default=1, type=click.IntRange(1, 1024), show_default=True,
              help="Threads of ONNX Runtime.")  # fmt: skip
@click.option("--speed", default=1.0, type=FiniteRange(0, 1, min_open=True),
              show_default=True, help="Pad each forward to 1/speed of its time.")  # fmt: skip
@click.option("--delay-s", default=0.0, type=SECONDS, show_default=True, metavar="S",
              help="Wait before each round's first forward: a straggler.")  # fmt: skip
@click.option("--stand-in", type=click.Path(path_type=Path), metavar="FILE",
              help="Take as long as another board; musplit emulate --fleet writes FILE."
              )  # fmt: skip
@meter_options
@click.option("--wait-s", default=600.0, type=SECONDS, show_default=True, metavar="S",
              help="Give up when the server is silent for this long.")  # fmt: skip
@click.option("--offline-s", default=300.0, type=SECONDS, show_default=True, metavar="S",
              help="Give up when a lost broker stays away for this long.")  # fmt: skip
@click.option("--packet-limit", default=0, type=PACKET_BYTES, show_default=True, metavar="BYTES",
              help="Largest packet, for a broker that tells no limit; 0: none.")  # fmt: skip
def device(
    device_id: str, broker: str, identity: Path | None, insecure: bool, connect_s: float,
    data: Path, fleet: str, bundle: Path | None, state: Path | None, threads: int, speed: float,
    delay_s: float, stand_in: Path | None, profile: str | None, meter: str,
    meter_hz: float | None, require_measured: bool, wait_s: float, offline_s: float,
    packet_limit: int,
) -> None:  # fmt: skip
    """Take part in a run as one device: forward passes only, no torch.

    Fetches the client bundle when it lacks it, answers rounds, replays commits, and keeps its
    state on disk, so that it can be killed and started again at any time.

    \b
    musplit device --id pi-1 --broker 192.168.1.10 --identity identity --data shard-000.npz
    """
    with guarded():
        from edge_client.power.choose import EnergyChoice
        from edge_client.power.find import MeterOptions
        from edge_client.program import run_device
        from edge_client.settings import AgentSettings
        from edge_client.stand_in import read_stand_in
        from firmware_profiles.catalogue import load_profile
        from wire_protocol.tls import tls_for

        if stand_in is not None and (speed != 1.0 or delay_s):
            fail("--stand-in: holds the speed and the delay; leave out --speed and --delay-s", 2)
        other = read_stand_in(stand_in) if stand_in is not None else None
        choice = EnergyChoice(
            MeterOptions(meter, meter_hz), load_profile(profile) if profile else None,
            other.energy_model() if other else None,
            require_measured=require_measured,
        )  # fmt: skip
        settings = AgentSettings(
            device_id, fleet, threads=threads, speed=speed, delay_s=delay_s, stand_in=other,
            bundle=bundle, wait_s=wait_s, offline_s=offline_s, identity=identity,
        )  # fmt: skip
        folder = state or Path("musplit-state") / device_id
        address = parse_address(broker, tls=identity is not None)
        tls = tls_for(address, identity, insecure=insecure)
        run_device(
            settings, address, tls, data, folder, connect_s, packet_limit, say, choice
        )  # fmt: skip


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@broker_options
@click.option("--out", type=click.Path(path_type=Path),
              help="Run folder.  [default: runs/NAME-TIME]")  # fmt: skip
@set_option
@resume_option
@click.option("--require-measured", is_flag=True,
              help="End with code 8 unless every device measured its energy.")  # fmt: skip
@format_option
def serve(
    config: Path | None, broker: str, identity: Path | None, insecure: bool, connect_s: float,
    out: Path | None, overrides: tuple[str, ...], resume: Path | None, require_measured: bool,
    output: str,
) -> None:  # fmt: skip
    """Run an experiment as its server: export, wait for the devices, train, run the control.

    CONFIG is a TOML file; docs/configuration.md explains every field. Prints the command to paste
    on a device. Ctrl-C ends the run and keeps what was journaled; --resume goes on with it.

    \b
    musplit serve experiments/digits.toml --broker 127.0.0.1 --set devices.count=2
    musplit serve --resume runs/digits-20260101-120000 --broker 127.0.0.1
    """
    with guarded():
        from musplit.progress import server_notifier
        from server_node.config import load_config
        from server_node.serve import Access
        from server_node.serve import resume as resume_server
        from server_node.serve import serve as run_server
        from wire_protocol.tls import tls_for

        if resume is not None:
            check_alone(resume, {"CONFIG": config, "--out": out, "--set": overrides})
        elif config is None:
            fail("give CONFIG, or --resume RUN", 2)
        address, notify = parse_address(broker, tls=identity is not None), server_notifier(output)
        access = Access(address, tls_for(address, identity, insecure=insecure), connect_s)
        if resume is not None:
            with redirect_stdout(sys.stderr):
                summary = resume_server(resume, access, notify)
        else:
            assert config is not None
            checked = load_config(config, list(overrides))
            folder = out or run_folder(config)
            with redirect_stdout(sys.stderr):  # events go where stdout was
                summary = run_server(checked, access, folder, notify)
        if require_measured and summary["measured_energy_j"] is None:
            fail(summary["measured_energy_reason"], 8)


@click.command()
@click.option("--listen", default="127.0.0.1", show_default=True, metavar="ADDRESS[:PORT]",
              help="Where to listen, port 1883 or with --tls 8883; beyond loopback only with --tls "
              "or --insecure.")  # fmt: skip
@click.option("--tls", type=click.Path(path_type=Path), metavar="DIR",
              help="A folder of musplit ca broker-config: certificates, access and revocations."
              )  # fmt: skip
@click.option("--insecure", is_flag=True, help="Allow an address that other machines can reach.")
@click.option("--max-packet", default=0, type=PACKET_BYTES, metavar="BYTES",
              help="Largest packet, mosquitto only; 0: the largest frame fits.")  # fmt: skip
def broker(listen: str, tls: Path | None, insecure: bool, max_packet: int) -> None:
    """Run the embedded MQTT broker alone, until Ctrl-C: mosquitto if on PATH, otherwise amqtt.

    With --tls only who has a certificate of the lab gets in, and acts as itself alone.

    \b
    musplit broker
    musplit broker --listen 0.0.0.0 --tls broker
    musplit broker --listen 0.0.0.0 --insecure
    """
    with guarded():
        from emulation.broker import check_listen, run_broker

        address = parse_address(listen, tls=tls is not None)
        check_listen(address, tls, insecure=insecure)
        try:
            code = run_broker(address, say, max_packet, tls)
        except KeyboardInterrupt:
            say("broker stopped")
            return
        if code:
            fail(f"the broker on {address} ended with code {code}", 4)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--halves", type=click.Path(path_type=Path),
              help="Where client/ and server/ lie.  [default: RUN, then its parent]")  # fmt: skip
@format_option
def replay(run: Path, halves: Path | None, output: str) -> None:
    """Rebuild both halves of a run from bundle, server half and journal, and compare digests.

    RUN holds journal.bin, client/ and server/; nothing else is needed, on any processor. The server
    half of a first-order run needs frames.bin too, torch, and what the run computed on. Exit
    code 1 when the digests differ from the journaled ones, or frames.bin ends too early.

    \b
    musplit replay runs/digits-20260101-120000
    """
    with guarded():
        from server_node.replay import replay as replay_run
        from wire_protocol.manifest import CLIENT_FOLDER

        if halves is None:
            halves = run if (run / CLIENT_FOLDER).is_dir() else run.parent
        result = replay_run(run, halves)
    if output == "json":
        print(json.dumps(result._asdict()))
    else:
        verdict = {True: "match", False: "DIFFER", None: "not journaled"}[result.matches]
        told = f"rounds {result.server_first_round} to {result.server_rounds - 1}"
        print(f"rounds                 {result.rounds}")
        print(f"client_weights_sha256  {result.client_sha256}")
        print(f"server_weights_sha256  {result.server_sha256}")
        print(f"server half replayed   {told}")
        print(f"journaled digests      {verdict}")
        print(f"run ended              {'yes' if result.complete else 'no: it was cut'}")
        for note in result.notes:
            print(f"note: {note}")
    whole = result.server_rounds == result.rounds
    sys.exit(1 if result.matches is False or not whole else 0)
