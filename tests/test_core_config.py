"""Configuration: what is accepted, and which field every refusal names."""

import re

import msgspec
import pytest
from core_support import DIGITS

from server_node.config import Config, load_config, to_toml
from server_node.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, *overrides):
    """The one line that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_run_is_the_default_run():
    assert load_config(DIGITS, []) == Config()


def test_an_empty_file_is_all_defaults(toml):
    assert load_config(toml(""), []) == Config()


def test_participants_are_all_devices_unless_said_otherwise(toml):
    assert load_config(toml("[devices]\ncount = 5"), []).participants == 5
    assert load_config(toml("[devices]\ncount = 5\nparticipants = 2"), []).participants == 2


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[nosuch]\nx = 1", "nosuch"),
        ("seed = 1", "seed"),
        ("[run]\nsede = 1", "run.*sede"),
        ("[method]\ntau = 0", r"method\.tau"),
        ("[method]\ntau = 1.5", r"method\.tau"),
        ("[method]\ntau = '2'", r"method\.tau"),
        ("[method]\ntau = true", r"method\.tau"),
        ("[method]\neta_c = -0.1", r"method\.eta_c"),
        ("[method]\neta_g = 0.0", r"method\.eta_g"),
        ("[method]\nlam = 0", r"method\.lam"),
        ("[method]\nschedule = 'linear'", r"method\.schedule"),
        ("[run]\nseed = -1", r"run\.seed"),
        ("[run]\nrounds = 0", r"run\.rounds"),
        ("[run]\nrounds = 99999999999", r"run\.rounds"),
        ("[run]\nfleet = 3", r"run\.fleet"),
        ("[run]\nfleet = 'a/b'", r"run\.fleet"),
        ("[run]\nfleet = 'a+#'", r"run\.fleet"),
        ("[run]\nfleet = ''", r"run\.fleet"),
        ("[data]\nholdout = 1.0", r"data\.holdout"),
        ("[data]\nalpha = -1", r"data\.alpha"),
        ("[data]\nstandardise = 'yes'", r"data\.standardise"),
        ("[devices]\nbatch = 0", r"devices\.batch"),
        ("[server]\ndevice = 'tpu'", r"server\.device"),
        ("[evaluation]\ncontrol = 1", r"evaluation\.control"),
        ("[emulation]\nspeed = [1.0, 0.0]", r"emulation\.speed"),
        ("[emulation]\ndelay_s = 'long'", r"emulation\.delay_s"),
        ("run = 3", "run"),
        ("[devices]\ncount = 3\nparticipants = 4", r"devices\.participants"),
        ("[devices]\ncount = 3\n[round]\nquorum = 4\ndeadline_s = 1", r"round\.quorum"),
        ("[devices]\ncount = 5\nparticipants = 2\n[round]\nquorum = 3\ndeadline_s = 1",
         r"round\.quorum"),
        ("[round]\nquorum = 1", r"round\.deadline_s"),
        ("[devices]\ncount = 2\n[emulation]\nspeed = [1.0, 1.0, 1.0]", r"emulation\.speed"),
        ("[devices]\ncount = 1\n[emulation]\ndelay_s = [1.0, 1.0]", r"emulation\.delay_s"),
        ("[run]\nseed = ", "not TOML"),
        ("[run\n", "not TOML"),
        (f"a = {'[' * 5000}", "not TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_file_and_field_in_one_line(toml, text, field):
    path = toml(text)
    text = refusal(path)
    assert str(path) in text
    assert re.search(field, text), text


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "field", ["method.eta_c", "method.lam", "method.eta_g", "data.alpha", "round.stall_s"]
)
def test_numbers_that_are_not_finite_are_refused(toml, field, value):
    """They reach arithmetic and clocks, and config.toml could not say them."""
    assert re.search(re.escape(field), refusal(toml(""), f"{field}={value}"))


def test_missing_and_binary_files_are_refused(tmp_path):
    assert "nowhere.toml" in refusal(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "binary.toml" in refusal(tmp_path / "binary.toml")
    assert str(tmp_path) in refusal(tmp_path)


# -- overrides


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("method.tau=4", "method", "tau", 4),
        (" method.tau = 4 ", "method", "tau", 4),
        ("method.eta_c=0.5", "method", "eta_c", 0.5),
        ("method.eta_c=1", "method", "eta_c", 1.0),
        ("method.lam=1e-4", "method", "lam", 1e-4),
        ("run.fleet=bench", "run", "fleet", "bench"),
        ('run.fleet="bench"', "run", "fleet", "bench"),
        ("model.name=mlp:64-8-10", "model", "name", "mlp:64-8-10"),
        ("data.source=/data/a=b.npz", "data", "source", "/data/a=b.npz"),
        ("data.source=1e5/x", "data", "source", "1e5/x"),
        ("evaluation.control=false", "evaluation", "control", False),
        ("emulation.speed=[1, 0.5]", "emulation", "speed", [1.0, 0.5]),
        ("emulation.delay_s=[]", "emulation", "delay_s", []),
    ],
)
def test_override_of_every_type_reaches_its_field_and_no_other(override, section, field, value):
    config = load_config(DIGITS, [override])
    got = getattr(getattr(config, section), field)
    assert got == value
    assert type(got) is type(value)
    expected = msgspec.to_builtins(Config())
    expected[section][field] = value
    assert msgspec.to_builtins(config) == expected


def test_later_overrides_win_over_earlier_and_over_the_file(toml):
    path = toml("[method]\ntau = 2")
    assert load_config(path, ["method.tau=3", "method.tau=5"]).method.tau == 5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.tau", "method.tau"),
        ("tau=4", "section.key=value"),
        ("=4", "section.key=value"),
        (".tau=4", "section.key=value"),
        ("method.=4", "section.key=value"),
        ("", "section.key=value"),
        ("method.tau=", "method.tau"),
        ("method.tau=four", "method.tau"),
        ("method.tau=[4]", "method.tau"),
        ("method.nosuch=4", "nosuch"),
        ("nosuch.tau=4", "nosuch"),
        ("run.seed.x=4", "seed.x"),
        ("evaluation.control=maybe", "evaluation.control"),
        ("emulation.speed=[1, fast]", "emulation.speed"),
    ],
)
def test_malformed_override_is_refused_and_named(override, says):
    assert says in refusal(DIGITS, override)


def test_override_into_something_that_is_no_section_is_refused(toml):
    assert "method" in refusal(toml("method = 3"), "method.tau=4")


# -- what is written beside a run


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.seed=9223372036854775807", "method.lam=1e-9", "method.eta_c=1e6"],
        ["emulation.speed=[0.1, 1, 0.25]", "emulation.delay_s=[0.0]", "evaluation.control=false"],
        ['data.source=a "quoted" \\path\\ with é and 日本\t.npz'],
        ["devices.participants=3", "round.quorum=2", "round.deadline_s=1.5"],
    ],
)
def test_what_is_written_is_read_back_as_the_same_run(toml, overrides):
    config = load_config(DIGITS, overrides)
    again = load_config(toml(to_toml(config)), [])
    assert again == config
    assert again.sha256() == config.sha256()


@pytest.mark.parametrize("character", ["\x7f", "\x01", "\r", "\\", '"', "\u2028", "\U0001f600"])
def test_any_character_of_a_path_survives(toml, character):
    source = msgspec.structs.replace(Config().data, source=f"a{character}b")
    config = msgspec.structs.replace(Config(), data=source)
    assert load_config(toml(to_toml(config)), []) == config


def test_the_digest_follows_values_not_the_way_they_are_written(toml):
    one = load_config(toml("[method]\ntau = 4\neta_c = 1"), [])
    other = load_config(DIGITS, ["method.eta_c=1.0", "method.tau=4"])
    assert one.sha256() == other.sha256()


def test_every_field_counts_in_the_digest():
    config, digests = Config(), [Config().sha256()]
    for name in config.__struct_fields__:
        section = getattr(config, name)
        for field in section.__struct_fields__:
            changed = msgspec.structs.replace(section, **{field: "something else"})
            digests.append(msgspec.structs.replace(config, **{name: changed}).sha256())
    assert len(digests) > 30
    assert len(set(digests)) == len(digests)


def test_an_override_at_fault_is_named_instead_of_the_file():
    with pytest.raises(ConfigError, match=r"^--set 'method.tau=abc': method.tau: Expected `int`"):
        load_config(DIGITS, ["method.tau=abc"])


@pytest.mark.parametrize("field", ["wire.packet_limit", "emulation.max_packet_bytes"])
def test_a_packet_limit_below_the_smallest_message_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field}: 511 is below 512"):
        load_config(DIGITS, [f"{field}=511"])
    load_config(DIGITS, [f"{field}=512"])
