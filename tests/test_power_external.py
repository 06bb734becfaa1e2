"""Meters outside the board: CSV files, lines, plugs."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time

import pytest
from power_support import LOADS, Bench, constant

from edge_client.errors import MeterError
from edge_client.power.check import measure, read_file
from edge_client.power.columns import find_columns
from edge_client.power.find import MeterOptions, find_meter
from edge_client.power.integrate import integrate
from edge_client.power.lines import LineMeter, parse_line
from edge_client.power.local import http_get, local_address
from edge_client.power.plug import HttpPlug, MqttPlug, watts
from edge_client.power.recorded import csv_origin, read_recorded
from edge_client.power.spec import parse_spec
from wire_protocol.events import Received

BEGIN_S, END_S = 0.43, 10.9

HEADERS = {
    "USB meter": ("Time[S],Voltage[V],Current[A],D+[V]", "{t:.3f},{v},{a:.6f},0.6", ""),
    "analyser": ("Timestamp(ms),Current(uA)", "{ms:.3f},{ua:.1f}", "?volts=5.1"),
    "supply": ("Timestamp;Power (mW)", "{iso};{mw:.2f}", ""),
    "script": ("t_s\tpower_w", "{t:.4f}\t{w:.5f}", ""),
    "named": ("clock,ch1", "{t:.4f},{w:.5f}", "?time=clock&power=ch1"),
}


def row(template, t, load):
    power_w = load.power_w(t)
    return template.format(
        t=t, ms=t * 1e3, v=5.1, a=power_w / 5.1, ua=power_w / 5.1 * 1e6, mw=power_w * 1e3,
        w=power_w, iso=f"2026-01-01T00:00:{t:09.6f}+00:00",
    )  # fmt: skip


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("form", HEADERS.values(), ids=HEADERS)
def test_recorded_files_at_10_hz(form, load, tmp_path):
    header, template, options = form
    path = tmp_path / "meter.csv"
    rows = [row(template, n * 0.0993, load) for n in range(116)]
    path.write_text("\n".join([header, *rows]) + "\n")
    checked = read_file(f"{path}{options}")
    end_s = 115 * 0.0993
    true_j = load.energy_j(end_s) - load.energy_j(0.0)
    assert checked.energy.energy_j == pytest.approx(true_j, rel=0.01)
    assert checked.energy.origin.meter == "recorded"


def test_rows_that_are_no_readings_are_left_out_and_counted(tmp_path):
    path = tmp_path / "meter.csv"
    lines = ["time_s,power_w", *(f"{n / 10},4" for n in range(50)), "overload", "1.0,4", "6,nan"]
    lines += [f"{n / 10},4" for n in range(50, 120)] + ["12.0,0"]
    path.write_text("\n".join(lines))
    trace = read_recorded(path, {})
    assert trace.reason == "3 rows are no readings, 1 readings of 0 W or less"
    assert integrate(trace, 0.0, 11.9).energy_j == pytest.approx(47.6)


@pytest.mark.parametrize(
    ("header", "options", "what"),
    [
        ("a,b", {}, "no column of times"),
        ("time_s,b", {}, "neither power nor current"),
        ("time_s,current_a", {}, r"give it: \?volts="),
        ("time_s,current_a", {"volts": "0"}, "supply's voltage"),
        ("time_s,power_w", {"power": "W"}, "no column 'W'"),
    ],
)
def test_a_header_that_does_not_do_says_what_is_missing(header, options, what):
    with pytest.raises(MeterError, match=what):
        find_columns(header, "file.csv", options)


def test_files_and_meters_that_are_not_there(tmp_path):
    with pytest.raises(MeterError, match="cannot be read"):
        find_meter(MeterOptions(f"usb-csv:{tmp_path / 'none.csv'}"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(MeterError, match="no header line yet"):
        find_meter(MeterOptions(f"usb-csv:{tmp_path / 'empty.csv'}"))


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("watt", "no such kind"),
        ("usb-csv", "needs an argument"),
        ("usb-csv:x?voltages=5", "unknown voltages"),
        ("lines:tcp://host", "write lines:tcp://HOST:PORT"),
        ("lines:file", "stdin"),
        ("lines:/dev/null?baud=12345", "12345 baud"),
        ("lines:/dev/null", "not a serial port"),
        ("plug-http:ftp://x", "write http://HOST/PATH#FIELD"),
        ("plug-mqtt:host", r"HOST\[:PORT\]/TOPIC"),
        ("plug-http:http://[::1/x", "write http://HOST/PATH#FIELD"),
        ("plug-http:http://127.0.0.1:99999/x", "write http://HOST/PATH#FIELD"),
        ("plug-http:shelly2@a..b", "unknown host"),
        ("lines:tcp://a..b:80", "unknown host"),
        ("usb-csv:/tmp", "no file that grows"),
    ],
)
def test_a_meter_that_is_named_wrongly_says_how(spec, what):
    with pytest.raises(MeterError, match=what):
        find_meter(MeterOptions(spec))


def test_kinds_that_are_no_meter():
    assert parse_spec("model").kind == "model"
    assert find_meter(MeterOptions("model")).reason == "no meter asked for (--meter model)"


# -- live


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("timed", [True, False], ids=["own clock", "no clock"])
def test_lines_that_come_faster_than_they_are_asked_for(load, timed):
    """100 lines a second, asked for ten times a second."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    written = [0]

    def follow(now_s):
        while written[0] / 100 <= now_s:
            t = written[0] / 100
            clock = f"{t + 1e6:.3f} " if timed else ""
            os.write(writer, f"{clock}{load.power_w(t):.5f}\n".encode())
            written[0] += 1

    bench = Bench(11.5, follow)
    meter = LineMeter(
        reader, parse_line, csv_origin("lines", "pipe", "board-dc"), now_s=bench.now_s
    )
    trace = bench.sample(meter)
    os.close(writer)
    meter.close()
    true_j = load.energy_j(END_S) - load.energy_j(BEGIN_S)
    assert integrate(trace, BEGIN_S, END_S).energy_j == pytest.approx(true_j, rel=0.01)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_csv_file_that_grows(load, tmp_path):
    path = tmp_path / "live.csv"
    path.write_text("Time[S],Power[W]\n-1,999\n")
    meter = find_meter(MeterOptions(f"usb-csv:{path}"))
    written = [0]
    with path.open("a") as file:

        def follow(now_s):
            while written[0] / 20 <= now_s:
                file.write(f"{written[0] / 20:.3f},{load.power_w(written[0] / 20)}\n")
                written[0] += 1
            file.flush()

        bench = Bench(11.5, follow)
        meter._now_s = bench.now_s
        trace = bench.sample(meter)
    meter.close()
    true_j = load.energy_j(END_S) - load.energy_j(BEGIN_S)
    assert integrate(trace, BEGIN_S, END_S).energy_j == pytest.approx(true_j, rel=0.01)


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("4.25", (None, 4.25)),
        ("12.5, 4.25", (12.5, 4.25)),
        ("12.5;4.25\r", (12.5, 4.25)),
        ("1 2 3", None),
        ("# 5", None),
        ("", None),
        ("nan", None),
        ("1e300", None),
        ("watts", None),
    ],
)
def test_the_line_protocol(line, parsed):
    assert parse_line(line) == parsed


