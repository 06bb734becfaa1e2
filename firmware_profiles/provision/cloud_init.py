"""First boot of later Raspberry Pi OS and of Ubuntu Server: cloud-init's NoCloud files.

YAML is written as JSON where a value is free text: JSON strings are YAML.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from firmware_profiles.provision.order import Order

USER_DATA: Final = "user-data"
META_DATA: Final = "meta-data"
NETWORK: Final = "network-config"
_MARK: Final = "ds=nocloud;i=musplit-"
_INSTALL: Final = "sh /boot/firmware/musplit/install.sh >/boot/firmware/musplit/install.log 2>&1"


def cloud_init_files(order: Order, seed_digest: str) -> dict[str, bytes]:
    """user-data, meta-data and network-config. A changed seed is a new instance: it runs again."""
    user_data = "#cloud-config\n# Written by musplit flash.\n" + _yaml(_user_data(order))
    network = "# Written by musplit flash.\n" + _yaml({"network": _network(order)})
    instance = instance_id(order, seed_digest)
    return {
        USER_DATA: user_data.encode(),
        META_DATA: f"instance-id: {instance}\ndsmode: local\n".encode(),
        NETWORK: network.encode(),
    }


def instance_id(order: Order, seed_digest: str) -> str:
    """Names the board and everything that was written for it."""
    text = seed_digest + json.dumps([_user_data(order), _network(order)])
    return f"musplit-{order.hostname}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def with_cloud_init(cmdline: str, instance: str) -> str:
    """The kernel command line that names the data source, so that no boot searches for it."""
    kept = [word for word in cmdline.split() if not word.startswith(_MARK)]
    return " ".join([*kept, f"ds=nocloud;i={instance}"]) + "\n"


def _user_data(order: Order) -> dict[str, Any]:
    data: dict[str, Any] = {"hostname": order.hostname, "manage_etc_hosts": True}
    commands: list[list[str]] = []
    if order.login is not None:
        data["user"] = {
            "name": order.login.user,
            "shell": "/bin/bash",
            "lock_passwd": True,
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "ssh_authorized_keys": [order.login.key],
        }
        data["ssh_pwauth"] = False
        # Raspberry Pi OS ships with its server off, and nothing else turns it on.
        commands.append(["systemctl", "enable", "--now", "ssh"])
    if order.wifi is not None:
        commands.append(["rfkill", "unblock", "wifi"])
    data["runcmd"] = [*commands, ["sh", "-c", _INSTALL]]
    return data


def _network(order: Order) -> dict[str, Any]:
    network: dict[str, Any] = {
        "version": 2,
        # A network file replaces the image's own, cable included; without `optional` the boot
        # waits for a cable that is not there.
        "ethernets": {"eth0": {"dhcp4": True, "optional": True}},
    }
    if order.wifi is not None:
        network["wifis"] = {
            "wlan0": {
                "dhcp4": True,
                "optional": True,
                "regulatory-domain": order.wifi.country,
                "access-points": {order.wifi.ssid: {"password": order.wifi.psk}},
            }
        }
    return network


def _yaml(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
