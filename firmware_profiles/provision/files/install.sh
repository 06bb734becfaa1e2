#!/bin/sh
# Installs the musplit device program from the folder that this file lies in, without network.
# Run as root. Running it again changes nothing, mends what was cut off, or installs what is new:
# every release has a folder of its own, and a link to it that is replaced at the end.
#
#   /opt/musplit              link to the release: a virtual environment
#   /etc/musplit/device.env   settings, no secrets
#   /var/lib/musplit          identity (key and certificate), shard, weights; the service's alone
set -eu
umask 022

seed=$(cd "$(dirname "$0")" && pwd)
wheels=$seed/wheelhouse
releases=/opt/musplit-releases
state=/var/lib/musplit
unit=/etc/systemd/system/musplit-device.service

say() { printf 'musplit: %s\n' "$*"; }
die() {
    printf 'musplit: error: %s\n' "$*" >&2
    exit 1
}

# A Python of the wheelhouse's version; PYTHON names one that is not on PATH.
find_python() {
    for name in "${PYTHON:-python$wanted}" python3; do
        found=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if [ "$found" = "$wanted" ]; then
            command -v "$name"
            return
        fi
    done
    die "no Python $wanted here (python3 is ${found:-missing}): flash with --system for the image" \
        "that runs, or install python$wanted and name it in PYTHON"
}

# put FILE TO MODE: copy when it differs, whole or not at all.
put() {
    if ! cmp -s "$1" "$2"; then
        install -T -m "$3" "$1" "$2.new"
        mv -fT "$2.new" "$2"
    fi
}

# take FILE TO: a secret leaves the boot partition, which everybody on the board can read.
take() {
    [ -e "$1" ] || return 0
    put "$1" "$2" 600
    rm -f "$1" || say "note: $1 cannot be removed; delete it"
}

install_release() {
    [ ! -e "$release/.installed" ] || return 0
    say "installing release $(basename "$release")"
    python=$(find_python)
    rm -rf "$release"
    mkdir -p "$releases"
    "$python" -m venv --without-pip "$release"
    for pip in "$wheels"/pip-*.whl; do
        "$release/bin/python" "$pip/pip" install --quiet --no-index --no-deps --no-cache-dir \
            --disable-pip-version-check --root-user-action ignore \
            --find-links "$wheels" --require-hashes --requirement "$wheels/requirements.txt"
    done
    "$release/bin/musplit" --version >/dev/null || die "the installed program does not start"
    sync
    : >"$release/.installed"
}

[ "$(id -u)" -eq 0 ] || die "run as root: sudo sh $0"
machine=$(uname -m)
wanted_machine=$(cat "$wheels/machine")
[ "$machine" = "$wanted_machine" ] ||
    die "this is a $machine system, and the wheels are for $wanted_machine: use a 64-bit image"
wanted=$(cat "$wheels/python")
(cd "$wheels" && sha256sum --check --quiet --strict SHA256SUMS) ||
    die "the wheelhouse is damaged: flash again"

release=$releases/$(sha256sum "$wheels/SHA256SUMS" | cut -c 1-16)
install_release
if [ "$(readlink /opt/musplit || :)" != "$release" ]; then
    ln -sfn "$release" /opt/musplit.new
    mv -fT /opt/musplit.new /opt/musplit
fi
for old in "$releases"/*; do
    [ "$old" = "$release" ] || rm -rf "$old"
done

# The state belongs to the service: a link that it left there must not lead root elsewhere.
[ ! -L "$state/identity" ] || die "$state/identity is a link; remove it"
mkdir -p /etc/musplit "$state/identity"
put "$seed/device.env" /etc/musplit/device.env 644
for name in ca.pem signer.pub; do
    [ ! -e "$seed/$name" ] || put "$seed/$name" "$state/identity/$name" 644
done
take "$seed/enrol.token" "$state/identity/enrol.token"
take "$seed/shard.npz" "$state/shard.npz"
[ -e "$state/shard.npz" ] || say "note: no data yet; put a shard at $state/shard.npz"
# The service's user is made at its start, and owns what its folder's owner owns.
chmod 700 "$state" "$state/identity"
chown -R --reference="$state" "$state/identity"
[ ! -e "$state/shard.npz" ] || chown -h --reference="$state" "$state/shard.npz"

mkdir -p "$(dirname "$unit")/multi-user.target.wants"
put "$seed/musplit-device.service" "$unit" 644
ln -sf "$unit" "$(dirname "$unit")/multi-user.target.wants/musplit-device.service"
if [ -d /run/systemd/system ] && [ "${1:-}" != --no-start ]; then
    systemctl daemon-reload
    systemctl restart --no-block musplit-device.service
fi
sync
say "installed: $(/opt/musplit/bin/musplit --version), starts at boot"