def line_meter(*octets: bytes) -> LineMeter:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    for part in octets:
        os.write(writer, part)
    os.close(writer)
    return LineMeter(reader, parse_line, csv_origin("lines", "pipe", "board-dc"), ends=False)


def test_lines_that_never_tell_power_are_said_to():
    with pytest.raises(MeterError, match="2 lines, none of them a reading"):
        line_meter(b"hello\nworld\n").read()


def test_a_line_without_an_end_is_bounded():
    with pytest.raises(MeterError, match="longer than 4096 bytes"):
        line_meter(b"4" * 5000).read()


def test_half_a_line_waits_for_the_rest():
    meter = line_meter(b"4\n5")
    assert meter.read().power_w == 4.0
    assert meter.read() is None


def test_a_tcp_meter_that_goes_away():
    with socket.create_server(("127.0.0.1", 0)) as server:
        meter = find_meter(MeterOptions(f"lines:tcp://127.0.0.1:{server.getsockname()[1]}"))
        peer, _ = server.accept()
        peer.sendall(b"3.5\n4.5\n")
        peer.close()
    for _ in range(100):
        try:
            reading = meter.read()
        except MeterError as error:
            assert "closed the connection" in str(error)  # noqa: PT017
            break
        assert reading is None or reading.power_w in (3.5, 4.0, 4.5)
    else:
        pytest.fail("the end was not noticed")
    meter.close()


def test_a_serial_meter():
    ours, theirs = os.openpty()
    meter = find_meter(MeterOptions(f"lines:{os.ttyname(theirs)}?baud=9600"))
    os.write(ours, b"3.5\n")
    deadline_s = time.monotonic() + 10
    while (reading := meter.read()) is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert reading.power_w == 3.5
    meter.close()
    os.close(ours)
    os.close(theirs)


# -- plugs


class Plug(http.server.BaseHTTPRequestHandler):
    """Answers with what the server says."""

    def do_GET(self):
        status, body = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def plug():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plug)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


