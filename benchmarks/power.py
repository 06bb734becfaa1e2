"""What the sampler itself takes: processor time at 10 Hz, each kind of meter, as a part of a core.

    python -m benchmarks.power [--seconds 5] [--json FILE]

Sysfs meters read trees of files made for the purpose; on a board the bus behind them (I2C: about
half a millisecond a register, asleep) comes on top of the time, not of the processor's. External
meters are served from a process of their own. Counted: all threads of this process, and children.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edge_client.power.check import processor_s
from edge_client.power.find import open_meter
from edge_client.power.meter import Meter
from edge_client.power.pmic import PmicMeter
from edge_client.power.sampler import Sampler
from edge_client.power.spec import parse_spec

RATE_HZ = 10.0
_SYSFS = ("ina226", "ina3221", "rapl")
_LIMIT = 0.01  # of a core, for sysfs meters
_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


def main() -> None:
    """Print a row a meter; exit code 1 when a sysfs meter takes more than 1 % of a core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, meter in _meters(Path(folder)):
            row = _measure(name, meter, given.seconds)
            rows.append(row)
            print(
                f"{name:<10} {100 * row['core']:6.3f} % of a core   {row['rate_hz']:5.2f} Hz   "
                f"{1e3 * row['per_reading_s']:6.3f} ms a reading"
            )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    late = [row["meter"] for row in rows if row["meter"] in _SYSFS and row["core"] >= _LIMIT]
    if late:
        raise SystemExit(f"more than 1 % of a core: {', '.join(late)}")


def _measure(name: str, meter: Meter, seconds: float) -> dict[str, Any]:
    begin_s, began_s = processor_s(), time.monotonic()
    with Sampler(meter, RATE_HZ) as sampler:
        time.sleep(seconds)
    took_s, passed_s = processor_s() - begin_s, time.monotonic() - began_s
    meter.close()
    readings = len(sampler.trace().times_s)
    return {
        "meter": name, "core": took_s / passed_s, "rate_hz": readings / passed_s,
        "per_reading_s": took_s / max(1, readings),
    }  # fmt: skip


def _meters(root: Path) -> Iterator[tuple[str, Meter]]:
    _put(root / "sys/class/hwmon/hwmon0", name="ina226", power1_input=4_000_000)
    chip = root / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1"
    _put(chip, name="ina3221")
    for channel, label in enumerate(_RAILS, start=1):
        cells = {f"in{channel}_label": label, f"in{channel}_input": 5000}
        _put(chip, **cells, **{f"curr{channel}_input": 800})
    zone = root / "sys/class/powercap/intel-rapl:0"
    _put(zone, name="package-0", max_energy_range_uj=1 << 40, energy_uj=1)
    csv = root / "live.csv"
    csv.write_text("time_s,power_w\n", encoding="utf-8")
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs, csv, zone), daemon=True)
    server.start()
    lines, plug = ours.recv()
    for kind in _SYSFS:
        yield kind, open_meter(parse_spec(kind), RATE_HZ, root)
    adc = root / "adc"
    adc.write_text("VDD_A current(0)=1.0A\nVDD_V volt(1)=4.0V\n", encoding="utf-8")
    yield "pmic", PmicMeter(rate_hz=RATE_HZ, command=["cat", str(adc)])
    yield "usb-csv", open_meter(parse_spec(f"usb-csv:{csv}"), RATE_HZ)
    yield "lines", open_meter(parse_spec(f"lines:tcp://127.0.0.1:{lines}"), RATE_HZ)
    yield "plug-http", open_meter(parse_spec(f"plug-http:shelly2@127.0.0.1:{plug}"), RATE_HZ)
    server.terminate()
    server.join()


def _serve(ports: Connection, csv: Path, zone: Path) -> None:
    """A meter of 100 lines a second on a port and in a file, a plug, and a counter."""
    with (
        socket.create_server(("127.0.0.1", 0)) as lines,
        socket.create_server(("127.0.0.1", 0)) as plug,
        csv.open("a", encoding="utf-8") as file,
    ):
        lines.setblocking(False)
        plug.setblocking(False)
        ports.send([server.getsockname()[1] for server in (lines, plug)])
        peers: list[socket.socket] = []
        body = b'{"apower": 4.0}'
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        while True:
            line = f"{time.monotonic():.4f},4.0\n"
            file.write(line)
            (zone / "energy_uj").write_text(f"{time.monotonic_ns() // 250}\n", encoding="utf-8")
            file.flush()
            peers += [peer for peer in (_accept(lines),) if peer is not None]
            for peer in list(peers):
                try:
                    peer.sendall(line.encode())
                except OSError:
                    peers.remove(peer)
            asked = _accept(plug)
            if asked is not None:
                with asked:
                    asked.settimeout(1.0)
                    asked.recv(4096)
                    asked.sendall(answer)
            time.sleep(0.01)


def _accept(server: socket.socket) -> socket.socket | None:
    try:
        return server.accept()[0]
    except BlockingIOError:
        return None


def _put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
