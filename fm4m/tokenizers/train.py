"""Trains one VQ-VAE tokenizer.

    python -m fm4m.tokenizers.train --config=configs/tokenizers/rooms.py:semseg --out=semseg.safetensors

Writes the weights to --out and, next to them, a picture of held-out inputs above their reconstructions; prints the
domain's reconstruction numbers, codebook use and perplexity on the validation pack. Any value of the configuration can
be overridden (--config.steps=200); an unknown key is refused.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fm4m.tokenizers import io, preprocess, quantize, reconstruction, vqvae_model
from fm4m.tokenizers.config import VQConfig
from fm4m.tokenizers.tokenizer import Tokenizer

# Latents per code given to the k-means that initialises the codebook.
KMEANS_LATENTS_PER_CODE = 32
SHEET_COLUMNS = 8
SHEET_SCALE = 2

TrainState = dict[str, Any]


def reconstruction_loss(config: VQConfig, output: jax.Array, target: jax.Array) -> jax.Array:
    """Mean loss: MSE (rgb, normal), smooth L1 with beta 1 (depth, features), cross-entropy (semseg)."""
    if config.domain == "semseg":
        # A comparison instead of an index: the gradient of an index is a scatter, which runs on one core of a CPU.
        chosen = jnp.where(jnp.arange(output.shape[-1]) == target[..., None], output, 0.0)
        return jnp.mean(jax.nn.logsumexp(output, axis=-1) - chosen.sum(-1))
    if config.domain in ("rgb", "normal"):
        return jnp.mean(jnp.square(output - target))
    return jnp.mean(optax.huber_loss(output, target, delta=1.0))


def make_optimiser(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW (0.9, 0.99), gradient clipping at 1, linear warm-up and cosine to 0; biases and norms are not decayed."""
    for name in ("warmup_steps", "autoencoder_steps"):
        if not 0 <= config[name] < config.steps:
            raise ValueError(f"config.{name} = {config[name]} must be from 0 to below steps = {config.steps}")
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "cls_emb"), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, 0.9, 0.99, weight_decay=config.weight_decay, mask=decayed),
    )


def init_state(config: ml_collections.ConfigDict, model: VQConfig) -> TrainState:
    """Random network and random codebook (which `fit` replaces after the warm-up without quantisation)."""
    params, codebook = jax.jit(functools.partial(vqvae_model.init_with_codebook, model))(jax.random.key(config.seed))
    # Copies, because the step donates its state and one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params)
    return {"params": params, "codebook": codebook, "ema": ema, "opt_state": make_optimiser(config).init(params)}