MODELS = {
    "shelly1": ("/meter/0", lambda w: {"power": w, "is_valid": True, "total": 5}),
    "shelly2": ("/rpc/Switch.GetStatus?id=0", lambda w: {"id": 0, "output": True, "apower": w}),
    "tasmota": ("/cm?cmnd=Status%208", lambda w: {"StatusSNS": {"ENERGY": {"Power": w}}}),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("model", MODELS)
def test_plugs_by_http(model, load, plug):
    path, body = MODELS[model]
    bench = Bench(11.5, lambda _: None)

    def answer(asked):
        return (200 if asked == path else 404), json.dumps(body(load.power_w(bench.t_s))).encode()

    plug.answer = answer
    meter = HttpPlug(f"{model}@127.0.0.1:{plug.server_port}", rate_hz=10.0, now_s=bench.now_s)
    measured = integrate(bench.sample(meter), BEGIN_S, END_S)
    true_j = load.energy_j(END_S) - load.energy_j(BEGIN_S)
    assert measured.energy_j == pytest.approx(true_j, rel=0.01)
    assert measured.origin.boundary == "wall-ac"


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ((401, b""), "answered 401"),
        ((302, b""), "answered 302"),
        ((200, b"<html>"), "no JSON"),
        ((200, b'{"other": 1}'), "no field 'apower'"),
        ((200, b'{"apower": "12"}'), "is no number"),
        ((200, b'{"apower": true}'), "is no number"),
        ((200, b'{"apower": NaN}'), "is no number"),
        ((200, b'{"apower": 1e300}'), "is no number"),
        ((200, b'{"apower": 1' + b"0" * 4000 + b"}"), "is no number"),
        ((200, b'{"apower": 1' + b"0" * 5000 + b"}"), "no JSON"),
        ((200, b" " * (1 << 17)), "more than 64 KiB"),
    ],
)
def test_answers_of_a_plug_that_are_none(answer, what, plug):
    plug.answer = lambda _: answer
    with pytest.raises(MeterError, match=what):
        HttpPlug(f"shelly2@127.0.0.1:{plug.server_port}", rate_hz=1.0)


def test_a_plug_that_does_not_answer_in_time(plug, monkeypatch):
    monkeypatch.setattr("edge_client.power.plug._TIMEOUT_S", 0.05)
    waiting = threading.Event()
    plug.answer = lambda _: (waiting.wait(5), (200, b"{}"))[1]
    with pytest.raises(MeterError, match="no answer within"):
        HttpPlug(f"shelly2@127.0.0.1:{plug.server_port}", rate_hz=1.0)
    waiting.set()


def test_a_length_of_a_thousand_digits_is_no_more_than_a_large_one():
    def answer(server):
        with server, server.accept()[0] as peer:
            peer.recv(4096)
            peer.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n5")

    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    thread = threading.Thread(target=answer, args=(server,))
    thread.start()
    assert http_get(("127.0.0.1", port), "127.0.0.1", "/", 5.0) == b"5"
    thread.join()


def test_times_and_powers_that_cannot_be_are_left_out(tmp_path):
    path = tmp_path / "meter.csv"
    times = ["0001-01-01", "10000-01-01", "x"]
    rows = [f"{time},4" for time in times] + ["0,1e308", "0.5,-1e308"]
    path.write_text("\n".join(["time,power_w", *rows, *(f"{n / 10},4" for n in range(20))]))
    assert "are no readings" in read_recorded(path, {}).reason
    with pytest.raises(MeterError, match="is no file"):
        read_recorded(tmp_path, {})


@pytest.mark.parametrize("host", ["8.8.8.8", "0.0.0.0", "2001:4860:4860::8888"])
def test_meters_are_asked_at_local_addresses_only(host):
    with pytest.raises(MeterError, match="not a local address"):
        local_address(host, 80)


class Told:
    """A link on which messages wait."""

    def __init__(self):
        self.events = []

    def next_event(self, _timeout_s):
        return self.events.pop(0) if self.events else None


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_plugs_by_mqtt(load):
    link = Told()
    bench = Bench(
        11.5, lambda t: link.events.append(Received("t", json.dumps(load.power_w(t)).encode()))
    )
    meter = MqttPlug(link, "plug/power", "", rate_hz=10.0, now_s=bench.now_s)
    true_j = load.energy_j(END_S) - load.energy_j(BEGIN_S)
    assert integrate(bench.sample(meter), BEGIN_S, END_S).energy_j == pytest.approx(
        true_j, rel=0.01
    )


def test_a_plug_that_tells_nothing_new_gives_no_reading():
    assert MqttPlug(Told(), "plug", "", rate_hz=1.0).read() is None


def test_fields_of_a_plug():
    body = json.dumps({"meters": [{"power": 3.5}]}).encode()
    assert watts(body, "meters.0.power", "plug") == 3.5
    with pytest.raises(MeterError, match="no field"):
        watts(body, "meters.1.power", "plug")


def test_a_slow_plug_serves_a_window_that_is_long_enough():
    bench = Bench(25.0, lambda _: None)

    class Slow:
        origin = csv_origin("plug", "by hand", "wall-ac", 1.0)

        def read(self):
            from edge_client.power.meter import Reading  # noqa: PLC0415

            return Reading(bench.t_s, constant(3.0).power_w(0))

    trace = bench.sample(Slow(), 1.0)
    assert measure(trace, 20.0).energy_j == pytest.approx(60.0)
    assert "1 s" in measure(trace, 5.0).reason or "10%" in measure(trace, 5.0).reason
