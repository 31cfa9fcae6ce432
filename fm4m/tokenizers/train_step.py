"""The train state of a tokenizer and its jitted step.

    state = {"step", "params": {"network", ["codebook"]}, "opt_state": {"mu", "nu"}, ["ema"]}

The step is a program for one device (`fm4m.sharding.local_rows`), which gathers the weights, reconstructs its own rows
and scatters the gradients. Statistics of the codes, and the latents that replace dead ones, are those of all devices'
rows, and randomness is drawn row by row, so that results depend on the number of devices only in their rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fm4m import collectives, optim, sharding
from fm4m.tokenizers import augment, divae_model, losses, perceptual, preprocess, quantize, vqvae_model
from fm4m.tokenizers.config import DIFFUSION_DECODERS, VQConfig

State = dict[str, Any]
Params = dict[str, Any]

# What `train.freeze_encoder` keeps: all on the way from an image to its codes.
ENCODER_GROUPS = ("encoder", "quant_proj", "cls_emb", "quantize")
# Arrays smaller than this are copied to every device: gathering them costs more than keeping them.
SMALLEST_SPLIT = 2**14
# Streams of randomness of one step.
_CROP, _FLIP, _CODES, _NOISE, _DEAD = range(5)


# ---- state


def init_state(config: Any, model: VQConfig, optimizer: optim.Optimizer) -> State:
    """The train state at step 0, float32, drawn from ``config.seed``."""
    network, codebook = vqvae_model.init_with_codebook(model, jax.random.key(config.seed))
    params = {"network": network} | ({"codebook": codebook} if codebook else {})
    trained, _ = split(network, config.train.freeze_encoder)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(trained)}
    if config.optimizer.ema:
        state["ema"] = jax.tree.map(jnp.copy, network)
    return state


def abstract_state(config: Any, model: VQConfig, optimizer: optim.Optimizer, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the train state."""
    state = jax.eval_shape(lambda: init_state(config, model, optimizer))
    specs = layout(state, mesh)
    if "codebook" in state["params"]:
        specs["params"]["codebook"] = jax.tree.map(lambda _: P(), state["params"]["codebook"])
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), state, specs
    )


def split(network: Params, frozen: bool) -> tuple[Params, Params]:
    """(groups that are trained, groups that stay as they are)."""
    kept = ENCODER_GROUPS if frozen else ()
    return {k: v for k, v in network.items() if k not in kept}, {k: v for k, v in network.items() if k in kept}


def layout(tree: Any, mesh: Mesh) -> Any:
    """The layout of arrays: the largest dimension that ``fsdp`` divides is split over it, small arrays are copied."""

    def spec(x: Any) -> P:
        parts, shape = mesh.shape["fsdp"], tuple(x.shape)
        fitting = [i for i, n in enumerate(shape) if n % parts == 0]
        if parts == 1 or math.prod(shape) < SMALLEST_SPLIT or not fitting:
            return P()
        largest = max(fitting, key=lambda i: shape[i])
        return P(*("fsdp" if i == largest else None for i in range(len(shape))))

    return jax.tree.map(spec, tree)


def whole(tree: Any, specs: Any) -> Any:
    """This device's parts, gathered; the gradient is summed and scattered (a reduce-scatter)."""

    def gather(x: jax.Array, spec: P) -> jax.Array:
        for dim, axis in enumerate(spec):
            if axis is not None:
                x = collectives.gather(x, axis, dim)
        return x

    return jax.tree.map(gather, tree, specs)


# ---- what is random


