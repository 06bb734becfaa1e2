"""A study file: frozen structs, read from TOML, checked once; docs/studies.md explains them."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from server_node.config import Config, explain
from studies.errors import StudyError

Name = Annotated[str, Meta(pattern=r"^[^|\r\n]+$", max_length=120)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Share = Annotated[float, Meta(gt=0, lt=1)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
# Fields of a run's configuration, as TOML tables or as "section.field"; values by name.
Fields = dict[str, Any]

MUSPLIT: Final = "musplit"
BASELINE: Final = "baseline:"


class Table(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the TOML file."""


class Study(Table, frozen=True):
    """What is asked, and what is read off the curves."""

    title: str
    question: str = ""
    seeds: Count = 3  # 0 .. seeds - 1
    # Accuracies, 0 .. 1: rounds and simulated seconds until each is reached.
    targets: list[Share] = []
    # Simulated seconds at which the accuracy is read off.
    at_s: list[Annotated[float, Meta(gt=0, le=1e9)]] = []


class Tuning(Table, frozen=True):
    """The budget of every tuned arm, the same for all: trials x rounds x seeds."""

    trials: Count
    rounds: Annotated[int, Meta(ge=0, le=1_000_000)] = 0  # 0: as the test runs
    seeds: Count = 1
    holdout: Share = 0.2  # of the training set; the test set is never looked at
    by: Literal["accuracy", "rounds", "seconds"] = "accuracy"


class Energy(Table, frozen=True):
    """The linear model of energy: client forwards and bytes, each with its price."""

    joules_per_forward: NotNegative
    joules_per_byte: NotNegative
    source: Annotated[str, Meta(min_length=1)]


class Published(Table, frozen=True):
    """A figure of somebody else's, printed beside ours."""

    setting: Name
    arm: Name
    accuracy: Annotated[float, Meta(ge=0, le=1)]
    source: Annotated[str, Meta(min_length=1)]


class Setting(Table, frozen=True):
    """Circumstances under which all arms are run: data, partition, delays."""

    name: Name
    fields: Fields = field(default={}, name="set")


class Arm(Table, frozen=True):
    """What is compared. `each` makes one arm of every combination of its values."""

    name: Name
    kind: Annotated[str, Meta(pattern=r"^(musplit|baseline:[a-z0-9_]+)$")] = MUSPLIT
    fields: Fields = field(default={}, name="set")
    each: Fields = {}
    tune: Fields = {}
    # The frozen client beside it: the same with eta_c = 0, and its own tuning.
    control: bool = False
    control_tune: Fields = {}
    settings: list[Name] = []  # only under these; empty: under all


class Figure(Table, frozen=True):
    """A plot of what the arms of `each` come to against one of its fields.

    `y` "cut": the size of the device half, with the best of each x marked.
    """

    x: str
    y: Literal["accuracy", "rounds", "seconds", "cut"]
    series: str = ""


class StudyFile(Table, frozen=True):
    """One study."""

    study: Study
    setting: Annotated[list[Setting], Meta(min_length=1)]
    arm: Annotated[list[Arm], Meta(min_length=1)]
    base: Fields = {}
    tuning: Tuning | None = None
    energy: Energy | None = None
    published: list[Published] = []
    figure: list[Figure] = []


def library() -> dict[str, str]:
    """The studies that ship with musplit: name -> TOML."""
    folder = files("studies.library")
    found = [file for file in folder.iterdir() if file.name.endswith(".toml")]
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in sorted(found, key=lambda file: file.name)
    }


def study_text(study: str) -> tuple[str, str]:
    """Name and TOML of a study, given by its name in the library or by its path."""
    shipped = library()
    if study in shipped:
        return study, shipped[study]
    path = Path(study)
    try:
        return path.stem, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(
            f"study {study!r}: neither a file that can be read nor one of {', '.join(shipped)}"
        ) from error


def parse_study(text: str, where: str) -> StudyFile:
    """Read a study. Raises StudyError, naming `where` and the field."""
    try:
        study = msgspec.convert(tomllib.loads(text), StudyFile)
    except msgspec.ValidationError as error:
        raise StudyError(f"{where}: {explain(error)}; see docs/studies.md") from error
    except (ValueError, RecursionError) as error:  # numbers too long, nests too deep
        raise StudyError(f"{where}: not TOML: {error}") from error
    _check(study, where)
    return study


def flatten(fields: Fields, where: str) -> Fields:
    """Tables of sections, or "section.field" keys, as "section.field" -> value."""
    flat: Fields = {}
    for key, value in fields.items():
        if "." in key:
            flat[key] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            raise StudyError(f"{where}: {key!r} is no section; write section.field = value")
    return flat


def _check(study: StudyFile, where: str) -> None:
    for kind, names in (
        ("setting", [setting.name for setting in study.setting]),
        ("arm", [arm.name for arm in study.arm]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StudyError(f"{where}: {kind}: the name {twice[0]!r} stands twice")
    for arm in study.arm:
        _check_arm(arm, study, f"{where}: arm {arm.name!r}")
    for number, figure in enumerate(study.figure, 1):
        if not any(figure.x in flatten(arm.each, where) for arm in study.arm):
            raise StudyError(f"{where}: figure {number}: x: no arm's `each` has {figure.x!r}")
        section, _, name = figure.series.partition(".")
        known = section == "option" or hasattr(getattr(Config(), section, None), name)
        if figure.series and not known:
            raise StudyError(f"{where}: figure {number}: series: no field {figure.series!r}")
    by = study.tuning.by if study.tuning is not None else "accuracy"
    if not study.study.targets and (
        by != "accuracy" or any(f.y != "accuracy" for f in study.figure)
    ):
        raise StudyError(f"{where}: study.targets: needed where rounds or seconds are asked for")


def _check_arm(arm: Arm, study: StudyFile, at: str) -> None:
    known = [setting.name for setting in study.setting]
    for name in arm.settings:
        if name not in known:
            raise StudyError(f"{at}: settings: no setting {name!r}")
    if arm.tune and study.tuning is None:
        raise StudyError(f"{at}: tune needs a [tuning] table with the budget of all arms")
    if arm.control and arm.kind != MUSPLIT:
        raise StudyError(f"{at}: control is for kind {MUSPLIT!r} alone")
    if arm.control_tune and not (arm.control and arm.tune):
        raise StudyError(f"{at}: control_tune needs control = true and tune")
