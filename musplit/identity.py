"""`musplit ca` and `musplit enroll`: who is who in a lab."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from musplit.support import (
    Command,
    FiniteRange,
    fail,
    format_option,
    guarded,
    parse_address,
    print_facts,
    say,
)

_FOLDER = click.Path(path_type=Path)
_HOST = click.option("--host", "hosts", multiple=True, metavar="NAME",
                     help="Name or address by which machines reach the broker; repeatable."
                     )  # fmt: skip


def _dir(command: Command) -> Command:
    return click.option(
        "--dir", "folder", type=_FOLDER, default=Path("musplit-ca"), show_default=True,
        metavar="DIR", help="The authority's folder; it holds secrets.",
    )(command)  # fmt: skip


@click.group()
def ca() -> None:
    """The lab's certificate authority: who takes part, until when, and who no more.

    \b
    musplit ca init --host 192.168.1.10
    musplit ca broker-config --out broker
    musplit ca enroll pi-1 --out pi-1.token
    musplit ca serve --listen 0.0.0.0
    """


@ca.command()
@_dir
@_HOST
@click.option("--fleet", "fleets", multiple=True, metavar="NAME",
              help="A fleet whose server gets an identity; repeatable.  [default: lab]"
              )  # fmt: skip
@format_option
def init(folder: Path, hosts: tuple[str, ...], fleets: tuple[str, ...], output: str) -> None:
    """Make the authority, the key that signs bundles, the broker's and the servers' identities.

    \b
    musplit ca init --host 192.168.1.10 --host lab.local
    """
    with guarded():
        from identity.authority import Authority

        Authority.init(folder, list(fleets or ("lab",)), list(hosts), time.time())
    facts = {"ca": str(folder / "ca.pem")} | {
        f"server_{fleet}": str(folder / "servers" / fleet) for fleet in fleets or ("lab",)
    }
    print_facts(facts, output)
    if not hosts:
        say("note: without --host only this machine reaches the broker; musplit ca broker-config "
            "--host ADDRESS adds one")  # fmt: skip


@ca.command()
@_dir
@click.argument("name")
@format_option
def fleet(folder: Path, name: str, output: str) -> None:
    """Add a fleet, or renew its server's identity, which lies in DIR/servers/NAME.

    \b
    musplit ca fleet night
    """
    with guarded():
        from identity.authority import Authority

        made = Authority(folder).add_fleet(name, time.time())
    print_facts({"server": str(made)}, output)


@ca.command()
@_dir
@click.argument("device_id", metavar="DEVICE")
@click.option("--valid-h", default=24.0, type=FiniteRange(0, 24 * 365, min_open=True),
              show_default=True, metavar="H", help="Hours until the token expires.")  # fmt: skip
@click.option("--out", required=True, type=_FOLDER, metavar="FILE",
              help="Token file to write, mode 600; - is stdout.")  # fmt: skip
def enroll(folder: Path, device_id: str, valid_h: float, out: Path) -> None:
    """Make a one-time token with which DEVICE gets its certificate.

    An earlier token of the device becomes void.

    \b
    musplit ca enroll pi-1 --out pi-1.token
    """
    with guarded():
        from identity.authority import Authority
        from identity.files import write_private

        if out.exists() and not _is_token_of(device_id, out):
            fail(f"--out {out}: exists, and is no token of {device_id}; give another file", 3)
        token = Authority(folder).new_token(device_id, valid_h * 3600, time.time())
        if str(out) == "-":
            print(token)
        else:
            write_private(out, token.encode() + b"\n")
            say(f"{out}: enrols {device_id} once, within {valid_h:g} h")


def _is_token_of(device_id: str, path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith(f"{device_id}:".encode())


@ca.command()
@_dir
@click.argument("name")
@click.option("--broker", "broker_folder", type=_FOLDER, metavar="DIR",
              help="Also write the lists in this folder of broker-config again.")  # fmt: skip
def revoke(folder: Path, name: str, broker_folder: Path | None) -> None:
    """Revoke the certificates and tokens of a device, or of a server (_server.FLEET).

    It counts when the broker has the new lists and reads them: SIGHUP for mosquitto, by itself
    for musplit broker.

    \b
    musplit ca revoke pi-1 --broker broker
    """
    with guarded():
        from identity.authority import Authority
        from identity.broker import refresh_broker_folder

        authority, now_s = Authority(folder), time.time()
        count = authority.revoke(name, now_s)
        if broker_folder is not None:
            refresh_broker_folder(authority, broker_folder, now_s)
    say(f"{name}: {count} certificate(s) revoked")
    if broker_folder is None:
        say("the broker does not know yet: musplit ca broker-config --out DIR, then SIGHUP")


@ca.command("list")
@_dir
@format_option
def list_(folder: Path, output: str) -> None:
    """Show certificates and open tokens.

    \b
    musplit ca list --format json
    """
    with guarded():
        from identity.authority import Authority
        from identity.certificates import utc

        ledger, now_s = Authority(folder).ledger(), time.time()
    rows: list[dict[str, Any]] = [
        {
            "name": i.name, "role": i.role, "serial": i.serial, "expires_unix_s": i.expires_unix_s,
            "state": "revoked" if i.revoked_unix_s is not None
            else "valid" if i.live(now_s) else "expired",
        }
        for i in ledger.certificates
    ] + [
        {"name": t.device_id, "role": "token", "serial": "", "expires_unix_s": t.expires_unix_s,
         "state": "open" if t.expires_unix_s > now_s else "expired"}
        for t in ledger.tokens if not t.void and t.used_unix_s is None
    ]  # fmt: skip
    if output == "json":
        print(json.dumps({"fleets": ledger.fleets, "hosts": ledger.hosts, "entries": rows}))
        return
    for row in rows:
        until = utc(row["expires_unix_s"])
        print(f"{row['name']:24} {row['role']:7} {row['state']:8} until {until:%Y-%m-%d %H:%M} UTC")


@ca.command()
@_dir
@click.option("--listen", default="127.0.0.1:8884", show_default=True, metavar="ADDRESS[:PORT]",
              help="Where to listen; boards need an address that they reach.")  # fmt: skip
def serve(folder: Path, listen: str) -> None:
    """Run the enrolment service over HTTPS until Ctrl-C: boards change tokens for certificates.

    It needs to run only while boards enrol. DIR/audit.jsonl tells what it did.

    \b
    musplit ca serve --listen 0.0.0.0
    """
    with guarded():
        from identity.authority import Authority
        from identity.exchange import DEFAULT_PORT
        from identity.service import EnrolmentService

        address = parse_address(listen, default_port=DEFAULT_PORT)
        with EnrolmentService(Authority(folder), address, say) as service:
            say(f"enrolment service listening on {address}")
            try:
                service.serve_forever()
            except KeyboardInterrupt:
                say("enrolment service stopped")


@ca.command()
@_dir
@click.option("--out", required=True, type=_FOLDER, metavar="DIR",
              help="Folder to write, or to write again.")  # fmt: skip
@click.option("--listen", default="0.0.0.0:8883", show_default=True, metavar="ADDRESS[:PORT]",
              help="Where the broker listens.")  # fmt: skip
@_HOST
def broker_config(folder: Path, out: Path, listen: str, hosts: tuple[str, ...]) -> None:
    """Write what a mosquitto needs: configuration, access list, revocation list, certificate.

    With --host the broker gets a new certificate for these names and addresses.

    \b
    musplit ca broker-config --out broker
    musplit broker --tls broker --listen 0.0.0.0
    mosquitto -c broker/mosquitto.conf
    """
    with guarded():
        from identity.authority import Authority
        from identity.broker import write_broker_folder

        authority, now_s = Authority(folder), time.time()
        address = parse_address(listen, tls=True)
        if hosts:
            authority.set_hosts(list(hosts), now_s)
        write_broker_folder(authority, out, address.host, address.port, now_s)
    say(f"{out}: written; start it with musplit broker --tls {out}, or mosquitto -c "
        f"{out / 'mosquitto.conf'}")  # fmt: skip


@click.command()
@click.option("--url", required=True, metavar="https://HOST[:PORT]",
              help="The enrolment service; port 8884 if none.")  # fmt: skip
@click.option("--ca", "ca_file", required=True, type=_FOLDER, metavar="FILE",
              help="The lab's ca.pem.")  # fmt: skip
@click.option("--token-file", required=True, type=_FOLDER, metavar="FILE",
              help="The one-time token; deleted when it is used. - is stdin.")  # fmt: skip
@click.option("--identity", required=True, type=_FOLDER, metavar="DIR",
              help="Folder for key, certificate, CA and signer.pub.")  # fmt: skip
@click.option("--device-id", default="", help="This device's name, when the token must be for it.")
@format_option
def enroll_device(
    url: str, ca_file: Path, token_file: Path, identity: Path, device_id: str, output: str
) -> None:  # fmt: skip
    """On a device: make a key here and get a certificate for it with a one-time token.

    The key never leaves the device. Does nothing when a valid certificate is there.

    \b
    musplit enroll --url https://192.168.1.10 --ca ca.pem --token-file enrol.token \\
        --identity /var/lib/musplit/identity
    """
    with guarded():
        from identity.certificates import utc
        from identity.enrol import enrol

        token = _read_token(token_file)
        done = enrol(url, ca_file, token, identity, device_id, time.time())
        if str(token_file) != "-":
            token_file.unlink(missing_ok=True)
    if output == "json":
        print(json.dumps({**done._asdict(), "identity": str(identity)}))
        return
    state = "new" if done.fresh else "there already, and valid"
    print(
        f"{identity}: certificate of {done.device_id}, {state}, until "
        f"{utc(done.expires_unix_s):%Y-%m-%d %H:%M} UTC"
    )


def _read_token(path: Path) -> str:
    """The token in a file, or on stdin; nothing when there is no file."""
    if str(path) == "-":
        return sys.stdin.readline(256).strip()
    if not path.exists():
        return ""
    with path.open("rb") as file:
        data = file.read(257).strip()
    if len(data) > 256 or not data.isascii():
        fail(f"{path}: no enrolment token; make one: musplit ca enroll DEVICE --out FILE", 3)
    return data.decode()