def size_of_step(seed: int, step: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The image size of a step, the same on all processes and at every start of the run.

    (The reference implementation takes Python's hash of a string, which differs between processes.)
    """
    return sizes[int(np.random.default_rng([seed, step, 2]).integers(len(sizes)))]


def row_keys(seed: int, step: jax.Array, stream: int, rows: jax.Array) -> jax.Array:
    """A key for each row of the global batch; ``rows`` are their numbers."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stream)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(rows)


# ---- the step


def make_step(
    config: Any,
    model: VQConfig,
    stats: preprocess.Stats,
    optimizer: optim.Optimizer,
    sizes: tuple[tuple[int, int], ...],
    steps: int,
    mesh: Mesh,
) -> Callable[[State, jax.Array, tuple[int, int], bool], tuple[State, dict[str, jax.Array]]]:
    """The jitted step: (state, stored batch, size, quantised) -> (state, metrics); the state is donated.

    Args:
      config: of `train_config`.
      model: the tokenizer.
      stats: arrays of its preprocessing.
      optimizer: from `fm4m.optim`.
      sizes: all image sizes of the run.
      steps: its length.
      mesh: the devices.

    The last two arguments of the step are static: the image size of this step, and whether latents are quantised;
    with False the decoder sees the latents themselves and the codebook stays as it is. Metrics: loss, reconstruction,
    commitment, perceptual (where there is one), grad_norm, lr, and counts int32 [codebooks * codes].
    """
    abstract = abstract_state(config, model, optimizer, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    trained, kept = split(jax.tree.map(lambda s: s.spec, where["params"]["network"]), config.train.freeze_encoder)
    local_gradients = make_local_gradients(config, model, stats, sizes, steps, mesh, trained, kept)
    gradients = {}  # by (size, quantised), so that each is traced once

    def step(state: State, batch: jax.Array, size: tuple[int, int], quantised: bool):
        network, codebook = state["params"]["network"], state["params"].get("codebook", {})
        if (size, quantised) not in gradients:
            gradients[size, quantised] = sharding.local_rows(
                functools.partial(local_gradients, size=size, quantised=quantised),
                mesh,
                in_specs=(trained, kept, P(), sharding.BATCH, P()),
                out_specs=(trained, P(), P()),
            )
        learnt, fixed = split(network, config.train.freeze_encoder)
        grads, codebook, values = gradients[size, quantised](learnt, fixed, codebook, batch, state["step"])
        learnt, opt_state, rates = optimizer.update(grads, state["opt_state"], learnt, state["step"])
        network = learnt | fixed
        params = {"network": network} | ({"codebook": codebook} if codebook else {})
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if "ema" in state:
            new["ema"] = _average(config, state["step"], state["ema"], network)
        return new, values | rates

    return jax.jit(
        step,
        donate_argnums=0,
        static_argnums=(2, 3),
        in_shardings=(where, sharding.batch_sharding(mesh)),
        out_shardings=(where, sharding.replicated(mesh)),
    )


def _average(config: Any, step: jax.Array, ema: Params, network: Params) -> Params:
    decay = jnp.float32(config.optimizer.ema)
    if config.optimizer.ema_warmup:
        decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, network)


def make_local_gradients(
    config: Any, model: VQConfig, stats: preprocess.Stats, sizes: Any, steps: int, mesh: Mesh, trained: Any, kept: Any
) -> Callable[..., tuple[Params, quantize.Codebook, dict[str, jax.Array]]]:
    """One device's part of the step: (trained, kept weights, codebook, rows, step) -> (gradients, codebook, metrics).

    Gradients come in the layout of ``trained``, codebook and metrics equal on all devices.
    """
    parts = sharding.batch_parts(mesh)
    denoises, freeze = model.decoder in DIFFUSION_DECODERS, config.train.freeze_encoder
    dtype = jnp.dtype(config.train.dtype)
    compare = None if denoises else losses.by_name(config.loss.name, model)
    look = None
    if config.loss.perceptual:
        look = perceptual.make_loss(
            perceptual.load(config.loss.perceptual), config.loss.perceptual_distance, config.loss.perceptual_layers
        )
    threshold = dead_threshold(config, model, sizes)

    def choose(network: Params, codebook: quantize.Codebook, latents: jax.Array, keys: jax.Array):
        if model.quantizer != "memcodes":
            return quantize.quantize(model, network, codebook, latents)
        # Their choice is drawn, row by row.
        one = lambda row, key: quantize.quantize(model, network, codebook, row[None], key)  # noqa: E731
        taken, codes, commitment = jax.vmap(one)(latents, keys)
        return taken[:, 0], codes[:, 0], jnp.mean(commitment)

    def reconstruct(network: Params, rows: jax.Array, x: jax.Array, grid: tuple[int, int], keys: jax.Array):
        if denoises:
            # Level and noise of a row are its own; only dropout follows the devices.
            level, noise, dropout = jnp.moveaxis(jax.vmap(functools.partial(jax.random.split, num=3))(keys), 1, 0)
            t = jax.vmap(lambda key: jax.random.randint(key, (), 0, model.diffusion.steps))(level)
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(noise)
            loss = divae_model.loss_at(model, network, rows, x, t, noise, grid=grid, key=dropout[0], dtype=dtype)
            return {"reconstruction": loss}
        output = vqvae_model.decode(model, network, rows, grid, dtype)
        found = {"reconstruction": compare(output, x)}
        return found | ({"perceptual": look(output, x)} if look else {})

    def local_gradients(learnt: Params, fixed: Params, codebook: quantize.Codebook, batch: jax.Array, step: jax.Array,
                        *, size: tuple[int, int], quantised: bool):  # fmt: skip
        rows = jax.lax.axis_index(sharding.BATCH_AXES) * batch.shape[0] + jnp.arange(batch.shape[0])
        keys = functools.partial(row_keys, config.seed, step, rows=rows)
        grid = size[0] // model.patch_size, size[1] // model.patch_size
        if tuple(config.data.crop_scale) != (1.0, 1.0) and not config.data.train.startswith("images:"):
            batch = augment.random_crop(model, keys(_CROP), batch, tuple(config.data.crop_scale))
        if config.data.flip:
            batch = augment.random_flip(model, keys(_FLIP), batch)
        batch = augment.resize(model, batch, model.array_shape_of(grid)[:2])
        x = preprocess.to_input(model, stats, batch)
        fixed = whole(fixed, kept)

        def loss_fn(learnt: Params):
            network = whole(learnt, trained) | fixed
            latents = vqvae_model.encode(model, network, x, dtype).astype(jnp.float32)
            found = {"commitment": jnp.zeros(())}
            codes, taken = None, latents
            if freeze:
                codes = quantize.encode(model, network, codebook, latents)
                taken = jax.lax.stop_gradient(quantize.lookup(model, network, codebook, codes))
            elif quantised:
                taken, codes, found["commitment"] = choose(network, codebook, latents, keys(_CODES))
            found |= reconstruct(network, taken, x, grid, keys(_NOISE))
            loss = found["reconstruction"] + config.loss.commitment * found["commitment"]
            if look:
                loss += config.loss.perceptual_weight * found["perceptual"]
            return loss / parts, (latents, codes, found | {"loss": loss})

        grads, (latents, codes, found) = jax.grad(loss_fn, has_aux=True)(learnt)
        values = jax.lax.pmean(found, sharding.BATCH_AXES)
        if codes is not None:
            values["counts"] = jax.lax.psum(count_codes(model, codes), sharding.BATCH_AXES)
            if not freeze:
                codebook = update_codebook(config, model, codebook, latents, codes, step, steps, threshold)
        return sharding.reduce_gradients(grads, trained), codebook, values

    return local_gradients


# ---- codes


def count_codes(model: VQConfig, codes: jax.Array) -> jax.Array:
    """int32 [codebooks * codes]: how often each code of each codebook was chosen, of codes [B, n]."""
    # The codes of one position of the grid, one of each codebook, stand beside each other.
    book = jnp.arange(codes.shape[-1]) % model.num_codebooks
    size = model.num_codebooks * model.codebook_size
    return jnp.zeros((size,), jnp.int32).at[(codes + book * model.codebook_size).ravel()].add(1)


def dead_threshold(config: Any, model: VQConfig, sizes: tuple[tuple[int, int], ...]) -> float:
    """The use below which a code is replaced: that of uniform use, divided; of the mean image size (4M's configs)."""
    if not config.codebook.dead_code_coefficient:
        return 0.0
    mean = np.mean(sizes, axis=0) // model.patch_size
    tokens = config.train.global_batch * int(np.prod(mean))
    return quantize.dead_threshold(tokens, model.codebook_size, config.codebook.dead_code_coefficient)


def update_codebook(
    config: Any, model: VQConfig, codebook: quantize.Codebook, latents: jax.Array, codes: jax.Array, step: jax.Array,
    steps: int, threshold: float,
) -> quantize.Codebook:
    """The codebook after a step, equal on all devices; latents and codes are this device's."""
    if not quantize.has_codebook(model):
        return codebook
    codebook = quantize.update(model, codebook, latents, codes, sharding.BATCH_AXES, config.codebook.decay)
    if not threshold:
        return codebook
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), _DEAD))
    candidates = rows_of_all(keys[0], latents.reshape(-1, latents.shape[-1]), model.codebook_size)
    restarted = quantize.restart_dead(model, keys[1], codebook, candidates, threshold)
    late = step >= config.codebook.restart_until * steps
    return jax.tree.map(lambda old, new: jnp.where(late, old, new), codebook, restarted)


def rows_of_all(key: jax.Array, rows: jax.Array, count: int) -> jax.Array:
    """``count`` random rows of those of all devices, [count, D], the same for any number of devices that share them.

    Every device puts in the rows that it has; what travels is as large as the codebook, not as the batch.
    """
    own, parts = rows.shape[0], jax.lax.axis_size(sharding.BATCH_AXES)
    # Without replacement where there are enough: two dead codes should not become the same vector.
    picks = jax.random.choice(key, own * parts, (count,), replace=own * parts < count)
    picks -= own * jax.lax.axis_index(sharding.BATCH_AXES)
    here = (picks >= 0) & (picks < own)
    return jax.lax.psum(jnp.where(here[:, None], rows[jnp.clip(picks, 0, own - 1)], 0.0), sharding.BATCH_AXES)
