"""What a configuration names: its streams of samples, its mixture, and what draws its sample pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fm4m import config as config_lib
from fm4m import recipes
from fm4m.config_file import ConfigError
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet
from fm4m.plan import make_model_config
from fm4m.stream import Stream

# (parameters, step) -> pictures uint8 [H, W, 3] by name.
PictureHook = Callable[[Any, int], Mapping[str, np.ndarray]]
# Training stream, validation stream, sample pictures: what a run reads and shows.
Inputs = tuple[Stream, Stream, PictureHook | None]


def inputs(config: Any) -> Inputs:
    """What a run of this configuration reads and shows. Raises ConfigError, see `streams` and `sample_sheet`."""
    train_stream, eval_stream = streams(config)
    return train_stream, eval_stream, sample_sheet(config, eval_stream)


def streams(config: Any) -> tuple[Stream, Stream]:
    """The training and validation streams of a configuration, from `data_pipelines.loader`.

    Raises ConfigError with the loader's own sentence if the mixture, its modules or its files are not there.
    """
    # SeqIO imports TensorFlow, which otherwise fills the terminal with remarks about missing CUDA drivers.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from data_pipelines import loader

    try:
        loader.import_mixture_modules(config.data.modules)
        train_stream = loader.open_stream(config.data.mixture, "train", seed=config.seed)
        split = config.eval.split
        eval_stream = loader.open_stream(config.data.mixture, split, seed=config.seed, shuffle=False, num_epochs=1)
    except (ImportError, KeyError, OSError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        raise ConfigError(f"data.mixture = {config.data.mixture!r}: {message}") from error
    return train_stream, eval_stream


def mixture(config: Any) -> tuple[ModalitySet, Masking, tuple[str, ...]]:
    """Modalities, masking recipe and tasks that a configuration trains on, for programs that need no samples.

    They are those of the registered mixture if ``data.modules`` names any module, which needs its files, or else of a
    released model's mixture, which needs nothing. Raises ConfigError.
    """
    if config.data.modules:
        stream, _ = streams(config)
        return stream.modalities, config_lib.budgets(config, stream.masking), tuple(stream.tasks)
    return recipes.without_data(config)


def sample_sheet(config: Any, stream: Stream) -> PictureHook | None:
    """The hook that draws sample pictures of a configuration; None if it names no tokenizer to draw with.

    Raises ConfigError for a tokenizer that cannot be loaded or inputs that the model does not have.
    """
    from fm4m import pictures

    if not config.log.picture_tokenizers:
        return None
    try:
        showers = pictures.load_showers(config.log.picture_tokenizers, stream.modalities)
        raw = pictures.spread_samples(stream, config.log.picture_samples)
        inputs = config.log.picture_inputs
        return pictures.SampleSheet(make_model_config(config), stream.modalities, raw, inputs, showers)
    except (KeyError, OSError, ValueError) as error:
        what = error.args[0] if isinstance(error, KeyError) else error
        raise ConfigError(f"log.picture_tokenizers or log.picture_inputs: {what}") from error
