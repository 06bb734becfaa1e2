"""`musplit device`: shard, state folder, link and agent put together."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from edge_client.agent import Agent
from edge_client.notify import Notifier
from edge_client.power.choose import EnergyChoice, energy_source
from edge_client.settings import AgentSettings
from edge_client.shard import load_shard
from edge_client.state import StateStore
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.errors import IdentityError, UnmeasuredError
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.messages import Leave, encode
from wire_protocol.mqtt import Address, Link, TlsFiles, Will
from wire_protocol.tls import own_name
from wire_protocol.topics import Topics, check_name


def run_device(
    settings: AgentSettings, address: Address, tls: TlsFiles | None, data: Path, state: Path,
    connect_s: float, packet_limit: int, say: Callable[[str], None], choice: EnergyChoice,
) -> None:  # fmt: skip
    """Take part until the run ends. Raises a MusplitError; says goodbye in any case.

    With `tls` the link is encrypted, and bundles have to be signed by the key that lies beside it.
    UnmeasuredError comes after the run: it counts, only its energy does not.
    """
    keep_freed_memory()
    check_name(settings.device_id, "device id")
    if tls is not None:
        _check_own(tls, settings.device_id)
    topics = Topics(check_name(settings.fleet, "fleet"))
    shard = load_shard(data)
    notifier = Notifier.from_environment()
    about_energy: list[str] = []  # told once the broker has answered
    # Idle is measured before the work.
    energy = energy_source(choice, settings.threads, about_energy.append)
    try:
        store = StateStore(state)
        try:
            epoch = secrets.randbits(63)  # names this start of the program
            will = Will(topics.control(settings.device_id), encode(Leave(epoch, "connection lost")))
            link = Link(
                f"{settings.fleet}/{settings.device_id}", address,
                subscriptions=(topics.down(settings.device_id), topics.broadcast),
                will=will, max_payload_bytes=MAX_FRAME_BYTES, packet_limit=packet_limit, tls=tls,
            )  # fmt: skip
            link.open(connect_s)
            notifier.ready()
            _greet(settings.device_id, link, say, encrypted=tls is not None)
            for line in about_energy:
                say(line)
            agent = Agent(settings, epoch, shard, store, link, say, energy, notifier.alive)
            _take_part(agent, link, choice, say)
        finally:
            store.close()
    finally:
        energy.close()


def _greet(device_id: str, link: Link, say: Callable[[str], None], *, encrypted: bool) -> None:
    how = " over TLS 1.3" if encrypted else ""
    say(f"{device_id}: connected to {link.address} by MQTT {link.protocol}{how}")
    if link.packet_limit is not None and link.packet_limit < MAX_FRAME_BYTES:
        say(f"packets of at most {link.packet_limit} bytes: larger messages go in parts")


def _take_part(agent: Agent, link: Link, choice: EnergyChoice, say: Callable[[str], None]) -> None:
    reason = "stopped"
    try:
        outcome = agent.run()
        say(f"run over: {outcome}")
        reason = "finished"
    finally:
        agent.leave(reason)
        link.close()
    if choice.require_measured and agent.unmeasured:
        raise UnmeasuredError(f"the run's energy is not measured: {agent.unmeasured}")


def _check_own(tls: TlsFiles, device_id: str) -> None:
    """A broker would let it in under another name, and then say nothing."""
    name = own_name(tls.certificate)
    if name != device_id:
        raise IdentityError(
            f"{tls.certificate}: is the certificate of {name!r}, not of {device_id!r}; give that "
            "--id, or another --identity"
        )
