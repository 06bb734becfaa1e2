"""First boot of Raspberry Pi OS Bookworm and the first Trixie: firstrun.sh, run by systemd.run.

The script sits at /boot/firmware from the start. `systemd.run=/boot/firstrun.sh`, as older tools
write it, is rewritten by the image's initramfs, which also cuts the script at its `rm`.
"""

from __future__ import annotations

import shlex
from typing import Final

from firmware_profiles.provision.order import Order

SCRIPT: Final = "firstrun.sh"
_RUN: Final = (
    "systemd.run=/boot/firmware/firstrun.sh", "systemd.run_success_action=reboot",
    "systemd.unit=kernel-command-line.target",
)  # fmt: skip
_HEAD: Final = """\
#!/bin/sh
# Written by musplit flash. Runs once, as root, at the first boot; then removes itself.
custom=/usr/lib/raspberrypi-sys-mods/imager_custom
boot=/boot/firmware
"""
_TAIL: Final = """\
sh "$boot/musplit/install.sh" --no-start >"$boot/musplit/install.log" 2>&1
rm -f "$boot/firstrun.sh"
sed -i 's| systemd\\.[^ ]*||g' "$boot/cmdline.txt"
exit 0
"""


def firstrun_files(order: Order) -> dict[str, bytes]:
    """The script, by name."""
    quote = shlex.quote
    lines = [f'"$custom" set_hostname {quote(order.hostname)}']
    if order.login is not None:
        user = quote(order.login.user)
        lines += [
            # In this order: the key goes to the first user, who is then renamed.
            f'"$custom" enable_ssh -k {quote(order.login.key)}',
            f"/usr/lib/userconf-pi/userconf {user} '!'",
            # Without a password sudo could not be used at all.
            f"printf '%s ALL=(ALL) NOPASSWD:ALL\\n' {user} >/etc/sudoers.d/010_musplit",
            "chmod 440 /etc/sudoers.d/010_musplit",
        ]
    if order.wifi is not None:
        ssid, psk, country = order.wifi
        lines.append(f'"$custom" set_wlan {quote(ssid)} {psk} {country}')
    return {SCRIPT: (_HEAD + "\n".join(lines) + "\n" + _TAIL).encode()}


def with_firstrun(cmdline: str) -> str:
    """The kernel command line that runs the script at the next boot."""
    kept = [word for word in cmdline.split() if not word.startswith("systemd.")]
    return " ".join([*kept, *_RUN]) + "\n"
