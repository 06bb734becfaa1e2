"""`musplit serve`: prepare, gather the fleet, run, run the frozen-client control, sum up.

A stopped run goes on from its folder: whatever of this its journals say is done is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from identity.access import server_name
from server_node.actions import Outcome
from server_node.config import Config, load_config
from server_node.errors import ConfigError, DivergedError, JournalError
from server_node.files import CONFIG_FILE, CONTROL_FOLDER, claimed
from server_node.journal import JOURNAL_FILE
from server_node.machine import environment
from server_node.node import Node
from server_node.partition import shard_name
from server_node.plot import plot_run
from server_node.prepare import (
    Experiment,
    control_config,
    prepare,
)
from server_node.recorder import read_rounds
from server_node.resume import History, Past, check_identity, read_past, rebuild
from server_node.summary import (
    UNFINISHED_CONTROL,
    RunResult,
    result_of,
    result_of_past,
    summarise,
    write_energies,
)
from server_node.summary_file import read_summary, write_summary
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.errors import IdentityError, StalledError, TransportError
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.mqtt import Address, Link, TlsFiles
from wire_protocol.tls import own_name
from wire_protocol.topics import Topics

Notify = Callable[[dict[str, Any]], None]


class Access(NamedTuple):
    """How the server reaches the broker.

    With `tls` it signs bundles by the key that lies beside its own; without, they are not signed.
    """

    address: Address
    tls: TlsFiles | None = None
    connect_s: float = 15.0  # how long to try at the start


class _Progress(NamedTuple):
    """How far an experiment came before this start; None: not begun."""

    main: History | None
    control: History | None

    @property
    def main_done(self) -> bool:
        """Only the control, if that, is missing."""
        return self.main is not None and self.main.past.ended == Outcome.COMPLETE.value

    @property
    def control_done(self) -> bool:
        """The control has a result; one that diverged is one."""
        ends = (Outcome.COMPLETE.value, Outcome.DIVERGED.value)
        return self.control is not None and self.control.past.ended in ends


def serve(config: Config, access: Access, folder: Path, notify: Notify) -> dict[str, Any]:
    """Serve one experiment; returns the summary, which is also in FOLDER/summary.json.

    Raises a MusplitError; the journal and the metrics written so far stay.
    """
    keep_freed_memory()
    with claimed(folder):
        if any((place / JOURNAL_FILE).exists() for place in (folder, folder / CONTROL_FOLDER)):
            raise ConfigError(
                f"{folder}: holds a run already; give another --out, remove it, or go on with it: "
                f"musplit serve --resume {folder}"
            )
        experiment = prepare(config, folder)
        return _serve(experiment, _Progress(None, None), access, notify)


def resume(folder: Path, access: Access, notify: Notify) -> dict[str, Any]:
    """Go on with the run in FOLDER after any stop; otherwise as `serve`.

    Raises JournalError when the run would not go on with what it began with, DivergedError for a
    run that diverged.
    """
    keep_freed_memory()
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: holds no run ({CONFIG_FILE} is missing); nothing to resume")
    with claimed(folder):
        config = load_config(folder / CONFIG_FILE, [])
        past = _take_up(folder)
        if past is not None and past.ended == Outcome.DIVERGED.value:
            raise DivergedError(
                f"{folder}: the run diverged after {len(past.rounds)} rounds and cannot go on; "
                "start another one with smaller steps (method.eta_s, method.eta_c)"
            )
        experiment = prepare(config, folder, past)
        main = _rebuild(experiment, past, notify)
        progress = _Progress(main, None)
        if not experiment.no_control:
            past = _take_up(folder / CONTROL_FOLDER)
            progress = progress._replace(control=_rebuild(experiment, past, notify))
        return _serve(experiment, progress, access, notify)


def _take_up(folder: Path) -> Past | None:
    """The past in a folder; what has no closed round makes place for a new beginning."""
    past = read_past(folder)
    if past is None and any(True for _ in read_rounds(folder)):
        raise JournalError(
            f"{folder / JOURNAL_FILE}: holds no round, but rounds.jsonl does; restore the journal "
            "from a copy, or start a new run"
        )
    if past is None:
        (folder / JOURNAL_FILE).unlink(missing_ok=True)
    return past


def _rebuild(experiment: Experiment, past: Past | None, notify: Notify) -> History | None:
    if past is None:
        return None
    frozen = past.folder != experiment.folder
    config = control_config(experiment.config) if frozen else experiment.config
    digests = experiment.exported.digest, experiment.server_weights_sha256
    check_identity(past, config.sha256(), *digests)
    history = rebuild(past, experiment.client.initial_parameters(), experiment.server_weights)
    began, here = past.header.environment, environment()
    changed = [f"{k} {began.get(k)} -> {v}" for k, v in here.items() if began.get(k) != v]
    if changed:
        history.notes.append(f"other versions or machine than at first: {', '.join(changed)}")
    closed, ended = len(past.rounds), past.ended or "cut off"
    name = "control" if frozen else "run"
    text = f"{name}: {closed} of {config.run.rounds} rounds are closed ({ended})"
    notify(
        {"event": "resumed", "frozen": frozen, "rounds_closed": closed,
         "text": "; ".join([text, *history.notes])}
    )  # fmt: skip
    return history


def _serve(
    experiment: Experiment, progress: _Progress, access: Access, notify: Notify
) -> dict[str, Any]:
    config, folder = experiment.config, experiment.folder
    notify(
        {"event": "prepared", "folder": str(folder), "bundle_sha256": experiment.exported.digest,
         "parameters_client": experiment.exported.manifest.parameters,
         "parameters_server": experiment.exported.server_parameters,
         "data_notes": experiment.data_notes, "notes": experiment.exported.notes}
    )  # fmt: skip
    planned = not experiment.no_control
    if progress.main_done and (progress.control_done or not planned):
        summary = _finished_summary(experiment, progress)
        notify({"event": "summary", **summary})
        return summary
    signature = _signature(access, config.run.fleet, experiment.exported.digest)
    link = Link(
        f"{config.run.fleet}//server", access.address,
        subscriptions=Topics(config.run.fleet).all_uplinks,
        packet_limit=config.wire.packet_limit, tls=access.tls,
    )  # fmt: skip
    link.open(access.connect_s)
    try:
        if link.packet_limit is not None and link.packet_limit < MAX_FRAME_BYTES:
            notify({"event": "packet-limit", "bytes": link.packet_limit})
        notify(
            {"event": "waiting", "devices": config.devices.count,
             "command": device_command(config, access)}
        )  # fmt: skip
        latest = progress.control or progress.main
        known = latest.past.devices if latest else ()
        node = Node(experiment, link, notify, known, signature)
        if progress.main is not None and progress.main_done:
            main = result_of_past(experiment, progress.main)
        else:
            node.gather()
            main = _run(node, progress.main, frozen=False, final=not planned)
        diverged = main.detail if main.outcome == Outcome.DIVERGED.value else ""
        reason = UNFINISHED_CONTROL if planned else experiment.no_control
        summary = _sum_up(experiment, main, "the run diverged" if diverged else reason, link)
        if planned and not diverged:  # whatever becomes of it, the run above is on disk
            summary = _sum_up(experiment, main, _control(node, progress.control), link)
    finally:
        link.close()
    notify({"event": "summary", **summary})
    if diverged:
        raise DivergedError(
            f"{diverged} (method.eta_s, method.eta_c; fewer devices and directions want smaller "
            f"ones); the run so far is in {folder}"
        )
    return summary


def _signature(access: Access, fleet: str, digest: str) -> bytes:
    """Of the bundle; cryptography is needed only where there is an identity."""
    if access.tls is None:
        return b""
    name = own_name(access.tls.certificate)
    if name != server_name(fleet):
        raise IdentityError(
            f"{access.tls.certificate}: is the certificate of {name!r}; the server of fleet "
            f"{fleet!r} needs servers/{fleet} of the authority's folder (musplit ca fleet {fleet})"
        )
    from identity.signatures import sign_bundle  # noqa: PLC0415

    return sign_bundle(access.tls.folder, digest)


def device_command(config: Config, access: Access) -> str:
    """What to paste on the first device."""
    fleet = "" if config.run.fleet == "lab" else f" --fleet {config.run.fleet}"
    if access.tls is not None:
        fleet += " --identity identity"
    elif not access.address.is_loopback:
        fleet += " --insecure"
    broker = f" --broker {access.address}"
    return f"musplit device --id device-000{broker}{fleet} --data {shard_name(0)}"


def _finished_summary(experiment: Experiment, progress: _Progress) -> dict[str, Any]:
    """The summary of an experiment that is over: as written, or made again where it is missing."""
    assert progress.main is not None
    control: RunResult | str = experiment.no_control
    summary = read_summary(experiment.folder)
    if summary is not None and not (
        progress.control and summary.get("outcome_frozen_client") is None
    ):
        return summary
    if progress.control is not None:
        control = result_of_past(experiment, progress.control)
    return _sum_up(experiment, result_of_past(experiment, progress.main), control, None)


def _sum_up(
    experiment: Experiment, main: RunResult, control: RunResult | str, link: Link | None
) -> dict[str, Any]:
    """Write summary.json and the plot."""
    config, folder = experiment.config, experiment.folder
    broker = f"MQTT {link.protocol}" if link is not None else None
    summary = summarise(experiment, main, control, broker)
    summary |= {
        "max_packet_bytes": link.packet_limit if link is not None else None,
        "chunked": link.chunked if link is not None else None,
    }
    write_summary(folder, summary)
    write_energies(folder, main.energies)
    plot_run(folder, f"{config.data.source}, {config.model.name}, tau {config.method.tau}")
    return summary


def _control(node: Node, history: History | None) -> RunResult | str:
    """The frozen-client control; when the fleet does not get through it, the reason."""
    try:
        return _run(node, history, frozen=True, final=True)
    except (StalledError, TransportError) as error:
        return f"the control run failed: {error}"


def _run(node: Node, history: History | None, *, frozen: bool, final: bool) -> RunResult:
    begin_s = time.monotonic()
    run = node.run(frozen=frozen, final=final, history=history)
    resumed = history.past.resumed + 1 if history is not None else 0
    return result_of(run, time.monotonic() - begin_s, resumed)
