"""Power supply, throttling, temperature, and the sensor that energy would be read from."""

from __future__ import annotations

from typing import Final

from edge_client.doctor.findings import Board, Findings, error, ok, warning
from edge_client.firmware import throttled_bits
from edge_client.power.find import MeterOptions, find_meter
from wire_protocol.energy import NoEnergy

# Raspberry Pi firmware: bits 0-3 now, the same 16 higher since boot.
_FLAGS: Final = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
_SINCE_BOOT: Final = 16
_OVER_CURRENT: Final = "sys/class/hwmon/hwmon*/oc*_event_cnt"  # Jetson, soctherm_oc
_WARM_C: Final = 70.0
_HOT_C: Final = 80.0  # where Raspberry Pi firmware begins to throttle
_SUPPLY: Final = "use the board's own supply and a short cable, unplug what draws from its USB"
_COOL: Final = "add a heat sink or a fan, and let air to it"
_INVALID: Final = "speed changes in mid-run; figures of latency and energy are not valid"


def check_power(board: Board) -> Findings:
    """Flags of the firmware, temperatures, sensors."""
    yield from _throttling(board)
    yield from _temperature(board)
    meter = find_meter(MeterOptions(), board.profile, board.root)
    if isinstance(meter, NoEnergy):
        yield warning(
            "power-sensor", meter.reason, "joules will be modelled, not measured",
            "attach a sensor (docs/energy.md), or live with modelled figures",
        )  # fmt: skip
    else:
        origin = meter.origin
        meter.close()
        yield ok("power-sensor", f"{origin.meter} ({origin.driver}), {origin.boundary}")


def _throttling(board: Board) -> Findings:
    bits = throttled_bits(board.root)
    if bits is not None:
        yield from _judge(bits)
        return
    counts = {path.name: board.read(str(path.relative_to(board.root)))
              for path in board.glob(_OVER_CURRENT)}  # fmt: skip
    events = {name: text for name, text in counts.items() if text and text != "0"}
    if events:
        told = ", ".join(f"{name} {text}" for name, text in events.items())
        yield warning("throttling", f"over-current events since boot: {told}", _INVALID, _SUPPLY)
    elif counts:
        yield ok("throttling", "no over-current event since boot")
    elif board.profile is not None and board.profile.kind != "laptop":
        yield warning(
            "throttling", "the firmware's flags cannot be read", _INVALID,
            "install vcgencmd (raspi-utils) and be in the group video",
        )  # fmt: skip
    else:
        yield ok("throttling", "this machine tells no flags")


def _judge(bits: int) -> Findings:
    now = [name for bit, name in enumerate(_FLAGS) if bits >> bit & 1]
    before = [name for bit, name in enumerate(_FLAGS) if bits >> (bit + _SINCE_BOOT) & 1]
    names = {*now, *before}
    remedy = " and ".join(
        text for text, flags in ((_SUPPLY, set(_FLAGS[:1])), (_COOL, set(_FLAGS[1:])))
        if flags & names
    )  # fmt: skip
    if now:
        told = f"now: {', '.join(now)} (get_throttled {bits:#x})"
        yield error("throttling", told, _INVALID, remedy)
    elif before:
        told = f"since boot, not now: {', '.join(before)} (get_throttled {bits:#x})"
        yield warning("throttling", told, _INVALID, f"{remedy}; then restart, which clears it")
    else:
        yield ok("throttling", f"no flag now or since boot (get_throttled {bits:#x})")


def _temperature(board: Board) -> Findings:
    zones: dict[str, float] = {}
    for path in board.glob("sys/class/thermal/thermal_zone*"):
        zone = path.relative_to(board.root)
        text = board.read(f"{zone}/temp")  # millidegrees; a zone that is off gives an error
        if text and text.lstrip("-").isdecimal():
            zones[board.read(f"{zone}/type") or path.name] = int(text) / 1000
    if not zones:
        yield ok("temperature", "this machine tells none")
        return
    name, hottest_c = max(zones.items(), key=lambda zone: zone[1])
    told = f"{hottest_c:.1f} degrees C ({name})"
    if hottest_c >= _HOT_C:
        yield error("temperature", told, _INVALID, _COOL)
    elif hottest_c >= _WARM_C:
        yield warning("temperature", told, f"boards throttle from {_HOT_C:.0f} on", _COOL)
    else:
        yield ok("temperature", told)
