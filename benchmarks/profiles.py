"""Emulation by profile: whether devices keep to their boards' speed, and links to their rate.

Eight boards of different speed in one `musplit emulate`, at two cuts:

* a device's step against that of the first, beside the same ratio of the profiles' factors;
* the step at the deeper cut against the other, beside the same ratio of this machine alone;
* a step that the profile names as calibrated, for one graph, beside what is emulated;
* 200 KB over an emulated link of 1 Mbit/s, up and down, beside the 1.6 s that it takes.

    python -m benchmarks.profiles
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from edge_client.bundle import read_bundle
from emulation.emulate import emulate
from emulation.link import LinkShape, shaped_links
from firmware_profiles.catalogue import load_profile
from server_node.config import load_config
from wire_protocol.manifest import CLIENT_FOLDER
from wire_protocol.mqtt import Address

BOARDS: Final = (
    "rpi-4b", "rpi-zero-2w", "rpi-3b-plus", "rpi-cm4", "jetson-nano", "rpi-5", "jetson-xavier-nx",
    "jetson-orin-nano",
)  # fmt: skip
CUTS: Final = ("fc2", "fc3")
_CALIBRATED: Final = "[[speed.calibrated]]"
_SETTINGS: Final = (
    "model.name=mlp:64-512-512-512-10", "devices.batch=128", "method.directions_client=2",
    "method.tau=1", "evaluation.control=false", "evaluation.every=1000",
)  # fmt: skip


class Emulated(NamedTuple):
    """One emulation: its graph, and the rows of its devices."""

    graph_sha256: str
    rows: list[dict[str, Any]]


def run(folder: Path, fleet: str, cut: str, rounds: int, devices: int) -> Emulated:
    """Emulate a fleet, given as the text of its file."""
    folder.mkdir()
    path = folder / "fleet.toml"
    path.write_text(fleet, encoding="utf-8")
    fields = [*_SETTINGS, f"model.cut={cut}", f"run.rounds={rounds}", f"devices.count={devices}",
              f"emulation.fleet={str(path)!r}"]  # fmt: skip
    summary = emulate(load_config(None, fields), folder / "run", _say)
    graph = read_bundle(folder / "run" / CLIENT_FOLDER).manifest.graph.sha256
    return Emulated(graph, summary["emulated"])


def fleet_text(profiles: list[str], slow_motion: float | None) -> str:
    """A fleet of one device each, on links that cost nothing; without a slow motion: automatic."""
    link = "up_bits_s = 1e10\ndown_bits_s = 1e10\nlatency_s = 0.0\n"
    devices = (f"[[device]]\nprofile = {name!r}\n{link}" for name in profiles)
    pace = "'auto'" if slow_motion is None else slow_motion
    return f"slow_motion = {pace}\n" + "".join(devices)


def compare_ratios(emulated: Emulated) -> float:
    """Print a row a device; returns the largest relative error of a ratio."""
    factors = [load_profile(name).speed.factor.value for name in BOARDS]
    steps_s = [row["step_s_median"] for row in emulated.rows]
    worst = 0.0
    for row, factor, step_s in zip(emulated.rows, factors, steps_s, strict=True):
        wanted, found = factor / factors[0], step_s / steps_s[0]
        worst = max(worst, abs(found / wanted - 1.0))
        print(
            f"  {row['profile']:18} step {1e3 * row['step_s_asked']:8.2f} ms asked "
            f"{1e3 * step_s:8.2f} ms emulated   ratio {wanted:6.3f} asked {found:6.3f} emulated "
            f"({100 * (found / wanted - 1.0):+.1f} %)"
        )
    print(f"  slow motion {emulated.rows[0]['slow_motion']:g}")
    return worst


def compare_cuts(first: Emulated, second: Emulated) -> float:
    """Print how the steps change with the cut; returns the largest relative error."""
    pairs = list(zip(first.rows, second.rows, strict=True))
    wanted = pairs[0][1]["step_s_asked"] / pairs[0][0]["step_s_asked"]
    changes = [b["step_s_median"] / a["step_s_median"] for a, b in pairs]
    print(
        f"  this machine alone {wanted:.3f}; emulated: median {statistics.median(changes):.3f}, "
        f"from {min(changes):.3f} to {max(changes):.3f}"
    )
    return max(float(abs(change / wanted - 1.0)) for change in changes)


def calibrated(
    folder: Path, graph: str, step_s: float, rounds: int, slow_motion: float | None
) -> float:
    """Emulate a 4B that was measured to take `step_s`; returns the relative error."""
    text = files("firmware_profiles").joinpath("boards/rpi-4b.toml").read_text(encoding="utf-8")
    entry = (
        f'\n{_CALIBRATED}\ngraph = "{graph}"\ncut = "{CUTS[1]}"\nbatch = 128\nthreads = 4\n'
        f'directions = 2\nstep_s = {step_s}\nsource = "made up by this benchmark"\n'
    )
    mine = folder / "mine.toml"
    mine.write_text(text + entry, encoding="utf-8")
    emulated = run(
        folder / "calibrated", fleet_text([str(mine)] * 2, slow_motion), CUTS[1], rounds, 2
    )
    found_s = float(statistics.median(row["step_s_median"] for row in emulated.rows))
    print(f"  {1e3 * step_s:.2f} ms in the profile, {1e3 * found_s:.2f} ms emulated")
    return abs(found_s / step_s - 1.0)


def transfer_s(shape: LinkShape, size_bytes: int, *, up: bool) -> float:
    """Seconds that bytes need through an emulated link between two sockets."""
    with contextlib.closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = Address("127.0.0.1", listening.getsockname()[1])
        with shaped_links([shape], address, 0) as ways, socket.create_connection(ways[0]) as near:
            far, _ = listening.accept()
            with far:
                sender, receiver = (near, far) if up else (far, near)
                begin_s = time.monotonic()
                sending = threading.Thread(target=sender.sendall, args=(b"x" * size_bytes,))
                sending.start()
                left = size_bytes
                while left:
                    left -= len(receiver.recv(1 << 16))
                end_s = time.monotonic()
                sending.join()
    return end_s - begin_s


def _say(event: dict[str, Any]) -> None:
    if event["event"] == "warning":
        print(f"  warning: {event['text']}", file=sys.stderr)


def main() -> None:
    """Measure, print, and say how far off the worst one is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slow-motion", type=float, help="otherwise as much as this machine needs")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options}")
    for up in (True, False):
        taken_s = [transfer_s(LinkShape(1e6, 1e6), 200_000, up=up) for _ in range(3)]
        print(f"200 KB {'up' if up else 'down'} at 1 Mbit/s: {statistics.median(taken_s):.3f} s")
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        fleet = fleet_text(list(BOARDS), options.slow_motion)
        for cut in CUTS:
            print(f"eight boards, cut {cut}:")
            found[cut] = run(folder / cut, fleet, cut, options.rounds, len(BOARDS))
            print(f"  worst ratio off by {100 * compare_ratios(found[cut]):.1f} %")
        print(f"step at {CUTS[1]} / step at {CUTS[0]}:")
        print(f"  off by {100 * compare_cuts(found[CUTS[0]], found[CUTS[1]]):.1f} % at most")
        print("a calibrated step:")
        deeper = found[CUTS[1]]
        step_s = 1.5 * deeper.rows[0]["step_s_asked"]
        off = calibrated(folder, deeper.graph_sha256, step_s, options.rounds, options.slow_motion)
        print(f"  off by {100 * off:.1f} %")


if __name__ == "__main__":
    main()
