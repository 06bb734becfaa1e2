"""The server's share of a stem: filters from public samples or chance, the fit from device sums."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from export.client_half import read_client_half
from export.exporter import export_model
from export.models import BuiltModel, build_model
from export.stem import CUT_PATCHES, parse_stem
from export.stem_fit import (
    Filters,
    filters_from_images,
    fit_projection,
    load_filters,
    random_filters,
    save_stem,
)
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from server_node.samples import Dataset
from server_node.transform import sample_arrays
from wire_protocol.errors import InputError
from wire_protocol.manifest import CLIENT_FOLDER, InputSpec, prepare_input
from wire_protocol.moments import Moments

FILTERS_FILE: Final = "filters.safetensors"


class StemFilters(NamedTuple):
    """What `write_filters` has written; devices need `bundle`."""

    filters: Path
    bundle: Path
    features: int  # numbers of an image before the projection
    public_samples: int  # that the filters come from; 0: random ones


def write_filters(config: Config, out: Path, *, at_random: bool) -> StemFilters:
    """Write OUT/filters.safetensors and OUT/client, the bundle of `musplit stem stats`.

    Raises ConfigError without public samples unless `at_random`, ModelError, DataError.
    """
    options = parse_stem(config.model.name)
    data = load_dataset(config.data)
    arrays = sample_arrays(config.data, data)
    model = build_model(config.model.name, config.run.seed, config.model.input_shape, arrays)
    random = np.random.default_rng(config.run.seed)
    if at_random:
        filters = random_filters(model.inputs[0].shape[0], options.filters, random)
    else:
        filters = _learned(config, model, data, options.filters, random)
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILTERS_FILE
    state = {name: tensor.numpy() for name, tensor in model.module.state_dict().items()}
    save_file({**state, **filters}, path)
    exported = export_model(
        config.model.name, CUT_PATCHES, out, seed=config.run.seed,
        input_shape=config.model.input_shape, arrays=arrays, weights=path,
    )  # fmt: skip
    shape = exported.manifest.activation.shape
    public = 0 if at_random else len(data.y_public)
    return StemFilters(path, exported.client, int(np.prod(shape)), public)


def write_stem(folder: Path, stats: Iterable[Moments], features: int | None, out: Path) -> str:
    """Fit the projection on sums of all devices; write start weights to OUT, return the model.

    `folder` is that of `write_filters`; `features` replaces the D of its model. Raises ModelError,
    HalfError, and InputError for sums of another bundle.
    """
    bundle = read_client_half(folder / CLIENT_FOLDER)
    options = parse_stem(bundle.manifest.model)
    options = options._replace(features=features or options.features)
    filters = load_filters(folder / FILTERS_FILE)
    elements = int(np.prod(bundle.manifest.activation.shape))
    total = Moments.nothing(bundle.digest, elements)
    for moments in stats:
        total = total.join(moments)
    if not total.samples:
        raise InputError("no moments: give the files that `musplit stem stats` wrote")
    save_stem(filters, fit_projection(total, options.features), options, out)
    return f"stem:{options.features}:f{options.filters}:n{options.classes}"


def _learned(
    config: Config, model: BuiltModel, data: Dataset, count: int, random: np.random.Generator
) -> Filters:
    if not data.x_public:
        raise ConfigError(
            "data.public: a stem's filters need public samples: set data.public, or "
            "data.public_source, or use --random"
        )
    array = sample_arrays(config.data, data)[0]
    spec = InputSpec(
        "x", list(array.raw_shape), list(model.inputs[0].shape), "float32", array.transform
    )
    return filters_from_images(prepare_input(data.x_public[0], spec), count, random)
