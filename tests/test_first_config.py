"""Fields of first order, pooled steps and the cut gradient: what is taken, and what is refused."""

import pytest
from core_support import DIGITS, tiny_config

from server_node.config import load_config, to_toml
from server_node.errors import ConfigError
from server_node.prepare import prepare

FIRST = "method.server_order=first"
POOLED = "method.server_batch=pooled"
ASYNCHRONOUS = "round.mode=asynchronous"


@pytest.mark.parametrize(
    ("overrides", "field", "reason"),
    [
        (["method.server_optimiser=Adam"], "method.server_optimiser", "have no optimiser"),
        (["method.server_options={momentum=0.9}"], "method.server_options", "have no optimiser"),
        ([FIRST, "method.server_options={lr=0.1}"], "method.server_options", "method.eta_s"),
        ([FIRST, "method.directions_server=2"], "method.directions_server", "no directions"),
        ([FIRST, "server.replicas=2"], "server.replicas", "one device at a time"),
        ([POOLED, "server.replicas=2"], "server.replicas", "once for all"),
        (["method.reuse_rounds=1"], "method.reuse_rounds", "pooled"),
        ([POOLED, "method.tau_mode=adaptive"], "method.tau_mode", "single device"),
        ([POOLED, ASYNCHRONOUS], "method.server_batch", "barrier"),
        ([FIRST, "method.server_options={momentum='x'}"], "method.server_options", "Expected"),
        (["server.frames_mb=0"], "server.frames_mb", ">= 1"),
    ],
)
def test_nonsense_is_refused_with_its_reason(overrides, field, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(DIGITS, overrides)
    text = str(caught.value)
    assert field in text
    assert reason in text
    assert "\n" not in text


@pytest.mark.parametrize("options", ["{}", "{betas=[0.8, 0.99], amsgrad=true, weight_decay=1e-4}"])
def test_options_survive_the_run_folders_configuration(options, tmp_path):
    config = load_config(
        DIGITS, [FIRST, "method.server_optimiser=Adam", f"method.server_options={options}"]
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path, []) == config


def test_an_unknown_optimiser_is_refused_before_anything_is_exported(tmp_path):
    with pytest.raises(ConfigError, match=r"method\.server_optimiser"):
        prepare(tiny_config(FIRST, "method.server_optimiser=Adan"), tmp_path)
    assert not (tmp_path / "client").exists()
