"""`musplit serve`: prepare, gather the fleet, run, run the frozen-client control, sum up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server_node.actions import Outcome
from server_node.config import Config
from server_node.errors import DivergedError
from server_node.node import Node
from server_node.partition import shard_name
from server_node.plot import plot_run
from server_node.prepare import Experiment, prepare
from server_node.run import Run
from server_node.summary import RunResult, summarise, write_summary
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.errors import StalledError, TransportError
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.mqtt import Address, Link
from wire_protocol.topics import Topics


def serve(
    config: Config, address: Address, folder: Path, *, connect_s: float,
    notify: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Serve one experiment; returns the summary, which is also in FOLDER/summary.json.

    Raises a MusplitError; the journal and the metrics written so far stay.
    """
    keep_freed_memory()
    experiment = prepare(config, folder)
    notify(
        {"event": "prepared", "folder": str(folder), "bundle_sha256": experiment.exported.digest,
         "parameters_client": experiment.exported.manifest.parameters,
         "parameters_server": experiment.exported.server_parameters,
         "data_notes": experiment.data_notes, "notes": experiment.exported.notes}
    )  # fmt: skip
    link = Link(
        f"{config.run.fleet}//server", address,
        subscriptions=Topics(config.run.fleet).all_uplinks,
        packet_limit=config.wire.packet_limit,
    )  # fmt: skip
    link.open(connect_s)
    try:
        if link.packet_limit is not None and link.packet_limit < MAX_FRAME_BYTES:
            notify({"event": "packet-limit", "bytes": link.packet_limit})
        notify(
            {"event": "waiting", "devices": config.devices.count,
             "command": device_command(config, address)}
        )  # fmt: skip
        node = Node(experiment, link, notify)
        node.gather()
        main = _run(node, frozen=False, final=not config.evaluation.control)
        planned, diverged = config.evaluation.control, _divergence(main.run)
        reason = "the control run was not finished" if planned else "evaluation.control is off"
        summary = _sum_up(experiment, main, "the run diverged" if diverged else reason, link)
        if planned and not diverged:  # whatever becomes of it, the run above is on disk
            summary = _sum_up(experiment, main, _control(node), link)
    finally:
        link.close()
    notify({"event": "summary", **summary})
    if diverged:
        raise DivergedError(
            f"{diverged} (method.eta_s, method.eta_c; fewer devices and directions want smaller "
            f"ones); the run so far is in {folder}"
        )
    return summary


def device_command(config: Config, address: Address) -> str:
    """What to paste on the first device."""
    fleet = "" if config.run.fleet == "lab" else f" --fleet {config.run.fleet}"
    return f"musplit device --id device-000 --broker {address}{fleet} --data {shard_name(0)}"


def _divergence(run: Run) -> str:
    """What was seen of a run that diverged; empty for one that did not."""
    finished = run.finished
    diverged = finished is not None and finished.outcome is Outcome.DIVERGED
    return finished.detail if finished is not None and diverged else ""


def _sum_up(
    experiment: Experiment, main: RunResult, control: RunResult | str, link: Link
) -> dict[str, Any]:
    """Write summary.json and the plot."""
    config, folder = experiment.config, experiment.folder
    summary = summarise(experiment, main, control, f"MQTT {link.protocol}")
    summary |= {"max_packet_bytes": link.packet_limit, "chunked": link.chunked}
    write_summary(folder, summary)
    plot_run(folder, f"{config.data.source}, {config.model.name}, tau {config.method.tau}")
    return summary


def _control(node: Node) -> RunResult | str:
    """The frozen-client control; when the fleet does not get through it, the reason."""
    try:
        return _run(node, frozen=True, final=True)
    except (StalledError, TransportError) as error:
        return f"the control run failed: {error}"


def _run(node: Node, *, frozen: bool, final: bool) -> RunResult:
    begin_s = time.monotonic()
    run = node.run(frozen=frozen, final=final)
    return RunResult(run, time.monotonic() - begin_s, run.ledger.traffic.totals())
