"""What a configuration makes of a stream: model, mesh, optimizer, train state and step of a run.

Training and everything that must do exactly as it did (`fm4m.replay`) make them here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from fm4m import checkpoint, loading, optim, sharding, transplant
from fm4m import config as config_lib
from fm4m import model as model_lib
from fm4m import step as step_lib
from fm4m.attention import best_implementation
from fm4m.masking import Masking
from fm4m.modalities import ModalitySet
from fm4m.stream import Stream


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run without its state. Made by `make`.

    Attributes:
      config: the run's configuration.
      stream: the training stream.
      masking: the recipe, with the configuration's numbers of tokens.
      model: sizes and choices.
      steps, warmup: optimizer steps in all, and of warm-up.
      mesh: the devices.
      optimizer: with its schedule.
      abstract: shapes, dtypes and shardings of the train state.
    """

    config: Any
    stream: Stream
    masking: Masking
    model: model_lib.ModelConfig
    steps: int
    warmup: int
    mesh: Mesh
    optimizer: optim.Optimizer
    abstract: step_lib.State

    def initial_state(self) -> step_lib.State:
        """The train state at step 0: drawn from the seed, or from the model that ``train.init_from`` names.

        Raises ConfigError if that does not fit.
        """
        config, model, modalities = self.config, self.model, self.stream.modalities
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        initial = lambda: step_lib.init_state(config, model, modalities, self.optimizer)  # noqa: E731
        state = jax.jit(initial, out_shardings=shardings)()
        if config.train.init_from:
            state |= start_from(config, model, modalities, state["params"], shardings)
        return state

    def with_step(self, arrays: step_lib.State, step: int) -> step_lib.State:
        """The train state of restored arrays: with the number of steps made."""
        count = jax.jit(lambda: jax.numpy.asarray(step, "int32"), out_shardings=self.abstract["step"].sharding)()
        return {**arrays, "step": count}

    def describe(self, step: int, position: int) -> dict:
        """The description of a checkpoint at a step and a position in the stream."""
        return checkpoint.make_meta(
            step=step, position=position, seed=self.config.seed, modalities=self.stream.modalities, model=self.model,
            config=self.config.to_dict(),
            mixture={"stream": self.stream.resolved, "masking": self.masking.to_dict()},
        )  # fmt: skip

    def compile_step(self, batch: tuple) -> Any:
        """The compiled train step, for batches like this one of `fm4m.sharding.device_batches`."""
        stream = self.stream
        step = step_lib.make_step(
            self.config, self.model, stream.modalities, self.masking, stream.tasks, self.optimizer, self.mesh
        )
        return step_lib.compile_step(step, self.abstract, batch)


def make(config: Any, stream: Stream, mesh: Mesh | None = None) -> Plan:
    """The plan of a validated configuration; ``mesh``: by default all devices, laid out as the configuration says.

    Raises ConfigError for a configuration that they cannot run.
    """
    masking = config_lib.budgets(config, stream.masking)
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    model = make_model_config(config, mesh.devices.flat[0].platform, masking.most_tokens)
    steps, warmup, cooldown = lengths(config, masking)
    sharding.check_batch(mesh, config.train.global_batch, config.train.accumulation)
    optimizer = optim.from_config(config, steps, warmup, cooldown)
    abstract = step_lib.abstract_state(config, model, stream.modalities, optimizer, mesh)
    sharding.check_parameters_are_split(abstract["params"], mesh)
    return Plan(config, stream, masking, model, steps, warmup, mesh, optimizer, abstract)


def make_model_config(config: Any, platform: str = "cpu", num_tokens: int = 0) -> model_lib.ModelConfig:
    """The model of a configuration, with the attention that is fastest on a platform unless it names one.

    ``num_tokens`` is the larger of the numbers of visible and predicted tokens; 0 for a model that is only described.
    Raises ConfigError for an unknown name or sizes that do not fit.
    """
    try:
        model = model_lib.model_config(config.model.name, **config_lib.model_overrides(config))
    except (KeyError, TypeError, ValueError) as error:
        raise config_lib.ConfigError(f"model: {error.args[0]}") from None
    if config.model.attention is None:
        heads = model.num_heads // max(config.mesh.tensor, 1)
        tokens = num_tokens + model.num_register_tokens
        best = best_implementation(platform, model.head_dim, heads, model.dtype, tokens)
        model = dataclasses.replace(model, attention=best)
    return model


def start_from(
    config: Any, model: model_lib.ModelConfig, modalities: ModalitySet, params: Any, shardings: Any
) -> dict[str, Any]:
    """The parts of the train state that ``train.init_from`` replaces: parameters, and their average where there is one.

    Every process reads the whole model into host memory and keeps its part. Raises ConfigError for one that does not
    fit.
    """
    # One array after the other, so that no device ever holds more than one whole.
    params = jax.tree.map(sharding.to_host, params)
    try:
        source = loading.load(config.train.init_from)
        values = transplant.transplant(source, model, modalities, params)
    except (ValueError, FileNotFoundError) as error:
        raise config_lib.ConfigError(f"train.init_from = {config.train.init_from!r}: {error}") from error
    place = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])  # noqa: E731
    return {part: jax.tree.map(place, values, shardings[part]) for part in ("params", "ema") if part in shardings}


def lengths(config: Any, masking: Masking) -> tuple[int, int, int]:
    """Steps in all, of warm-up and of cooldown. Raises ConfigError if nothing is left to train."""
    tokens = masking.input_range[1] + masking.target_range[1]
    batch, t, o = config.train.global_batch, config.train, config.optimizer

    def steps(text: str, key: str, epoch: int = 0) -> int:
        return config_lib.duration_steps(text, key, global_batch=batch, tokens_per_sample=tokens, epoch_samples=epoch)

    total = steps(t.total, "train.total", t.epoch_samples)
    return total, steps(o.warmup, "optimizer.warmup"), steps(o.cooldown, "optimizer.cooldown")
