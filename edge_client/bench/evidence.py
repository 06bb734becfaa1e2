"""The evidence folder: raw files, each written once, and the manifest that vouches for them.

configuration.toml   what was asked (records.Configuration)
environment.json     the machine, versions and meter; environment-1.json .. of resumed sessions
raw/NAME.window.csv, NAME.latency.csv, NAME.power.csv
                     one window (records.Place.name); a window is done when the manifest names it
MANIFEST.sha256      SHA-256 of every file above, as `sha256sum --check` reads it

results.json, plots/ and report.html are computed from these alone and are not in the manifest.
The evidence's digest is that of the manifest: whoever quotes it can be checked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from edge_client.bench.environment import Environment
from edge_client.bench.records import FORMAT, Configuration, Latencies, Place, Window, places
from edge_client.bench.toml_text import to_toml
from edge_client.errors import EvidenceError, StateError
from edge_client.files import replacing

CONFIGURATION_FILE: Final = "configuration.toml"
ENVIRONMENT_FILE: Final = "environment.json"
MANIFEST_FILE: Final = "MANIFEST.sha256"
RAW_FOLDER: Final = "raw"
PLOTS_FOLDER: Final = "plots"
BUNDLES_FOLDER: Final = "bundles"  # where a bench of a model exports its cuts
_LINE: Final = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9./_-]+)")
_MAX_FILE_BYTES: Final = 256 << 20


class Evidence:
    """A folder of evidence, opened; what the manifest names has the digests it tells."""

    def __init__(self, folder: Path, digests: dict[str, str]) -> None:
        self.folder = folder
        self._digests = digests
        self.configuration = _parse_configuration(self._read(CONFIGURATION_FILE), folder)
        self.environments = self._environments()

    @classmethod
    def create(cls, folder: Path, configuration: Configuration, environment: Environment) -> Self:
        """Begin in a new or empty folder. Raises EvidenceError."""
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if there - {BUNDLES_FOLDER} or (folder.exists() and not folder.is_dir()):
            raise EvidenceError(
                f"{folder}: is not empty; give another --out, or go on with --resume {folder}"
            )
        (folder / RAW_FOLDER).mkdir(parents=True, exist_ok=True)
        digests: dict[str, str] = {}
        files = {
            CONFIGURATION_FILE: to_toml(msgspec.to_builtins(configuration)).encode(),
            ENVIRONMENT_FILE: _json(environment),
        }
        for name, data in files.items():
            digests[name] = _write(folder / name, data)
        _write_manifest(folder, digests)
        return cls(folder, digests)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read and check everything. Raises EvidenceError naming what was altered."""
        for name in (RAW_FOLDER, PLOTS_FOLDER):
            if (folder / name).is_symlink():  # what is written there would land elsewhere
                raise EvidenceError(f"{folder / name}: is a link; evidence holds its own folders")
        try:
            text = _regular(folder / MANIFEST_FILE).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not ASCII"
            raise EvidenceError(
                f"{folder / MANIFEST_FILE}: cannot be read ({why}); is {folder} a folder that "
                "`musplit bench --out` wrote?"
            ) from error
        digests: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            match = _LINE.fullmatch(line)
            if match is None or ".." in line or match[2].startswith("/") or match[2] in digests:
                raise EvidenceError(f"{folder / MANIFEST_FILE}: line {number} is damaged")
            digests[match[2]] = match[1]
        for name, digest in digests.items():
            _check(folder, name, digest)
        return cls(folder, digests)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest."""
        return hashlib.sha256(_manifest(self._digests)).hexdigest()

    def add_environment(self, environment: Environment) -> None:
        """A resumed session begins. Raises EvidenceError on another machine."""
        first = self.environments[0]
        for field in ("machine", "processor", "board", "versions", "meter"):
            was, now = getattr(first, field), getattr(environment, field)
            if was != now:
                raise EvidenceError(
                    f"{self.folder}: was begun with {field} {was!r}, here it is {now!r}; a bench "
                    "goes on where it began"
                )
        name = f"environment-{len(self.environments)}.json"
        self._digests[name] = _write(self.folder / name, _json(environment))
        _write_manifest(self.folder, self._digests)
        self.environments.append(environment)

    def done(self, place: Place) -> bool:
        """Whether a window is there."""
        return f"{RAW_FOLDER}/{place.name}.window.csv" in self._digests

    def missing(self) -> list[Place]:
        """Windows that are still to be taken, in order."""
        return [place for place in places(self.configuration) if not self.done(place)]

    def add(
        self, place: Place, window: Window, latencies: Latencies,
        power: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:  # fmt: skip
        """Keep a window; `power` is (times_s, powers_w). It is done when this returns."""
        fields = msgspec.structs.asdict(window)
        tables: dict[str, tuple[Sequence[str], Iterable[Iterable[Any]]]] = {
            "window": (list(fields), [fields.values()]),
            "latency": (Latencies._fields, zip(*latencies, strict=True)),
        }
        if power is not None:
            tables["power"] = (("t_s", "power_w"), zip(*power, strict=True))
        for table, (header, rows) in tables.items():
            name = f"{RAW_FOLDER}/{place.name}.{table}.csv"
            self._digests[name] = _write(self.folder / name, _csv(header, rows))
        _write_manifest(self.folder, self._digests)

    def window(self, place: Place) -> Window:
        """Raises EvidenceError."""
        name, (header, rows) = self._table(place, "window")
        if len(rows) != 1 or len(rows[0]) != len(header):
            raise EvidenceError(f"{self.folder / name}: must hold one row")
        fields = {k: v or None for k, v in zip(header, rows[0], strict=True)}
        try:
            window = msgspec.convert(fields, Window, strict=False)
        except msgspec.ValidationError as error:
            raise EvidenceError(f"{self.folder / name}: {error}") from error
        if not 0 < window.seconds < math.inf:
            raise EvidenceError(f"{self.folder / name}: end_s must be after begin_s")
        return window

    def latencies(self, place: Place) -> Latencies:
        """Raises EvidenceError."""
        name, (header, rows) = self._table(place, "latency")
        columns = self._floats(name, header, rows, Latencies._fields)
        latencies = Latencies([int(x) for x in columns[0]], *columns[1:])
        if fault := latencies.fault():
            raise EvidenceError(f"{self.folder / name}: {fault}")
        return latencies

    def power(self, place: Place) -> tuple[list[float], list[float]] | None:
        """(times_s, powers_w); None when no power was sampled. Raises EvidenceError."""
        if f"{RAW_FOLDER}/{place.name}.power.csv" not in self._digests:
            return None
        name, (header, rows) = self._table(place, "power")
        times_s, powers_w = self._floats(name, header, rows, ("t_s", "power_w"))
        if any(b <= a for a, b in itertools.pairwise(times_s)):
            raise EvidenceError(f"{self.folder / name}: times must ascend")
        return times_s, powers_w

    def _floats(
        self, name: str, header: list[str], rows: list[list[str]], want: Sequence[str]
    ) -> list[list[float]]:
        if header != list(want):
            raise EvidenceError(f"{self.folder / name}: columns must be {','.join(want)}")
        try:
            numbers = [[float(x) for x in row] for row in rows]
        except ValueError as error:
            raise EvidenceError(f"{self.folder / name}: {error}") from error
        if any(len(row) != len(want) or not all(map(math.isfinite, row)) for row in numbers):
            raise EvidenceError(f"{self.folder / name}: a row is short, long or not finite")
        return [list(column) for column in zip(*numbers, strict=True)] or [[] for _ in want]

    def _table(self, place: Place, table: str) -> tuple[str, tuple[list[str], list[list[str]]]]:
        name = f"{RAW_FOLDER}/{place.name}.{table}.csv"
        try:
            rows = list(csv.reader(io.StringIO(self._read(name).decode("ascii"))))
        except (csv.Error, UnicodeDecodeError) as error:
            raise EvidenceError(f"{self.folder / name}: not such a table ({error})") from error
        return name, (rows[0] if rows else [], rows[1:])

    def _environments(self) -> list[Environment]:
        count = sum(n.startswith("environment-") for n in self._digests)
        names = [ENVIRONMENT_FILE, *(f"environment-{i}.json" for i in range(1, count + 1))]
        try:
            return [msgspec.json.decode(self._read(n), type=Environment) for n in names]
        except ValueError as error:
            raise EvidenceError(f"{self.folder / ENVIRONMENT_FILE}: {error}") from error

    def _read(self, name: str) -> bytes:
        if name not in self._digests:
            raise EvidenceError(f"{self.folder / MANIFEST_FILE}: does not name {name}")
        return _check(self.folder, name, self._digests[name])


def _parse_configuration(data: bytes, folder: Path) -> Configuration:
    where = folder / CONFIGURATION_FILE
    try:
        tree = tomllib.loads(data.decode("utf-8"))
        if tree.get("format") != FORMAT:
            raise EvidenceError(f"{where}: not of format {FORMAT}; use the musplit that wrote it")
        return msgspec.convert(tree, Configuration)
    except (ValueError, RecursionError) as error:  # of tomllib and msgspec alike
        raise EvidenceError(f"{where}: {error}") from error


def _check(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    try:
        data = _regular(path)
    except OSError as error:
        raise EvidenceError(
            f"{path}: {MANIFEST_FILE} names it, but it cannot be read ({error.strerror})"
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise EvidenceError(f"{path}: altered since it was measured: its digest differs")
    return data


def _regular(path: Path) -> bytes:
    """A file, no link, pipe or device: those may have no end. Raises OSError, EvidenceError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise EvidenceError(f"{path}: is no plain file")
        if status.st_size > _MAX_FILE_BYTES:
            raise EvidenceError(f"{path}: too large for raw samples of a bench")
        return file.read(_MAX_FILE_BYTES)


def _json(environment: Environment) -> bytes:
    return msgspec.json.format(msgspec.json.encode(environment)) + b"\n"


def _csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows([_cell(x) for x in row] for row in rows)
    return text.getvalue().encode("ascii", "replace")


def _cell(value: Any) -> str:
    """Nanoseconds and microwatts are finer than any clock or meter here."""
    if value is None:
        return ""
    return f"{value:.9f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _write(path: Path, data: bytes) -> str:
    try:
        with replacing(path) as file:
            file.write(data)
    except StateError as error:
        why = error.__cause__
        text = why.strerror if isinstance(why, OSError) else why
        raise EvidenceError(f"{path}: cannot be written ({text}); free space") from error
    return hashlib.sha256(data).hexdigest()


def _manifest(digests: dict[str, str]) -> bytes:
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def _write_manifest(folder: Path, digests: dict[str, str]) -> None:
    _write(folder / MANIFEST_FILE, _manifest(digests))
