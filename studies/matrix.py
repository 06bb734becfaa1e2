"""The matrix of a study: every arm under every setting, checked before anything is run."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from emulation.fit import fit_files
from server_node.config import Config, load_config, toml_value
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from studies.baselines import BASELINES
from studies.cells import Spec
from studies.definition import BASELINE, MUSPLIT, Arm, Fields, Setting, StudyFile, flatten
from studies.errors import StudyError

_OPTION: Final = "option."
_DATA: Final = "{data}"
_SOURCE: Final = "data.source"
_SEED: Final = "run.seed"
_GRID_SEED: Final = "grid"
_QUICK_ROUNDS: Final = 10
_QUICK_TRIALS: Final = 2


class Row(NamedTuple):
    """An arm, or the frozen-client control of one, as it stands in the tables."""

    name: str
    arm: str  # the arm's name in the file, with the places of `each` in it
    kind: str
    fields: Fields
    trials: tuple[Fields, ...]  # what tuning tries; empty: the arm is run as given
    control_of: str  # name of the arm beside which it stands; empty: an arm
    values: Fields  # of the arm's `each`, by field
    settings: tuple[str, ...]  # only under these; empty: under all


class Options(NamedTuple):
    """What the command line adds to the file."""

    data: str = ""
    overrides: tuple[str, ...] = ()
    seeds: int = 0  # 0: the file's
    quick: bool = False
    settings: tuple[str, ...] = ()  # empty: all; otherwise these
    arms: tuple[str, ...] = ()


class Matrix:
    """A study's rows and settings, and the specification of each of its runs."""

    def __init__(self, study: StudyFile, where: str, options: Options) -> None:
        """Raises StudyError for whatever cannot be run, before anything is."""
        self.study, self.where, self.options = study, where, options
        self.settings = _chosen(study.setting, options.settings, f"{where}: setting")
        arms = _chosen(study.arm, options.arms, f"{where}: arm")
        self.rows = [row for arm in arms for row in self._rows(arm)]
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise StudyError(
                f"{where}: arm: `each` gives the same name twice; put the fields in it"
            )
        self._fingerprints: dict[tuple[str, bool], str] = {}
        self._configs: dict[tuple[str, str, str], Config] = {}
        for setting in self.settings:
            self._check_budget(setting)

    @property
    def seeds(self) -> int:
        """Seeds of the test runs."""
        return self.options.seeds or (1 if self.options.quick else self.study.study.seeds)

    @property
    def trials(self) -> int:
        """Trials of every tuned row; 0: nothing is tuned."""
        if self.study.tuning is None:
            return 0
        trials = self.study.tuning.trials
        return min(trials, _QUICK_TRIALS) if self.options.quick else trials

    @property
    def tuning_seeds(self) -> int:
        """Seeds of every trial."""
        if self.study.tuning is None:
            return 0
        return 1 if self.options.quick else self.study.tuning.seeds

    def rows_under(self, setting: Setting) -> list[Row]:
        """The rows that are run under a setting."""
        return [row for row in self.rows if not row.settings or setting.name in row.settings]

    def spec(self, setting: Setting, row: Row, values: Fields, seed: int, *, tuning: bool) -> Spec:
        """One run. A tuning run sees the training set alone, a part of it as its test set."""
        config = self.config(setting, row, values, tuning=tuning)
        config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, seed=seed))
        given = {**row.fields, **values}
        options = {k.removeprefix(_OPTION): v for k, v in given.items() if k.startswith(_OPTION)}
        fingerprint = self._fingerprint(config, tuning=tuning)
        return Spec(row.kind, config, options, fingerprint)

    # -- rows --------------------------------------------------------------------------------

    def _rows(self, arm: Arm) -> Iterable[Row]:
        at = f"{self.where}: arm {arm.name!r}"
        each, fields, tune = (flatten(t, at) for t in (arm.each, arm.fields, arm.tune))
        for key, choices in {**each, **tune}.items():
            if not isinstance(choices, list) or not choices:
                raise StudyError(f"{at}: {key}: needs a list of values")
        for values in _product(each):
            name = arm.name
            for key, value in values.items():
                name = name.replace(f"{{{key}}}", str(value))
            trials = self._trials(tune, f"{at}: tune")
            only = tuple(arm.settings)
            yield Row(name, arm.name, arm.kind, {**fields, **values}, trials, "", values, only)
            if arm.control:
                frozen = flatten(arm.control_tune, at) or tune
                frozen = {k: v for k, v in frozen.items() if k != "method.eta_c"}
                trials = self._trials(frozen, f"{at}: control_tune") if tune else ()
                still = {**fields, **values, "method.eta_c": 0.0}
                name_still = f"{name}, frozen client"
                yield Row(name_still, arm.name, arm.kind, still, trials, name, values, only)

    def _trials(self, tune: Fields, at: str) -> tuple[Fields, ...]:
        """As many points of the grid as the budget has trials; a seeded choice when it has more."""
        if not tune:
            return ()
        grid = list(_product(tune))
        if len(grid) < self.trials:
            raise StudyError(
                f"{at}: a grid of {len(grid)} for a budget of {self.trials} trials; give more "
                "values: every arm is tuned by the same budget"
            )
        chosen = random.Random(_GRID_SEED).sample(range(len(grid)), self.trials)  # noqa: S311
        return tuple(grid[index] for index in sorted(chosen))

    def _check_budget(self, setting: Setting) -> None:
        """Build every configuration once; tuned rows must be tuned over the same rounds."""
        rounds: dict[int, str] = {}
        for row in self.rows_under(setting):
            self.config(setting, row, {}, tuning=False)
            for values in row.trials:
                self.config(setting, row, values, tuning=False)
                config = self.config(setting, row, values, tuning=True)
                rounds.setdefault(config.run.rounds, row.name)
        if len(rounds) > 1:
            (one, name), (other, beside) = list(rounds.items())[:2]
            raise StudyError(
                f"{self.where}: setting {setting.name!r}: {name!r} would be tuned over {one} "
                f"rounds, {beside!r} over {other}; set tuning.rounds, the budget of all"
            )

    # -- configurations ----------------------------------------------------------------------

    def config(self, setting: Setting, row: Row, values: Fields, *, tuning: bool) -> Config:
        """The configuration of a run, its seed aside. Raises StudyError."""
        key = setting.name, row.name, repr((sorted(values.items(), key=str), tuning))
        if key not in self._configs:
            self._configs[key] = self._build(setting, row, values, tuning=tuning)
        return self._configs[key]

    def _build(self, setting: Setting, row: Row, values: Fields, *, tuning: bool) -> Config:
        where = f"{self.where}: {row.name!r} in {setting.name!r}"
        fields = {**row.fields, **values}
        options = [key for key in fields if key.startswith(_OPTION)]
        if options and row.kind == MUSPLIT:
            raise StudyError(f"{where}: {options[0]}: options are for baselines alone")
        if row.kind != MUSPLIT:
            given_options = {key.removeprefix(_OPTION): fields[key] for key in options}
            _check_baseline(row.kind.removeprefix(BASELINE), given_options, where)
        base = flatten(self.study.base, f"{self.where}: base")
        if self.options.data and _DATA not in str(base.get(_SOURCE, "")):
            base[_SOURCE] = self.options.data
        given = [
            *_as_overrides(base),
            *self.options.overrides,
            *_as_overrides(flatten(setting.fields, where)),
            *_as_overrides({k: v for k, v in fields.items() if not k.startswith(_OPTION)}),
            "evaluation.control=false",
        ]
        if any(override.partition("=")[0].strip() == _SEED for override in given):
            raise StudyError(f"{where}: {_SEED}: every run has its own; say how many: --seeds")
        try:
            config = load_config(None, given)
        except ConfigError as error:
            text = re.sub(r"""^--set(?: '[^']*'| "[^"]*")?: """, "", str(error))
            raise StudyError(f"{where}: {text}") from error
        if config.data.holdout and self.study.tuning is not None:
            raise StudyError(f"{where}: data.holdout: the study sets it, for tuning alone")
        return self._finish(config, where, tuning=tuning)

    def _finish(self, config: Config, where: str, *, tuning: bool) -> Config:
        replace = msgspec.structs.replace
        data, run, evaluation = config.data, config.run, config.evaluation
        if _DATA in data.source:
            if not self.options.data:
                raise StudyError(f"{where}: data.source is {data.source!r}: give --data DIR")
            data = replace(data, source=data.source.replace(_DATA, self.options.data))
        budget = self.study.tuning
        if tuning and budget is not None:
            data = replace(data, holdout=budget.holdout)
            run = replace(run, rounds=budget.rounds or run.rounds)
        if self.options.quick:
            run = replace(run, rounds=min(run.rounds, _QUICK_ROUNDS))
            evaluation = replace(evaluation, every=min(evaluation.every, _QUICK_ROUNDS // 2))
        return replace(config, data=data, run=run, evaluation=evaluation)

    def _fingerprint(self, config: Config, *, tuning: bool) -> str:
        """SHA-256 of what a run reads: samples (no test set when it tunes), and files."""
        plain = msgspec.structs.replace(config.data, holdout=0.0, alpha=0.0)
        files = [Path(config.model.name.partition(":")[0]), Path(config.model.weights)]
        if config.simulation.compute == "recorded":
            files += fit_files(Path(config.simulation.recorded))
        key = repr((plain, files)), tuning
        if key not in self._fingerprints:
            samples = load_dataset(plain)
            arrays = [*samples.x_train, samples.y_train]
            if config.data.public_source:
                arrays += [*samples.x_public, samples.y_public]
            arrays += [] if tuning else [*samples.x_test, samples.y_test]
            digest = hashlib.sha256()
            for array in arrays:
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
            for file in files:
                digest.update(file.read_bytes() if file.is_file() else b"")
            self._fingerprints[key] = digest.hexdigest()
        return self._fingerprints[key]


def _check_baseline(name: str, options: Fields, where: str) -> None:
    if name not in BASELINES:
        raise StudyError(f"{where}: kind: no baseline {name!r}; there are {', '.join(BASELINES)}")
    try:
        msgspec.convert(options, BASELINES[name].options)
    except msgspec.ValidationError as error:
        raise StudyError(f"{where}: option: {error}; see docs/baselines.md") from error


def _product(choices: Mapping[str, Sequence[Any]]) -> Iterable[Fields]:
    """Every combination, the last field fastest; one empty one for no fields."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _chosen(items: Sequence[Any], names: tuple[str, ...], at: str) -> list[Any]:
    known = [item.name for item in items]
    for name in names:
        if name not in known:
            raise StudyError(f"{at}: no {name!r}; there are {', '.join(known)}")
    return [item for item in items if not names or item.name in names]


def _as_overrides(fields: Fields) -> list[str]:
    return [f"{key}={toml_value(value)}" for key, value in fields.items()]
