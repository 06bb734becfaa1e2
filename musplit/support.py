"""What the commands share: errors to exit codes, signals, options, addresses."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

INTERRUPTED = 130
_PORT = re.compile(r"[0-9]{1,5}")


class FiniteRange(click.FloatRange):
    """A FloatRange that refuses nan and infinity too."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As click's, then the check."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


SECONDS = FiniteRange(0)
PACKET_BYTES = click.IntRange(0, 268_435_455)  # what MQTT itself allows
_EXTRAS = {
    "torch": "server", "onnx": "server", "onnxscript": "server", "matplotlib": "server",
    "PIL": "server",
    "safetensors": "server",
    "amqtt": "emulation", "rich": "emulation", "sklearn": "emulation",
}  # fmt: skip


def fail(text: str, code: int) -> NoReturn:
    """One line on stderr, and an exit code that docs/commands.md explains.

    Files and peers may have put control characters into it, which could steer a terminal.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    print(f"musplit: error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def guarded(extra: str = "") -> Iterator[None]:
    """Turn what a user can cause into one line and an exit code; SIGTERM ends like Ctrl-C.

    `extra` is the one that the command needs, whichever of its packages is missed first.
    """
    from wire_protocol.errors import MusplitError

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except MusplitError as error:
        fail(str(error), error.exit_code)
    except ImportError as error:
        found = _EXTRAS.get((error.name or "").partition(".")[0])
        if found is None:
            raise
        fail(f"this command needs {error.name}: pip install 'musplit[{extra or found}]'", 3)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(INTERRUPTED)
    except OSError as error:  # a folder that is a file, a full disk, no permission
        fail(f"{error.filename or 'file'}: {error.strerror or error}", 3)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_facts(facts: dict[str, Any], output: str) -> None:
    """What a command did: a line each, or one JSON object."""
    if output == "json":
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:16} {value}")


def parse_address(text: str, *, tls: bool = False, default_port: int = 0) -> Any:
    """HOST, HOST:PORT or [IPV6]:PORT as an Address; without a port MQTT's. Raises InputError."""
    from wire_protocol.errors import InputError
    from wire_protocol.mqtt import DEFAULT_PORT, DEFAULT_TLS_PORT, Address

    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon or (text.count(":") > 1 and not text.startswith("[")):
        host, port = text, str(default_port or (DEFAULT_TLS_PORT if tls else DEFAULT_PORT))
    host = host.strip("[]")
    if not _is_host(host) or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise InputError(f"address {text!r}: write HOST or HOST:PORT, e.g. 192.168.1.10:1883")
    return Address(host, int(port))


def _is_host(text: str) -> bool:
    """Whether a resolver can be asked for it, and no configuration file reads it as more."""
    try:
        text.encode("idna")
    except UnicodeError:  # labels that are empty or too long
        return False
    return bool(text) and text.isprintable() and not set(text) & set(" /\\#'\"")


def meter_options(command: Command) -> Command:
    """--profile, --meter, --meter-hz and --require-measured."""
    command = click.option(
        "--require-measured", is_flag=True, help="End with code 8 unless the energy is measured."
    )(command)
    command = click.option(
        "--meter-hz", type=FiniteRange(0, 1000, min_open=True), metavar="HZ",
        help="Readings per second.  [default: 10; plugs 1]",
    )(command)  # fmt: skip
    command = click.option(
        "--meter", default="auto", show_default=True, metavar="KIND[:..]",
        help="Power meter; docs/energy.md lists the kinds. model: none.",
    )(command)  # fmt: skip
    return click.option(
        "--profile", metavar="NAME|FILE",
        help="This board's profile: its sensors and its model.  [default: as it looks]",
    )(command)  # fmt: skip


def broker_options(command: Command) -> Command:
    """--broker, --identity, --insecure and --connect-s."""
    command = click.option(
        "--connect-s", default=15.0, type=SECONDS, show_default=True, metavar="S",
        help="How long to try to reach the broker at the start.",
    )(command)  # fmt: skip
    command = click.option(
        "--insecure", is_flag=True,
        help="Allow a plain link beyond loopback, without TLS, certificates and signatures.",
    )(command)  # fmt: skip
    command = click.option(
        "--identity", type=click.Path(path_type=Path), metavar="DIR",
        help="Certificate, key and CA of this machine: TLS 1.3 on both sides.",
    )(command)  # fmt: skip
    return click.option(
        "--broker", required=True, metavar="HOST[:PORT]",
        help="The MQTT broker; port 1883 if none, 8883 with --identity.",
    )(command)  # fmt: skip


def set_option(command: Command) -> Command:
    """--set, repeatable."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
        help="Override a field of the configuration; repeatable. E.g. --set method.tau=4",
    )(command)  # fmt: skip


def resume_option(command: Command) -> Command:
    """--resume."""
    return click.option(
        "--resume", type=click.Path(path_type=Path), metavar="RUN",
        help="Go on with the run in this folder, whatever stopped it.",
    )(command)  # fmt: skip


def check_alone(resume: Path, given: dict[str, object]) -> None:
    """End with one line when --resume stands beside what the run folder decides."""
    named = ", ".join(name for name, value in given.items() if value)
    if named:
        fail(f"--resume {resume}: the run goes on as it began; leave out {named}", 2)


def format_option(command: Command) -> Command:
    """--format text|json."""
    return click.option(
        "--format", "output", type=click.Choice(["text", "json"]), default="text",
        show_default=True, help="json: machine-readable on stdout, progress on stderr.",
    )(command)  # fmt: skip


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def default_config() -> Path:
    """The digits experiment that ships with musplit."""
    from importlib.resources import files

    return Path(str(files("experiments").joinpath("digits.toml")))


def run_folder(config: Path) -> Path:
    """A new folder named after the configuration and the time."""
    from datetime import datetime

    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.stem}-{stamp}"
