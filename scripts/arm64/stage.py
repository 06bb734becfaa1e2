"""`make arm64`: the real device program with real aarch64 wheels, emulated, beside native devices.

A broker and a server on this machine, one device for each processor under user-mode emulation, and
two native ones. They train a few rounds, and all must end with the weights of the server's copy.
Where the emulator cannot be had, the reason is printed and nothing fails.
"""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from edge_client.state import StateStore
from emulation.processes import Processes, processes
from firmware_profiles.catalogue import catalogue
from firmware_profiles.schema import Profile
from scripts.arm64.cache import UnavailableError
from scripts.arm64.userland import CPUS, ROOT, userland
from wire_protocol.manifest import sha256

ROUNDS: Final = 4
_NATIVE: Final = 2
_PATIENCE_S: Final = 600.0
_STATE_HEADER_BYTES: Final = 56  # edge_client/state.py
_REFERENCE: Final = "rpi-4b"  # its pin serves a processor that no profile names
_PROVES: Final = (
    "proves: wheels, instructions, C library, code and protocol of the device program",
    "does not prove: time, energy, heat, memory pressure, sensors, first boot, the kernel",
)
_SETTINGS: Final = {
    "run.rounds": ROUNDS, "devices.count": _NATIVE + len(CPUS), "devices.batch": 8,
    "method.tau": 2, "method.directions_client": 4, "evaluation.every": ROUNDS,
    "evaluation.control": False,
}  # fmt: skip


class Member(NamedTuple):
    """A device of the run: its id, and what runs the program."""

    name: str
    python: list[str]


def main() -> None:
    """Run the stage; exit code 1 when a device ends with other weights, or the run fails."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="musplit-arm64-") as folder:
        try:
            members = _members(Path(folder) / "metadata")
        except UnavailableError as error:
            say(f"skipped: {error}")
            return
        built_s = time.monotonic() - began_s
        digests = run(Path(folder), members)
    expected = digests.pop("server")
    for name, digest in digests.items():
        say(f"{name:20} {digest[:16]} {'as the server' if digest == expected else 'DIFFERS'}")
    for line in _PROVES:
        say(line)
    say(f"{time.monotonic() - began_s:.0f} s, of them {built_s:.0f} s to have the userland")
    if set(digests.values()) != {expected}:
        sys.exit(1)


def _members(metadata: Path) -> list[Member]:
    """Native devices, and one for each emulated processor with its boards' pin."""
    members = [
        Member(f"{platform.machine()}-{i}", [sys.executable]) for i in range(_NATIVE)
    ]  # fmt: skip
    for cpu in CPUS:
        boards, pin = boards_and_pin(cpu)
        built = userland({"onnxruntime": pin})
        variables = built.variables(metadata)
        prefix = ["env", *(f"{name}={value}" for name, value in variables.items())]
        members.append(Member(cpu, [*prefix, *built.python(cpu)]))
        titles = ", ".join(board.title for board in boards) or "no board of the catalogue"
        say(f"{cpu} stands for {titles}; onnxruntime {pin}")
    return members


def boards_and_pin(cpu: str) -> tuple[list[Profile], str]:
    """The boards that a processor stands for, and the onnxruntime that their profiles pin."""
    boards = [profile for profile in catalogue() if profile.cpu.qemu_cpu == cpu]
    pinning = boards or [profile for profile in catalogue() if profile.name == _REFERENCE]
    pins = {profile.runtime.onnxruntime for profile in pinning}
    if len(pins) > 1:
        raise RuntimeError(f"profiles with {cpu} pin {sorted(pins)}: this stage runs one a CPU")
    return boards, pins.pop()


def run(folder: Path, members: Sequence[Member]) -> dict[str, str]:
    """Train; SHA-256 of the client weights by device, and under "server" of the server's copy."""
    _call("shard", str(ROOT / "experiments/digits.toml"), "--out", str(folder / "shards"),
          "--devices", str(len(members)))  # fmt: skip
    address = f"127.0.0.1:{_free_port()}"
    with processes() as group:
        log = folder / "broker.log"
        group.start(_musplit("broker", "--listen", address), log)
        _wait_for(address)
        overrides = [
            part for key, value in _SETTINGS.items() for part in ("--set", f"{key}={_toml(value)}")
        ]
        server = group.start(
            _musplit("serve", str(ROOT / "experiments/digits.toml"), "--broker", address,
                     "--out", str(folder / "run"), *overrides),
            folder / "server.log",
        )  # fmt: skip
        devices = [
            (member, _start(group, folder, member, index, address))
            for index, member in enumerate(members)
        ]
        _finish("server", server, folder)
        for member, process in devices:
            _finish(member.name, process, folder)
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    states = {member.name: folder / "state" / member.name for member in members}
    digests = {name: _weights_sha256(state) for name, state in states.items()}
    return {"server": summary["client_weights_sha256"], **digests}


def _start(
    group: Processes, folder: Path, member: Member, index: int, address: str
) -> subprocess.Popen[bytes]:
    return group.start(
        [*member.python, "-m", "musplit", "device", "--id", member.name, "--broker", address,
         "--data", str(folder / "shards" / f"shard-{index:03d}.npz"),
         "--state", str(folder / "state" / member.name), "--connect-s", "120"],
        folder / f"{member.name}.log",
    )  # fmt: skip


def _finish(name: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        code = process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}")
        sys.exit(f"arm64: {name} ended with code {code}" if code > 0 else f"arm64: {name} hung")


def _weights_sha256(state: Path) -> str:
    """Digest of the weights that a device has saved."""
    size = (state / "weights.state").stat().st_size - _STATE_HEADER_BYTES
    weights = np.empty(size // 4, np.float32)
    store = StateStore(state)
    try:
        saved = store.load_weights(weights)
    finally:
        store.close()
    return "nothing was saved" if saved is None else sha256(weights)


def _musplit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "musplit", *arguments]


def _call(*arguments: str) -> None:
    subprocess.run(_musplit(*arguments), check=True, stdout=subprocess.DEVNULL)


def _toml(value: object) -> str:
    return json.dumps(value)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_for(address: str) -> None:
    host, _, port = address.partition(":")
    deadline_s = time.monotonic() + 30.0
    while time.monotonic() < deadline_s:
        try:
            with socket.create_connection((host, int(port)), 1.0):
                return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"arm64: no broker at {address}")


def say(text: str) -> None:
    """A line of the stage's report."""
    print(f"arm64: {text}", flush=True)


if __name__ == "__main__":
    main()
