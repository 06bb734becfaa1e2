"""`make bench`: ratios of things measured in the same run, medians of several, as table and JSON.

Each benchmark is a module of this folder with `measure(repetitions) -> list of rows.Row`.

    .venv/bin/python -m benchmarks.bench [--only NAME] [--quick] [--markdown] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

# Before numpy, torch and ONNX Runtime are imported: what is timed runs on one thread.
THREADS: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
BENCHMARKS: Final = (
    "device_step", "directions", "memory", "transport", "server_steps", "simulation",
)  # fmt: skip
REPETITIONS: Final = 9
QUICK_REPETITIONS: Final = 1
_VERSIONED: Final = ("musplit", "numpy", "onnxruntime", "torch", "paho-mqtt")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks that were asked for; a row above its limit is said, not an error."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="one repetition of each")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    chosen = parser.parse_args(arguments)
    repetitions = QUICK_REPETITIONS if chosen.quick else REPETITIONS
    os.environ.update(THREADS)
    found: dict[str, list[Any]] = {}
    begin_s = time.monotonic()
    for name in chosen.only or BENCHMARKS:
        print(f"{time.monotonic() - begin_s:6.1f} s  {name} ..", file=sys.stderr, flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        found[name] = list(module.measure(repetitions))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "repetitions": repetitions, "rows": _json(found)}
    chosen.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for line in table([row for rows in found.values() for row in rows], chosen.markdown):
        print(line)
    print(f"{time.monotonic() - begin_s:6.1f} s  {chosen.out} written", file=sys.stderr)


def table(rows: Iterable[Any], markdown: bool) -> Iterable[str]:  # noqa: FBT001
    """One line a row: limit, ratio, lowest and highest repetition, verdict, note."""
    separator = " | " if markdown else "  "
    heads = ("measured", "limit", "ratio", "lowest to highest", "", "remarks")
    cells = [heads, *([("---",) * len(heads)] if markdown else []), *map(_cells, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    for line in cells:
        padded = separator.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield f"| {padded} |" if markdown else padded.rstrip()


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": THREADS,
        "load_average": os.getloadavg(),
        "versions": {name: version(name) for name in _VERSIONED},
    }


def _cells(row: Any) -> tuple[str, ...]:
    spread = row.raw.get("ratio", [])
    return (
        row.name,
        "" if row.limit is None else f"{row.limit:.2f}",
        "not measured" if row.ratio is None else f"{row.ratio:.2f}",
        f"{min(spread):.2f} to {max(spread):.2f}" if spread else "",
        _verdict(row),
        row.note,
    )


def _verdict(row: Any) -> str:
    if row.limit is None or row.ratio is None:
        return ""
    return "ok" if row.ratio <= row.limit else "ABOVE"


def _json(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        {"benchmark": name, **row._asdict(), "verdict": _verdict(row)}
        for name, rows in found.items()
        for row in rows
    ]


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
