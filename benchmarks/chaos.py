"""Processes are killed at random moments: does the run end in the bits of the undisturbed one.

Kinds: the server; the broker; all devices at once; the whole emulation, which is then resumed. Each
is killed N times in one small run with its control. Without a deadline every closed round and every
digest in both journals must equal those of an undisturbed run; with a deadline each journal must
replay to its own digests. Prints a table and writes JSON: seconds from a kill to the next recorded
round, and whether everything was equal. Linux; needs mosquitto or the extra `emulation`.

    .venv/bin/python benchmarks/chaos.py --kills 10 --out runs/chaos
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from emulation.inprocess import InProcessFleet
from server_node.config import load_config
from server_node.journal import Digests, RoundClosed, read_journal
from server_node.prepare import prepare
from server_node.replay import replay

CONFIG: Final = Path(__file__).resolve().parent.parent / "experiments" / "digits.toml"
KINDS: Final = ("server", "broker", "devices", "emulation")
# About 0.2 s a round.
SMALL: Final = (
    "devices.count=3", "devices.batch=8", "method.tau=2", "method.directions_client=4",
    "evaluation.every=5", "server.min_step_s=0.03",
)  # fmt: skip
DEADLINE: Final = ("round.deadline_s=0.5", "round.quorum=1")
# The longest pause before a kill, and how long a run may take to record another round.
PAUSE_S: Final = 3.0
BOUND_S: Final = 120.0


class Emulation:
    """`musplit emulate` as a child, started again with --resume when it has ended."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.run = folder / "run"
        self._log = folder / "emulate.log"
        flags = [part for override in overrides for part in ("--set", override)]
        self._first = [str(CONFIG), "--out", str(self.run), *flags]
        self.starts = 0
        self.start()

    def start(self) -> None:
        """Start it, or resume it."""
        what = self._first if self.starts == 0 else ["--resume", str(self.run)]
        self.starts += 1
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "musplit", "emulate", *what, "--format", "json"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ended(self) -> bool:
        """True once it has ended with 0; one that failed is resumed."""
        code = self.process.poll()
        if code:
            self.start()
        return code == 0

    def rows(self) -> int:
        """Rounds that the run and its control have recorded."""
        tables = [self.run / name / "rounds.jsonl" for name in ("", "control")]
        return sum(path.read_bytes().count(b"\n") for path in tables if path.exists())

    def kill(self, kind: str) -> int:
        """Kill -9 what belongs to `kind`; returns how many processes that were."""
        if kind == "emulation":
            self.process.kill()
            self.process.wait()
            return 1
        word = {"server": "serve", "broker": "broker", "devices": "device"}[kind]
        found = [p for p in self._children() if word in p.cmdline()[2:5]]
        if kind == "broker":
            found += [child for process in found for child in process.children(recursive=True)]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return len(found)

    def _children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []


class Case(NamedTuple):
    """One run under fire."""

    kind: str
    deadline: bool
    kills: int
    seed: int


def play(case: Case, rounds: int, folder: Path) -> dict[str, Any]:
    """Run a case to its end; what was killed, how long each recovery took, what it came to."""
    overrides = [*SMALL, f"run.rounds={rounds}", *(DEADLINE if case.deadline else ())]
    begin_s = time.monotonic()
    emulation = Emulation(folder, overrides)
    dice = random.Random(case.seed)  # noqa: S311 - moments, not secrets
    recoveries: list[float] = []
    wait_for_rows(emulation, 1)
    while len(recoveries) < case.kills and not emulation.ended():
        time.sleep(dice.uniform(0.0, PAUSE_S))
        if not emulation.kill(case.kind):
            continue
        killed_s, rows = time.monotonic(), emulation.rows()
        if case.kind == "emulation":
            emulation.start()
        if not wait_for_rows(emulation, rows + 1):
            break
        recoveries.append(time.monotonic() - killed_s)
    while not emulation.ended():
        time.sleep(0.1)
    return {
        **case._asdict(),
        "killed": len(recoveries),
        "rounds": rounds,
        "seconds": round(time.monotonic() - begin_s, 1),
        "starts": emulation.starts,
        "recovery_median_s": round(statistics.median(recoveries), 2) if recoveries else None,
        "recovery_max_s": round(max(recoveries), 2) if recoveries else None,
        **verdict(emulation.run, overrides, folder, deadline=case.deadline),
    }


def wait_for_rows(emulation: Emulation, count: int) -> bool:
    """True once `count` rounds are recorded, False when the emulation is over before."""
    deadline_s = time.monotonic() + BOUND_S
    while emulation.rows() < count:
        if emulation.ended():
            return False
        if time.monotonic() > deadline_s:
            raise SystemExit(f"no round within {BOUND_S:.0f} s: see {emulation.run / 'logs'}")
        time.sleep(0.02)
    return True


def verdict(
    run: Path, overrides: list[str], folder: Path, *, deadline: bool
) -> dict[str, bool | None]:
    """Whether both journals replay to their digests and, without deadline, equal the undisturbed.

    "equal" is None with a deadline: who contributes then depends on time.
    """
    journals = [run, run / "control"]
    replayed = [replay(journal, run) for journal in journals]
    ends = all(result.matches and result.complete for result in replayed)
    if deadline:
        return {"replays": ends, "equal": None}
    calm = folder / "undisturbed"
    experiment = prepare(load_config(CONFIG, overrides), calm)
    for frozen in (False, True):
        InProcessFleet(experiment).run(frozen=frozen)
    pairs = zip(journals, (calm, calm / "control"), strict=True)
    return {"replays": ends, "equal": all(equal(one, other) for one, other in pairs)}


def equal(disturbed: Path, calm: Path) -> bool:
    """True when all rounds are equal, and the one has all digests of the other.

    A server that is asked to end writes digests where the undisturbed run has none.
    """
    (rounds, digests), (calm_rounds, calm_digests) = facts(disturbed), facts(calm)
    return rounds == calm_rounds and digests >= calm_digests


def facts(folder: Path) -> tuple[list[RoundClosed], set[Digests]]:
    """All rounds with all scalars, and all digests, of a journal."""
    records = read_journal(folder / "journal.bin").records
    rounds = [record for record in records if isinstance(record, RoundClosed)]
    return rounds, {record for record in records if isinstance(record, Digests)}


def main() -> None:
    """Run the cases, print a table, write OUT/chaos.json; exit code 1 when one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        for deadline in (False, True):
            case = Case(kind, deadline, arguments.kills, arguments.seed)
            folder = arguments.out / f"{kind}-{'deadline' if deadline else 'barrier'}"
            folder.mkdir(parents=True)
            results.append(play(case, 12 * arguments.kills, folder))
            print("  ".join(f"{k} {v}" for k, v in results[-1].items()), flush=True)
    (arguments.out / "chaos.json").write_text(json.dumps(results, indent=2) + "\n")
    held = all(r["replays"] and r["equal"] is not False and r["killed"] for r in results)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
