"""Debian packages without apt: the signed index, what depends on what, download and unpack."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from scripts.arm64.cache import UnavailableError

_DEFAULT_MIRROR: Final = "https://deb.debian.org/debian"
_SOURCES: Final = Path("/etc/apt")
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TIMEOUT_S: Final = 60.0
_DOWNLOADS: Final = 6


class Package(NamedTuple):
    """What the index says of one package."""

    name: str
    version: str
    path: str
    sha256: str
    essential: bool
    needs: tuple[tuple[str, ...], ...]  # each: alternatives
    provides: tuple[str, ...]


class Archive:
    """The packages of one release (`bookworm`) for one architecture (`arm64`).

    Raises UnavailableError when no mirror answers, or answers something unsigned or damaged.
    """

    def __init__(self, release: str, architecture: str) -> None:
        self._mirror = _mirror()
        top = f"dists/{release}"
        index = f"main/binary-{architecture}/Packages.xz"
        signed = _verified(_get(f"{self._mirror}/{top}/InRelease"))
        listed = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(index)}$", signed, re.MULTILINE)
        if listed is None:
            raise UnavailableError(f"{self._mirror}/{top} lists no {index}")
        packed = _checked(f"{self._mirror}/{top}/{index}", listed[1])
        self._packages = {p.name: p for p in _packages(lzma.decompress(packed).decode())}
        self._provided = {v: p.name for p in self._packages.values() for v in p.provides}

    def closure(self, names: Iterable[str], *, essential: bool = False) -> list[Package]:
        """The packages of these names, all they depend on, and those every system has."""
        waiting = [*names, *(p.name for p in self._packages.values() if essential and p.essential)]
        found: dict[str, Package] = {}
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            found[name] = package = self._packages[name]
            waiting += [need for n in package.needs if (need := self._choice(n, found))]
        return list(found.values())

    def unpack(self, packages: Iterable[Package], folder: Path, only: str = "") -> None:
        """Download, check and unpack packages, or one member; their scripts do not run."""
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            fetched = pool.map(lambda p: _checked(f"{self._mirror}/{p.path}", p.sha256), packages)
            for archive in fetched:
                with tarfile.open(fileobj=io.BytesIO(_data(archive))) as tar:
                    members = [tar.getmember(only)] if only else None
                    tar.extractall(folder, members, filter="tar")

    def _choice(self, need: tuple[str, ...], found: dict[str, Package]) -> str | None:
        known = [name for name in need if name in self._packages]
        known += [self._provided[name] for name in need if name in self._provided]
        return next((name for name in known if name in found), known[0] if known else None)


def _mirror() -> str:
    """The mirror this system is configured for, when it is Debian's; otherwise Debian's own."""
    files = [_SOURCES / "sources.list", *sorted((_SOURCES / "sources.list.d").glob("*"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    found = re.search(r"^(?:deb|URIs:)\s.*?(https?://\S+/debian)/?(?=\s|$)", text, re.MULTILINE)
    return found[1] if found else _DEFAULT_MIRROR


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - http(s) only
            body: bytes = answer.read()
            return body
    except (OSError, urllib.error.URLError) as error:
        raise UnavailableError(f"{url} cannot be fetched: {error}") from error


def _checked(url: str, sha256: str) -> bytes:
    body = _get(url)
    if hashlib.sha256(body).hexdigest() != sha256:
        raise UnavailableError(f"{url} is not what the release lists (SHA-256 differs)")
    return body


def _verified(signed: bytes) -> str:
    """InRelease, its signature checked where gpgv and Debian's keys are installed."""
    gpgv = shutil.which("gpgv")
    if gpgv and _KEYRING.is_file():
        with tempfile.NamedTemporaryFile(prefix="musplit-") as file:
            file.write(signed)
            file.flush()
            done = subprocess.run(
                [gpgv, "--status-fd", "1", "--keyring", str(_KEYRING), file.name],
                check=False, capture_output=True, text=True,
            )  # fmt: skip
        # One of several signatures by a key that this system knows is enough, as for apt.
        if "[GNUPG:] GOODSIG" not in done.stdout or "[GNUPG:] BADSIG" in done.stdout:
            raise UnavailableError("the mirror's InRelease has no good signature")
    return signed.decode()


def _packages(text: str) -> Iterator[Package]:
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
        if not fields:
            continue
        needs = (fields.get(name, "") for name in ("Pre-Depends", "Depends"))
        yield Package(
            fields["Package"], fields["Version"], fields["Filename"], fields["SHA256"],
            fields.get("Essential") == "yes",
            tuple(_names(group, "|") for text in needs for group in text.split(",") if group),
            _names(fields.get("Provides", ""), ","),
        )  # fmt: skip


def _names(text: str, separator: str) -> tuple[str, ...]:
    """Package names without versions and architecture qualifiers."""
    parts = (part.strip() for part in text.split(separator))
    return tuple(re.split(r"[\s:(]", part, maxsplit=1)[0] for part in parts if part)


def _data(deb: bytes) -> bytes:
    """The data.tar of a .deb, which is an ar archive: 60-byte headers, even offsets."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip(), int(deb[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise UnavailableError("a package holds no data.tar")
