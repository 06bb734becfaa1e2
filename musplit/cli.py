"""The command line. Heavy imports stay inside the commands, so that help works on a bare board."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from musplit.bench import bench
from musplit.calibrate import calibrate
from musplit.doctor import doctor
from musplit.flash import flash, wheelhouse
from musplit.identity import ca, enroll_device
from musplit.laptop import emulate, plan, simulate, study
from musplit.power import power
from musplit.profiles import profiles
from musplit.report import report
from musplit.stem import stem
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
from musplit.warmup import warmup

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_SEED = click.IntRange(0, (1 << 63) - 1)
_SHAPE_HELP = (
    "Sample shape without the batch, e.g. 1,28,28, or int:64 for integers; needed for your own "
    "model, once per input."
)


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


@main.command()
@click.argument("model", required=False)
@click.option("--from-run", "run", type=click.Path(path_type=Path), metavar="RUN",
              help="Instead of MODEL: a run folder, whose trained model is written to OUT."
              )  # fmt: skip
@click.option("--cut", help="Module after which to cut; it stays on the device.")
@click.option("--list-cuts", is_flag=True, help="List all cuts, what they cost, and write nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--seed", default=0, type=_SEED, show_default=True, help="Of the initial weights.")
@click.option("--input-shape", "shapes", multiple=True, metavar="[int:]N,N,..", help=_SHAPE_HELP)
@click.option("--weights", type=click.Path(path_type=Path),
              help="A safetensors file with the weights to start from.")  # fmt: skip
@click.option("--perturb", multiple=True, metavar="WHAT",
              help="What the device trains: tensor names, norms, adapters:R, or none; repeatable.  "
              "[default: everything]")  # fmt: skip
@format_option
def export(
    model: str | None, run: Path | None, cut: str | None, list_cuts: bool, out: Path | None,
    seed: int, shapes: tuple[str, ...], weights: Path | None, perturb: tuple[str, ...], output: str,
) -> None:  # fmt: skip
    """Cut a model in two: OUT/client for the devices, OUT/server, which never leaves the server.

    MODEL is one of mlp:64-32-32-10, lenet, alexnet, resnet18, resnet18-bn, mobilenetv2,
    mobilenetv2-bn, stem:256, or path/to/file.py:factory, a function or class that gives an
    nn.Module. All but mlp and stem take options in any order: a number is the classes, cN the
    channels, wN the width: resnet18:100, alexnet:10:c1:w8. Every export is proved against torch
    with perturbed weights.

    \b
    musplit export resnet18 --list-cuts
    musplit export mlp:64-32-32-10 --cut fc1 --out halves
    musplit export my_model.py:make --cut body.1 --input-shape 1,28,28 --out halves
    musplit export tokens.py:Net --cut embedding --input-shape int:64 --out halves

    With --from-run the whole trained model comes out, and needs musplit no more: model.onnx takes
    raw samples as the data set holds them, model.safetensors the weights by the model's own names,
    model.json says which inputs and classes; proved against the split pair.

    \b
    musplit export --from-run runs/digits-20260101-120000 --out trained
    """
    with guarded():
        if (model is None) == (run is None):
            fail("export: give MODEL, or --from-run RUN", 2)
        if run is not None:
            _export_run(run, out, output)
            return
        assert model is not None
        if list_cuts:
            _print_cuts(model, seed, shapes, output)
            return
        if cut is None or out is None:
            fail("export: needs --cut and --out, or --list-cuts to see the cuts", 2)
        from export.exporter import export_model

        with redirect_stdout(sys.stderr):  # the user's model may print
            result = export_model(
                model, cut, out, seed=seed, input_shape=shapes, weights=weights, perturb=perturb
            )
        facts: dict[str, Any] = {
            "client": str(result.client),
            "server": str(result.server),
            "digest": result.digest,
            "parameters_client": result.manifest.parameters,
            "frozen_client": result.manifest.frozen,
            "parameters_server": result.server_parameters,
            "activation_shape": result.manifest.activation.shape,
            "parity_max_relative_error": result.manifest.parity_max_relative_error,
        }
        if output == "json":
            print(json.dumps(facts | {"notes": result.notes}))
        else:
            for name, value in facts.items():
                print(f"{name:26} {value}")
            for note in result.notes:
                print(f"note: {note}")


def _export_run(run: Path, out: Path | None, output: str) -> None:
    if out is None:
        fail("export --from-run: needs --out", 2)
    from server_node.trained import export_run

    with redirect_stdout(sys.stderr):
        trained = export_run(run, out)
    facts = {
        name: value if isinstance(value, float) else str(value)
        for name, value in trained._asdict().items()
    }
    if output == "json":
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:26} {value}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Another data set, in a form that data.source takes.")
@format_option
def evaluate(run: Path, data: str | None, output: str) -> None:
    """Score the trained model of a run folder again, on the run's test set or on another.

    Weights come from the journal, checked against its digests; the arithmetic is the run's, so that
    its accuracy is repeated exactly.

    \b
    musplit evaluate runs/digits-20260101-120000
    musplit evaluate runs/digits-20260101-120000 --data other.npz --format json
    """
    with guarded():
        from server_node.trained import evaluate_run

        with redirect_stdout(sys.stderr):
            facts = evaluate_run(run, data)
    if output == "json":
        print(json.dumps(facts))
        return
    for name in ("accuracy", "loss", "samples", "data", "rounds"):
        print(f"{name:22} {facts[name]}")
    if facts["accuracy_of_summary"] is not None:
        same = facts["accuracy_of_summary"] == facts["accuracy"]
        print(f"{'summary.json says':22} {'the same' if same else facts['accuracy_of_summary']}")
    for note in facts["notes"]:
        say(f"note: {note}")


def _print_cuts(model: str, seed: int, shapes: tuple[str, ...], output: str) -> None:
    from export.listing import as_json, list_cuts, table
    from export.models import build_model

    with redirect_stdout(sys.stderr):
        cuts = list_cuts(build_model(model, seed, shapes))
    print(json.dumps(as_json(cuts)) if output == "json" else table(cuts))


@main.command()
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


@main.command()
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
        from edge_client.agent import AgentSettings
        from edge_client.power.choose import EnergyChoice
        from edge_client.power.find import MeterOptions
        from edge_client.program import run_device
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


@main.command()
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

        address, notify = parse_address(broker, tls=identity is not None), server_notifier(output)
        access = Access(address, tls_for(address, identity, insecure=insecure), connect_s)
        if resume is not None:
            check_alone(resume, {"CONFIG": config, "--out": out, "--set": overrides})
            with redirect_stdout(sys.stderr):
                summary = resume_server(resume, access, notify)
        elif config is None:
            fail("give CONFIG, or --resume RUN", 2)
        else:
            checked = load_config(config, list(overrides))
            folder = out or run_folder(config)
            with redirect_stdout(sys.stderr):  # events go where stdout was
                summary = run_server(checked, access, folder, notify)
        if require_measured and summary["measured_energy_j"] is None:
            fail(summary["measured_energy_reason"], 8)


@main.command()
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


@main.command()
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

        if halves is None:
            halves = run if (run / "client").is_dir() else run.parent
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


for _command in (
    bench, ca, calibrate, doctor, emulate, flash, plan, power, profiles, report, simulate, stem,
    study, warmup, wheelhouse,
):  # fmt: skip
    main.add_command(_command)
main.add_command(enroll_device, "enroll")
