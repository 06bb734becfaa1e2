"""First boot of images with rpi-preseed (2026 on): one TOML file, read in place.

Its reader is a small one: basic strings know the escapes of backslash and quote alone, and end
with their line.
"""

from __future__ import annotations

from typing import Final

from firmware_profiles.provision.order import Order

FILE: Final = "rpi-preseed.toml"
_INSTALL: Final = "sh /boot/firmware/musplit/install.sh >/boot/firmware/musplit/install.log 2>&1"


def preseed_files(order: Order) -> dict[str, bytes]:
    """The file, by name."""
    lines = [
        "# Written by musplit flash.",
        'config_version = "1.1"',
        "",
        "[system]",
        f"hostname = {_quote(order.hostname)}",
    ]
    if order.login is not None:
        lines += [
            "",
            "[user]",
            f"name = {_quote(order.login.user)}",
            'password = "!"',
            "password_encrypted = true",
            "passwordless_sudo = true",
            "",
            "[ssh]",
            "enabled = true",
            "password_authentication = false",
            f"authorized_keys = [{_quote(order.login.key)}]",
        ]
    if order.wifi is not None:
        lines += [
            "",
            "[wlan]",
            f"ssid = {_quote(order.wifi.ssid)}",
            f"password = {_quote(order.wifi.psk)}",
            "password_encrypted = true",
            f"country = {_quote(order.wifi.country)}",
        ]
    # Late: early commands have five seconds each. Certificates need the time of day.
    lines += ["", "[runcmd]", f"late = [{_quote(_INSTALL)}]", "late_retries = 2"]
    return {FILE: ("\n".join(lines) + "\n").encode()}


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