def fit_codebook(
    config: ml_collections.ConfigDict, model: VQConfig, stats: preprocess.Stats, params: vqvae_model.Params,
    arrays: np.ndarray,
) -> quantize.Codebook:
    """Spherical k-means on the network's latents for a random sample of `arrays`."""
    tokens = model.grid[0] * model.grid[1]
    count = min(len(arrays), -(-KMEANS_LATENTS_PER_CODE * model.codebook_size // tokens))
    count = max(count // config.batch_size, 1) * config.batch_size  # whole batches: one shape to compile
    sample = np.random.default_rng(config.seed).choice(len(arrays), count, replace=False)
    encode = jax.jit(lambda params, x: vqvae_model.encode(model, params, preprocess.to_input(model, stats, x)))
    chunks = sample.reshape(-1, config.batch_size)
    latents = jnp.concatenate([encode(params, arrays[chunk]).reshape(-1, model.latent_dim) for chunk in chunks])
    key = jax.random.fold_in(jax.random.key(config.seed), config.steps)
    kmeans = jax.jit(quantize.kmeans_init, static_argnums=(2, 3))
    return kmeans(key, latents, model.codebook_size, config.batch_size * tokens)


def make_train_step(
    config: ml_collections.ConfigDict, model: VQConfig, stats: preprocess.Stats, quantised: bool = True
):
    """Jitted (state, step int, stored batch) -> (state, {"reconstruction", "commitment"}).

    With `quantised` False the decoder sees the latents themselves and the codebook stays as it is.
    """
    optimiser = make_optimiser(config)
    tokens = config.batch_size * model.grid[0] * model.grid[1]
    threshold = quantize.dead_threshold(tokens, model.codebook_size, config.dead_code_coefficient)

    def loss_fn(params, codebook, x):
        if quantised:
            output, latents, codes, commitment = vqvae_model.forward(model, params, codebook, x)
        else:
            latents, codes, commitment = vqvae_model.encode(model, params, x), None, jnp.zeros(())
            output = vqvae_model.decode(model, params, latents)
        rebuilt = reconstruction_loss(model, output, x)
        metrics = {"reconstruction": rebuilt, "commitment": commitment}
        return rebuilt + config.commitment_weight * commitment, (latents, codes, metrics)

    def update_codebook(codebook, latents, codes, step, key):
        latents = latents.reshape(-1, model.latent_dim)
        codebook = quantize.update(codebook, latents, codes.reshape(-1), config.codebook_decay)
        restarted = quantize.restart_dead(key, codebook, latents, threshold)
        # Codes restarted in the last tenth would have no time to be learnt by the decoder.
        late = step >= 0.9 * config.steps
        return jax.tree.map(lambda old, new: jnp.where(late, old, new), codebook, restarted)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, step, batch):
        flip_key, restart_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
        if config.flip:
            flipped = jax.random.bernoulli(flip_key, 0.5, (batch.shape[0],) + (1,) * (batch.ndim - 1))
            batch = jnp.where(flipped, preprocess.flip(model, batch), batch)
        x = preprocess.to_input(model, stats, batch)
        grads, (latents, codes, metrics) = jax.grad(loss_fn, has_aux=True)(state["params"], state["codebook"], x)
        updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        # A plain average would carry the random start for 1 / (1 - decay) steps; the first ones therefore count less.
        decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state["ema"], params)
        codebook = state["codebook"]
        if quantised:
            codebook = update_codebook(codebook, latents, codes, step, restart_key)
        return {"params": params, "codebook": codebook, "ema": ema, "opt_state": opt_state}, metrics

    return train_step


def fit(
    config: ml_collections.ConfigDict, model: VQConfig, arrays: np.ndarray, stats: preprocess.Stats | None = None
) -> Tokenizer:
    """Trains on arrays in the stored form [N, H, W(, C)] and returns the tokenizer with averaged weights.

    The first `config.autoencoder_steps` run without quantisation; then k-means on the latents gives the codebook. A
    codebook that starts beside an untrained encoder collapses to a few codes (a batch of 2,048 latents of rooms
    depth used 2 % of 1,024 codes after 100 steps), and a short run has no time to win the others back.

    Raises:
      ValueError: arrays that do not fit `model`, fewer arrays than a batch, or a loss that is not finite.
    """
    import tqdm

    arrays = preprocess.check_array(model, arrays)
    if len(arrays) < config.batch_size:
        raise ValueError(f"{len(arrays)} arrays are fewer than config.batch_size = {config.batch_size}")
    stats = stats or {}
    state = init_state(config, model)
    train_step = make_train_step(config, model, stats, quantised=False)

    per_epoch = len(arrays) // config.batch_size
    with tqdm.trange(config.steps, desc=f"tokenizer {model.name}", mininterval=2.0) as progress:
        for step in progress:
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                order = np.random.default_rng([config.seed, epoch]).permutation(len(arrays))
            if step == config.autoencoder_steps:
                state["codebook"] = fit_codebook(config, model, stats, state["params"], arrays)
                train_step = make_train_step(config, model, stats)
            batch = arrays[order[position * config.batch_size : (position + 1) * config.batch_size]]
            state, metrics = train_step(state, step, batch)
            if (step + 1) % 50 == 0 or step + 1 == config.steps:
                recent = [float(metrics[name]) for name in ("reconstruction", "commitment")]
                if not np.isfinite(recent).all():
                    raise ValueError(f"loss at step {step} is not finite; lower config.learning_rate")
                progress.set_postfix(reconstruction=f"{recent[0]:.4f}", commitment=f"{recent[1]:.4f}")
    return Tokenizer(model, state["ema"], state["codebook"], stats)


def evaluate(tokenizer: Tokenizer, arrays: np.ndarray) -> dict[str, float]:
    """Reconstruction numbers of the domain, codebook use (share) and perplexity on held-out arrays [N, H, W(, C)]."""
    codes = tokenizer.encode(arrays)
    numbers = reconstruction.measure(tokenizer.config, tokenizer.stats, arrays, tokenizer.decode(codes))
    used, perplexity = quantize.usage(np.bincount(codes.ravel(), minlength=tokenizer.vocab_size))
    return numbers | {"codebook_use": float(used), "perplexity": float(perplexity)}


def picture_sheet(tokenizer: Tokenizer, arrays: np.ndarray) -> np.ndarray:
    """Inputs above their reconstructions, two bands of eight, uint8 [rows, columns, 3]."""
    arrays = arrays[: 2 * SHEET_COLUMNS]
    top, bottom = tokenizer.to_picture(arrays), tokenizer.to_picture(tokenizer.decode(tokenizer.encode(arrays)))
    scale = SHEET_SCALE if tokenizer.config.domain != "features" else 8 * SHEET_SCALE
    bands = []
    for start in range(0, len(arrays), SHEET_COLUMNS):
        for pictures in (top, bottom):
            row = np.concatenate(list(pictures[start : start + SHEET_COLUMNS]), axis=1)
            row = np.pad(row, ((0, 0), (0, SHEET_COLUMNS * top.shape[2] - row.shape[1]), (0, 0)))
            bands.append(row.repeat(scale, axis=0).repeat(scale, axis=1))
    return np.concatenate(bands)


def load_arrays(domain: str, pack_path: str) -> np.ndarray:
    """One modality of a rooms pack in the stored form: [N, H, W(, C)]; features come from their own file."""
    if domain == "features":
        from data_pipelines.features import load_features

        return np.asarray(load_features(pack_path), np.float32)
    from data_pipelines.rooms.pack import RoomsPack

    pack = RoomsPack(pack_path)
    return np.stack([pack[i][domain] for i in range(len(pack))])


def semseg_labels(pack_path: str) -> dict[str, Any]:
    """num_classes, class_names and palette of a rooms pack, as fields of VQConfig."""
    from data_pipelines.rooms.pack import RoomsPack

    pack = RoomsPack(pack_path)
    return {"num_classes": len(pack.classes), "class_names": pack.classes, "palette": pack.palette}


def run(config: ml_collections.ConfigDict, out: str) -> dict[str, float]:
    """Loads the packs, trains, writes weights and picture, returns what `evaluate` found for the file as written."""
    from PIL import Image

    out = pathlib.Path(out)
    fields = config.model.to_dict()
    train_arrays, val_arrays = (load_arrays(config.model.domain, path) for path in (config.train_pack, config.val_pack))
    if config.model.domain == "semseg":
        fields |= semseg_labels(config.train_pack)
    model = VQConfig.from_dict(fields)
    stats = preprocess.feature_stats(train_arrays) if model.domain == "features" else {}
    print(f"tokenizer {model.name}: {len(train_arrays)} arrays to train on, {len(val_arrays)} held out", flush=True)

    io.save(out, fit(config, model, train_arrays, stats), dtype=config.store_dtype)
    tokenizer = io.load(out)  # numbers and picture are those of the file, with its rounded weights
    numbers = evaluate(tokenizer, val_arrays)
    Image.fromarray(picture_sheet(tokenizer, val_arrays)).save(out.with_suffix(".png"))
    listed = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    print(f"tokenizer {model.name}: {listed}; wrote {out} ({out.stat().st_size / 1e6:.2f} MB) and {out.stem}.png")
    return numbers


def main() -> None:
    """Command line: --config=FILE:ARGUMENT --out=PATH [--config.key=value ...]."""
    from absl import app, flags
    from ml_collections import config_flags

    config_flag = config_flags.DEFINE_config_file("config", None, "Configuration file, with :domain.", lock_config=True)
    out_flag = flags.DEFINE_string("out", None, "Where the safetensors file goes; a PNG of that name lands beside it.")
    flags.mark_flags_as_required(["config", "out"])

    def start(_) -> None:  # what the main function returns would become the exit status
        run(config_flag.value, out_flag.value)

    app.run(start)


if __name__ == "__main__":
    main()
