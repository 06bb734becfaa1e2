"""How `musplit serve` shows its events: lines for people, or JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from musplit.support import say
from wire_protocol.messages import printable


def server_notifier(output: str) -> Callable[[dict[str, Any]], None]:
    """A `notify` for the server node, which writes to the stdout of now."""
    return partial(_json if output == "json" else _text, sys.stdout)


def _json(stdout: TextIO, event: dict[str, Any]) -> None:
    print(json.dumps(event), file=stdout, flush=True)


def _text(stdout: TextIO, event: dict[str, Any]) -> None:
    match event["event"]:
        case "prepared":
            _prepared(event)
        case "waiting":
            say(f"waiting for {event['devices']} devices; on the first one:\n  {event['command']}")
        case "packet-limit":
            say(f"packets of at most {event['bytes']} bytes: larger messages go in parts")
        case "run":
            _begun(event)
        case "resumed" | "warning" as name:
            say(printable(f"warning: {event['text']}" if name == "warning" else event["text"]))
        case "round" if event["accuracy"] is not None:
            say(
                f"round {event['round'] + 1}: accuracy {event['accuracy']:.3f}, loss "
                f"{event['loss']:.3f}, {event['contributions']} devices, {event['seconds']:.2f} s"
            )
        case "summary":
            summary = {key: value for key, value in event.items() if key != "event"}
            print(json.dumps(summary, indent=2), file=stdout)
        case "joined" | "left" | "refused-message" | "refused-device" | "broker-lost" as name:
            detail = event.get("reason") or event.get("why") or ""
            line = f"{name} {event.get('device', '')} {detail}".rstrip()
            say(printable(line))
        case _:
            pass


def _prepared(event: dict[str, Any]) -> None:
    for note in event["data_notes"]:
        say(printable(f"data: {note}"))
    say(
        f"run folder {event['folder']}: {event['parameters_client']} parameters on the device, "
        f"{event['parameters_server']} on the server"
    )
    for note in event["notes"]:
        say(f"note: {note}")


def _begun(event: dict[str, Any]) -> None:
    phase = "control: the same with the client half frozen" if event["frozen"] else "training"
    say(phase + (f", from round {event['rounds_closed']}" if event["rounds_closed"] else ""))
