"""The train state and the jitted training step: mask, count, differentiate in passes, update if all is finite.

All but the update is a program for one device (`fm4m.sharding.local_rows`), which masks its own rows, gathers weights
where it needs them, and scatters their gradients.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fm4m import loss as loss_lib
from fm4m import model as model_lib
from fm4m import optim, sharding
from fm4m.batch import PackedBatch, RawBatch
from fm4m.expected import loss_slots
from fm4m.masking import Masking, mask_batch
from fm4m.modalities import ModalitySet

log = logging.getLogger("fm4m")

State = dict[str, Any]
Params = dict[str, Any]

# Groups of parameters whose leading axis is the layers.
STACKS = ("encoder", "decoder")

# Without it every all-gather of weights stops the matrix products.
TPU_OPTIONS = {"xla_enable_async_all_gather": "true"}


def mask_key(seed: int) -> jax.Array:
    """The key that masks of a run with this seed start from; `mask_batch` folds each sample's position into it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def init_state(config: Any, model: model_lib.ModelConfig, modalities: ModalitySet, optimizer: optim.Optimizer) -> State:
    """The train state at step 0: float32 arrays drawn from ``config.seed``."""
    params = model_lib.init_params(model, modalities, jax.random.fold_in(jax.random.key(config.seed), 0))
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}
    if config.optimizer.ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def abstract_state(
    config: Any, model: model_lib.ModelConfig, modalities: ModalitySet, optimizer: optim.Optimizer, mesh: Mesh
) -> State:
    """Shapes, dtypes and shardings of the train state."""
    state = jax.eval_shape(lambda: init_state(config, model, modalities, optimizer))
    shardings = sharding.state_shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def make_gradients(
    config: Any,
    model: model_lib.ModelConfig,
    modalities: ModalitySet,
    masking: Masking,
    tasks: tuple[str, ...],
    abstract: Params,
    mesh: Mesh,
) -> Callable[[Params, RawBatch, jax.Array], tuple[Params, dict[str, jax.Array]]]:
    """The first half of a step: (params, raw batch, uint32 [B] stream positions) -> (gradients, values).

    The batch is masked on the device, targets are counted, and the passes of gradient accumulation use weights from the
    counts of the whole batch, so that their number changes nothing but rounding. ``abstract`` are shapes and layouts of
    the parameters, which the gradients share. Values, equal on all devices: the loss, sums and counts [num modalities]
    of cross-entropy, and the filled share of encoder (inputs) and decoder (targets) slots.
    """
    specs = sharding.param_specs(abstract, mesh)
    rows = config.train.global_batch // sharding.batch_parts(mesh) // config.train.accumulation
    slots = loss_slots(modalities, masking, tasks, rows, config.train.expected_targets)
    options = {"method": config.train.loss_method, "slots": slots}

    def local_gradients(params: Params, raw: RawBatch, position: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
        with jax.named_scope("masking"):
            batch = mask_batch(raw, masking, modalities, tasks, mask_key(config.seed), position)
        counts = jax.lax.psum(loss_lib.target_counts(batch, modalities), sharding.BATCH_AXES)
        weights = loss_lib.modality_weights(counts, modalities, config.train.loss)
        stacks, gathered, scatter = weights_at_use(params, model, mesh)

        def loss_fn(stacks: Params, gathered: Params, micro: PackedBatch) -> tuple[jax.Array, jax.Array]:
            sums = local_loss_sums({**gathered, **stacks}, model, modalities, micro, mesh, **options)
            return (weights * sums).sum(), sums

        def one_pass(micro: PackedBatch) -> tuple[Params, jax.Array]:
            (of_stacks, of_gathered), sums = jax.grad(loss_fn, (0, 1), has_aux=True)(stacks, gathered, micro)
            return scatter(of_stacks, of_gathered), sums

        grads, sums = _accumulate(one_pass, batch, config.train.accumulation)
        values = {"sums": jax.lax.psum(sums, sharding.BATCH_AXES), "counts": counts}
        filled = {"inputs": batch.encoder.valid.mean(), "targets": batch.decoder.valid.mean()}
        return sharding.reduce_gradients(grads, specs), values | jax.lax.pmean(filled, sharding.BATCH_AXES)

    gradients = sharding.local_rows(
        local_gradients, mesh, in_specs=(specs, sharding.BATCH, sharding.BATCH), out_specs=(specs, P())
    )

    def with_loss(params: Params, raw: RawBatch, position: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
        grads, values = gradients(params, raw, position)
        weights = loss_lib.modality_weights(values["counts"], modalities, config.train.loss)
        return grads, values | {"loss": (weights * values["sums"]).sum()}

    return with_loss


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

    A step whose loss or gradient norm is not finite (a norm over 1.8e19 is not: its square overflows) is skipped: of
    the state only ``step`` changes, by which data and learning rate go on. Metrics: those of `make_gradients`,
    grad_norm, lr, and skipped (int32, 0 or 1), all equal on all devices.
    """
    abstract = abstract_state(config, model, modalities, optimizer, mesh)
    gradients = make_gradients(config, model, modalities, masking, tasks, abstract["params"], mesh)

    def step(state: State, raw: RawBatch, position: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        grads, values = gradients(state["params"], raw, position)
        params, opt_state, rates = optimizer.update(grads, state["opt_state"], state["params"], state["step"])
        finite = jnp.isfinite(values["loss"]) & jnp.isfinite(rates["grad_norm"])

        def if_finite(new: Any, old: Any) -> Any:
            # A choice of every number, and not one branch for all (`jax.lax.cond`): it joins the update's own loop over
            # numbers that it reads anyhow. On TPU v4 a step of Ti then takes 128 KiB more memory of 24.9 GiB, and reads
            # and writes 0.002 % more. (A gradient times 0 would not do: NaN stays NaN.)
            with jax.named_scope("optimizer"):
                return jax.tree.map(lambda n, o: jax.lax.select(finite, n, o), new, old)

        new = {"step": state["step"] + 1, "params": if_finite(params, state["params"])}
        new["opt_state"] = if_finite(opt_state, state["opt_state"])
        if "ema" in state:
            rate = 1.0 - config.optimizer.ema
            moved = jax.tree.map(lambda e, p: e + rate * (p - e), state["ema"], new["params"])
            new["ema"] = if_finite(moved, state["ema"])
        return new, values | rates | {"skipped": 1 - finite.astype(jnp.int32)}

    state_sharding, batch_sharding = jax.tree.map(lambda x: x.sharding, abstract), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding, batch_sharding),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )


def weights_at_use(
    params: Params, model: model_lib.ModelConfig, mesh: Mesh
) -> tuple[Params, Params, Callable[[Params, Params], Params]]:
    """Splits this device's parameters into what a pass takes.

    Returns:
      stacks: this device's parts of the layers' weights, matrices in the compute dtype; gathered layer by layer.
      gathered: all other groups, whole: tables, heads and projections are gathered once a step, however many passes it
        has.
      scatter: from the gradients of both to gradients of ``params``, float32 and in their layout. A pass's gradients
        of the tables are scattered at once, so that no float32 copy of a whole table is carried from pass to pass.
    """
    names = [name for name in params if name not in STACKS]

    def cast(stacks: Params) -> Params:
        return sharding.cast_matrices(stacks, model.dtype)

    def gather(groups: Params) -> Params:
        groups = sharding.cast_matrices(groups, model.dtype)
        return {name: sharding.whole_weights(name, groups[name], mesh) for name in groups}

    stacks, of_stacks = jax.vjp(cast, {name: params[name] for name in STACKS})
    gathered, of_groups = jax.vjp(gather, {name: params[name] for name in names})
    return stacks, gathered, lambda a, b: of_stacks(a)[0] | of_groups(b)[0]


def local_loss_sums(
    weights: Params,
    model: model_lib.ModelConfig,
    modalities: ModalitySet,
    batch: PackedBatch,
    mesh: Mesh,
    **options: Any,
) -> jax.Array:
    """float32 [num modalities]: summed cross-entropy of this device's rows; ``weights`` as `weights_at_use` gives them.

    ``options`` are those of `fm4m.loss.cross_entropy_sums`.
    """
    layers = lambda name, layer: sharding.layer_weights(name, layer, mesh)  # noqa: E731
    hidden = model_lib.forward(weights, model, modalities, batch, layers)
    head = model_lib.head_table(weights, model)
    return loss_lib.cross_entropy_sums(hidden, head, batch, modalities, **options)[0]


def _accumulate(one_pass: Callable, batch: PackedBatch, passes: int) -> tuple[Params, jax.Array]:
    """Adds up ``one_pass`` over equal parts of a device's rows."""
    if passes == 1:
        return one_pass(batch)
    parts = jax.tree.map(lambda x: x.reshape(passes, x.shape[0] // passes, *x.shape[1:]), batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_pass, jax.tree.map(lambda x: x[0], parts)))

    def add(total: Any, part: PackedBatch) -> tuple[Any, None]:
        # XLA:TPU otherwise tries to move the sum over devices out of the loop, and fails on a check of its own
        # (while_loop_all_reduce_code_motion.cc, libtpu 0.0.42.1).
        return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(one_pass(part))), None

    return jax.lax.scan(add, zeros, parts)[0]


def compiler_options(platform: str) -> dict[str, str]:
    """What the compiler is asked for beyond its defaults, for devices of a platform ("cpu", "gpu", "tpu")."""
    return dict(TPU_OPTIONS) if platform == "tpu" else {}


def compile_step(step: Any, abstract: State, ready: tuple) -> Any:
    """Compiles the step for these shapes and layouts, and logs how long it took and the memory it will need."""
    start = time.perf_counter()
    platform = jax.tree.leaves(abstract)[0].sharding.mesh.devices.flat[0].platform
    compiled = step.lower(abstract, *ready).compile(compiler_options=compiler_options(platform))
    used = compiled.memory_analysis()
    memory = ""
    if used is not None:
        sizes = used.argument_size_in_bytes, used.temp_size_in_bytes
        memory = "; memory per device: {:.3f} GiB of state and batch, {:.3f} GiB of temporaries".format(
            *(s / 2**30 for s in sizes)
        )
    log.info("compiled the step in %.1f s%s", time.perf_counter() - start, memory)
    return compiled
