"""The command line. Heavy imports stay inside the commands, so that help works on a bare board."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from musplit.support import (
    SECONDS,
    FiniteRange,
    broker_options,
    check_alone,
    fail,
    format_option,
    guarded,
    parse_address,
    resume_option,
    say,
    set_option,
)

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_SEED = click.IntRange(0, (1 << 63) - 1)
_SHAPE_HELP = "Sample shape without the batch, e.g. 1,28,28; needed for your own model."


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="musplit", message="musplit %(version)s")
def main() -> None:
    """Split federated learning for boards: forward-only devices, zeroth-order updates, MQTT.

    \b
    On a laptop, everything at once:   musplit emulate
    On a lab bench:                    musplit broker --listen 0.0.0.0 --insecure
                                       musplit shard DATA --devices 8 --out shards
                                       musplit serve CONFIG --broker HOST
    and on each board:                 musplit device --id ID --broker HOST --data SHARD
    """


@main.command()
@click.argument("model")
@click.option("--cut", required=True, help="Layer after which to cut; it stays on the device.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--seed", default=0, type=_SEED, show_default=True, help="Of the initial weights.")
@click.option("--input-shape", metavar="N,N,..", help=_SHAPE_HELP)
@format_option
def export(
    model: str, cut: str, out: Path, seed: int, input_shape: str | None, output: str
) -> None:
    """Cut a model in two: OUT/client for the devices, OUT/server, which never leaves the server.

    MODEL is mlp:64-32-32-10, lenet, or path/to/file.py:factory, a function that returns an
    nn.Sequential. Every export is proved against torch with perturbed weights.

    \b
    musplit export mlp:64-32-32-10 --cut fc1 --out halves
    musplit export my_model.py:make --cut 1 --input-shape 1,28,28 --out halves
    """
    with guarded():
        from export.exporter import export_model

        result = export_model(model, cut, out, seed=seed, input_shape=_shape(input_shape))
        facts: dict[str, Any] = {
            "client": str(result.client),
            "server": str(result.server),
            "digest": result.digest,
            "parameters_client": result.manifest.parameters,
            "parameters_server": result.server_parameters,
            "activation_shape": result.manifest.activation.shape,
            "parity_max_relative_error": result.manifest.parity_max_relative_error,
        }
        if output == "json":
            print(json.dumps(facts))
        else:
            for name, value in facts.items():
                print(f"{name:26} {value}")


@main.command()
@click.argument("data")
@click.option("--devices", required=True, type=click.IntRange(1), help="Number of shards.")
@click.option("--alpha", default=0.0, type=FiniteRange(0), show_default=True,
              help="Dirichlet concentration by label; 0 is iid, 0.1 very skewed.")  # fmt: skip
@click.option("--seed", default=0, type=_SEED, show_default=True, help="As run.seed.")
@click.option("--holdout", default=0.0, type=FiniteRange(0, 1, max_open=True),
              show_default=True, help="Part of the training set to leave out.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def shard(data: str, devices: int, alpha: float, seed: int, holdout: float, out: Path) -> None:
    """Write the data shards that boards carry: OUT/shard-000.npz and so on.

    DATA is 'digits', an npz file with x_train, y_train, x_test, y_test, or a folder of IDX files.

    \b
    musplit shard digits --devices 8 --out shards
    musplit shard fashion/ --devices 8 --alpha 0.5 --out shards
    """
    with guarded():
        from server_node.datasets import load_dataset
        from server_node.partition import write_shards

        for path in write_shards(load_dataset(data, holdout), devices, alpha, seed, out):
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
@click.option("--wait-s", default=600.0, type=SECONDS, show_default=True, metavar="S",
              help="Give up when the server is silent for this long.")  # fmt: skip
@click.option("--offline-s", default=300.0, type=SECONDS, show_default=True, metavar="S",
              help="Give up when a lost broker stays away for this long.")  # fmt: skip
def device(
    device_id: str, broker: str, connect_s: float, data: Path, fleet: str, bundle: Path | None,
    state: Path | None, threads: int, speed: float, delay_s: float, wait_s: float,
    offline_s: float,
) -> None:  # fmt: skip
    """Take part in a run as one device: forward passes only, no torch.

    Fetches the client bundle when it lacks it, answers rounds, replays commits, and keeps its
    state on disk, so that it can be killed and started again at any time.

    \b
    musplit device --id pi-1 --broker 192.168.1.10 --data shard-000.npz
    """
    with guarded():
        from edge_client.agent import AgentSettings
        from edge_client.program import run_device

        settings = AgentSettings(
            device_id, fleet, threads=threads, speed=speed, delay_s=delay_s, bundle=bundle,
            wait_s=wait_s, offline_s=offline_s,
        )  # fmt: skip
        folder = state or Path("musplit-state") / device_id
        run_device(settings, parse_address(broker), data, folder, connect_s, say)


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@broker_options
@click.option("--out", type=click.Path(path_type=Path),
              help="Run folder.  [default: runs/NAME-TIME]")  # fmt: skip
@set_option
@resume_option
@format_option
def serve(
    config: Path | None, broker: str, connect_s: float, out: Path | None,
    overrides: tuple[str, ...], resume: Path | None, output: str,
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
        from server_node.serve import resume as resume_server
        from server_node.serve import serve as run_server

        address, notify = parse_address(broker), server_notifier(output)
        if resume is not None:
            check_alone(resume, {"CONFIG": config, "--out": out, "--set": overrides})
            resume_server(resume, address, connect_s=connect_s, notify=notify)
        elif config is None:
            fail("give CONFIG, or --resume RUN", 2)
        else:
            checked = load_config(config, list(overrides))
            folder = out or _run_folder(config)
            run_server(checked, address, folder, connect_s=connect_s, notify=notify)


@main.command()
@click.option("--listen", default="127.0.0.1:1883", show_default=True, metavar="ADDRESS[:PORT]",
              help="Where to listen; beyond loopback only with --insecure.")  # fmt: skip
@click.option("--insecure", is_flag=True, help="Allow an address that other machines can reach.")
def broker(listen: str, insecure: bool) -> None:
    """Run the embedded MQTT broker alone, until Ctrl-C: mosquitto if on PATH, otherwise amqtt.

    \b
    musplit broker
    musplit broker --listen 0.0.0.0 --insecure
    """
    with guarded():
        from emulation.broker import check_listen, run_broker

        address = parse_address(listen)
        check_listen(address, insecure=insecure)
        try:
            code = run_broker(address, say)
        except KeyboardInterrupt:
            say("broker stopped")
            return
        if code:
            fail(f"the broker on {address} ended with code {code}", 4)


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--data", help="Data set: 'digits', an npz file, or a folder of IDX files.")
@set_option
@click.option("--rounds", type=int, help="Same as --set run.rounds=N.")
@click.option("--clients", type=int, help="Same as --set devices.count=N.")
@click.option("--seed", type=int, help="Same as --set run.seed=N.")
@click.option("--quick", is_flag=True, help="A few rounds, to see that everything works.")
@click.option("--out", type=click.Path(path_type=Path),
              help="Run folder.  [default: runs/NAME-TIME]")  # fmt: skip
@click.option("--require", "required", multiple=True, metavar="FIELD>=VALUE",
              help="Fail unless the summary has it; repeatable: accuracy>=0.9")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path),
              help="Write the requirements as a JUnit report.")  # fmt: skip
@resume_option
@format_option
def emulate(
    config: Path | None, data: str | None, overrides: tuple[str, ...], rounds: int | None,
    clients: int | None, seed: int | None, quick: bool, out: Path | None,
    required: tuple[str, ...], junit: Path | None, resume: Path | None, output: str,
) -> None:  # fmt: skip
    """Run broker, server and devices as processes on this machine, and stop them all.

    CONFIG defaults to the digits experiment. Exit code 1 when a --require does not hold. What is
    killed is started again; --resume goes on with an emulation that was stopped as a whole.

    \b
    musplit emulate
    musplit emulate --quick --format json
    musplit emulate --data fashion/ --set model.name=mlp:784-32-32-10 --rounds 100
    musplit emulate --require 'accuracy>=0.9' --junit report.xml
    musplit emulate --resume runs/digits-20260101-120000
    """
    with guarded():
        from musplit.emulation import run_emulation

        path = config or _default_config()
        shorthand = {"data.source": data, "run.rounds": rounds, "devices.count": clients,
                     "run.seed": seed}  # fmt: skip
        given = [f"{key}={value}" for key, value in shorthand.items() if value is not None]
        quick_fields = ["run.rounds=30", "evaluation.every=5"] if quick else []
        fields = [*quick_fields, *given, *overrides]
        if resume is not None:
            check_alone(
                resume, {"CONFIG": config, "--out": out, "--set and its shorthands": fields}
            )
        code = run_emulation(
            path, fields, resume or out or _run_folder(path), list(required), junit, output,
            resume=resume is not None,
        )  # fmt: skip
    sys.exit(code)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--halves", type=click.Path(path_type=Path),
              help="Where client/ and server/ lie.  [default: RUN, then its parent]")  # fmt: skip
@format_option
def replay(run: Path, halves: Path | None, output: str) -> None:
    """Rebuild both halves of a run from bundle, server half and journal, and compare digests.

    RUN holds journal.bin, client/ and server/; nothing else is needed, on any processor. Exit
    code 1 when the digests differ from the journaled ones.

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
        print(f"rounds                 {result.rounds}")
        print(f"client_weights_sha256  {result.client_sha256}")
        print(f"server_weights_sha256  {result.server_sha256}")
        print(f"journaled digests      {verdict}")
        print(f"run ended              {'yes' if result.complete else 'no: it was cut'}")
        for note in result.notes:
            print(f"note: {note}")
    sys.exit(1 if result.matches is False else 0)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        fail(f"--input-shape {text!r}: write positive numbers, e.g. 1,28,28", 3)
    return tuple(int(part) for part in parts)


def _default_config() -> Path:
    from importlib.resources import files

    return Path(str(files("experiments").joinpath("digits.toml")))


def _run_folder(config: Path) -> Path:
    from datetime import datetime

    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.stem}-{stamp}"
