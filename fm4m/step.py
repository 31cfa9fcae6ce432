"""The train state and the jitted training step: mask, count, differentiate in passes, update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fm4m import loss as loss_lib
from fm4m import model as model_lib
from fm4m import optim, sharding
from fm4m.batch import RawBatch
from fm4m.masking import Masking, mask_batch
from fm4m.modalities import ModalitySet

log = logging.getLogger("fm4m")

State = dict[str, Any]


def mask_key(seed: int) -> jax.Array:
    """The key that masks of a run with this seed start from; `mask_batch` folds each sample's position into it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def loss_options(mesh: Mesh, method: str) -> dict[str, Any]:
    """Arguments of `cross_entropy_sums` for batches that are spread over a mesh."""
    spread = {"mesh": mesh, "batch_axes": ("data", "fsdp")} if mesh.size > 1 else {}
    return {"method": method, **spread}


def init_state(config: Any, model: model_lib.ModelConfig, modalities: ModalitySet, optimizer: optim.Optimizer) -> State:
    """The train state at step 0: float32 arrays drawn from ``config.seed``."""
    params = model_lib.init_params(model, modalities, jax.random.fold_in(jax.random.key(config.seed), 0))
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}
    if config.optimizer.ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_step(
    config: Any,
    model: model_lib.ModelConfig,
    modalities: ModalitySet,
    masking: Masking,
    tasks: tuple[str, ...],
    optimizer: optim.Optimizer,
    mesh: Mesh,
) -> Callable[[State, RawBatch, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The jitted step: (state, raw batch, uint32 [B] stream positions) -> (state, metrics); the state is donated.

    The batch is masked on the device, targets are counted, and the passes of gradient accumulation use weights from the
    counts of the whole batch, so that their number changes nothing but rounding. Metrics: loss, grad_norm, lr, sums and
    counts [num modalities] of cross-entropy, and the filled share of encoder (inputs) and decoder (targets) slots.
    """
    accumulation = config.train.accumulation
    options = loss_options(mesh, config.train.loss_method)

    def loss_fn(params: Any, batch: Any, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = model_lib.forward(params, model, modalities, batch)
        head = model_lib.head_table(params, model)
        sums, _ = loss_lib.cross_entropy_sums(hidden, head, batch, modalities, **options)
        return (weights * sums).sum(), sums

    gradient = jax.grad(loss_fn, has_aux=True)

    def split(x: jax.Array) -> jax.Array:
        # Row r goes to pass r mod A: every device keeps its rows, none are moved.
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *sharding.BATCH)))

    def step(state: State, raw: RawBatch, position: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        with jax.named_scope("masking"):
            batch = mask_batch(raw, masking, modalities, tasks, mask_key(config.seed), position)
            counts = loss_lib.target_counts(batch, modalities)
            weights = loss_lib.modality_weights(counts, modalities, config.train.loss)
        if accumulation == 1:
            grads, sums = gradient(params, batch, weights)
        else:
            zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(len(modalities), jnp.float32)

            def add(total: Any, micro: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(params, micro, weights)), None

            (grads, sums), _ = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
        # Without this the partitioner may leave gradients unsplit over fsdp.
        grads = jax.lax.with_sharding_constraint(grads, sharding.state_shardings({"params": params}, mesh)["params"])
        params, opt_state, values = optimizer.update(grads, state["opt_state"], params, state["step"])
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if "ema" in state:
            rate = 1.0 - config.optimizer.ema
            new["ema"] = jax.tree.map(lambda e, p: e + rate * (p - e), state["ema"], params)
        values |= {"loss": (weights * sums).sum(), "sums": sums, "counts": counts}
        values |= {"inputs": batch.encoder.valid.mean(), "targets": batch.decoder.valid.mean()}
        return new, values

    abstract = jax.eval_shape(lambda: init_state(config, model, modalities, optimizer))
    state_sharding, batch_sharding = sharding.state_shardings(abstract, mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding, batch_sharding),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )


def compile_step(step: Any, abstract: State, ready: tuple) -> Any:
    """Compiles the step for these shapes and layouts, and logs how long it took and the memory it will need."""
    start = time.perf_counter()
    compiled = step.lower(abstract, *ready).compile()
    used = compiled.memory_analysis()
    memory = ""
    if used is not None:
        sizes = used.argument_size_in_bytes, used.temp_size_in_bytes
        memory = "; memory per device: {:.3f} GiB of state and batch, {:.3f} GiB of temporaries".format(
            *(s / 2**30 for s in sizes)
        )
    log.info("compiled the step in %.1f s%s", time.perf_counter() - start, memory)
    return compiled
