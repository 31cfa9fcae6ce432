"""Every key of a run's configuration, with its meaning, and what values may be; a file in ``configs/`` sets some."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections.config_dict import placeholder

from fm4m import config_file
from fm4m.config_file import ConfigError as ConfigError
from fm4m.config_file import Section, leaf, requirements

# One "epoch" of the reference implementation, by which it rounds the length of a run (its token totals become steps).
REFERENCE_EPOCH_SAMPLES = 10_000_000

SCHEDULES = ("cosine", "constant", "rsqrt")

_SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_USAGE = "usage: python -m fm4m.train --config=configs/NAME.py [--config.SECTION.KEY=VALUE ...] --workdir=DIR"
_DURATION = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s+(steps?|samples?|tokens?)\s*")


def default() -> Section:
    """A locked configuration that holds every key with its default value."""
    c = Section()
    # Seeds the parameters, the masks and the order of the training data. Part of a run's identity: it cannot be changed
    # on resume.
    c.seed = 0
    # Folder of the persistent compilation cache ("": none). A restart then skips compilation, which takes minutes for
    # the big models.
    c.compilation_cache = ""

    c.model = Section()
    # A registered size of fm4m.sizes. Every key below that is not None replaces a field of it (fm4m.sizes.ModelConfig).
    c.model.name = "fm_tiny_6e_6d_swiglu_nobias"
    # Width of the residual stream, layers of each side, heads, and hidden width of the MLP over the width.
    c.model.dim = placeholder(int)
    c.model.encoder_depth = placeholder(int)
    c.model.decoder_depth = placeholder(int)
    c.model.num_heads = placeholder(int)
    c.model.mlp_ratio = placeholder(float)
    # MLP with a gate (SwiGLU for "silu"), and its activation: "silu" or "gelu".
    c.model.gated_mlp = placeholder(bool)
    c.model.activation = placeholder(str)
    # Biases of the attention's input projections, its output projection, the MLP, and the norms.
    c.model.qkv_bias = placeholder(bool)
    c.model.proj_bias = placeholder(bool)
    c.model.mlp_bias = placeholder(bool)
    c.model.norm_bias = placeholder(bool)
    # Normalise queries and keys per head.
    c.model.qk_norm = placeholder(bool)
    # "xavier", or "aligned": keys start equal to queries, so that equal positions attend to each other at once.
    c.model.attention_init = placeholder(str)
    # "sincos", or "fourier": neighbouring cells of a grid are easy to tell apart.
    c.model.grid_positions = placeholder(str)
    # Learned tokens in front of the encoder's input.
    c.model.num_register_tokens = placeholder(int)
    # One modality embedding for both sides; the output head is the decoder's token table.
    c.model.share_modality_embeddings = placeholder(bool)
    c.model.tied_heads = placeholder(bool)
    # A decoder token sees its own modality only; and only earlier slots, of grids too.
    c.model.decoder_sep_mask = placeholder(bool)
    c.model.decoder_causal_mask = placeholder(bool)
    # The MLP's hidden width is stored rounded up to a multiple of this; what is added stays zero.
    c.model.mlp_multiple = placeholder(int)
    # Layers that are compiled together and repeated by a loop: 1 (shortest compilation), g, or 0 for all (no loop).
    c.model.scan_group = placeholder(int)
    # What the backward pass keeps: none (everything), dots, projections, residual, full (nothing).
    c.model.remat = placeholder(str)
    # Attention: einsum, pallas (TPU) or cudnn (GPU). None: the fastest that the devices have.
    c.model.attention = placeholder(str)
    # Of activations and matrix products: bfloat16 or float32. Parameters are float32.
    c.model.dtype = placeholder(str)

    c.data = Section()
    # The mixture to train on, and the modules whose import registers it.
    c.data.mixture = "rooms"
    c.data.modules = ("data_pipelines.mixtures.rooms",)
    # Visible and predicted tokens of a sample, the two static sizes of the model's input. 0: what the mixture says.
    c.data.num_inputs = 0
    c.data.num_targets = 0

    c.train = Section()
    # A trained model whose weights the run starts from: whatever `fm4m.load` opens (a run, a step, a folder or file of
    # the reference's format). Modalities that it lacks start fresh. "": random weights.
    c.train.init_from = ""
    # Samples of one optimizer step over all devices; each of `accumulation` passes takes an equal part of them.
    c.train.global_batch = 256
    c.train.accumulation = 1
    # Length of the run: "20K steps", "2M samples" or "500B tokens", where a sample counts num_inputs + num_targets
    # tokens, filled or not, as the paper counts.
    c.train.total = "1000 steps"
    # Over 0: a total in samples or tokens is rounded up to whole epochs of this many samples, and an epoch has
    # floor(epoch_samples / global_batch) steps, as in the reference implementation (10,000,000). 0: rounded up to
    # a step.
    c.train.epoch_samples = 0
    # "mod": mean over modalities of their mean loss, as every released 4M; "token": mean over tokens.
    c.train.loss = "mod"
    # How cross-entropy is computed: "blocked" (each target through its own head) or "dense" (through all of them).
    c.train.loss_method = "blocked"
    # Corrections of how many targets of a modality a sample is expected to have, as "caption=11.5"; otherwise what the
    # masking recipe gives where texts fill a quarter of their length. Only speed depends on it, and the metric
    # train/targets_per_sample/NAME has the truth.
    c.train.expected_targets = ()
    # Steps in a row whose update may be skipped because the loss or the gradient is not finite; one more ends the run.
    # 0: the first ends it.
    c.train.max_skipped = 10
    # Over 0: leave after this many steps of this process, saving nothing more, as a preemption would.
    c.train.stop_after = 0

    c.optimizer = Section()
    # AdamW. The peak learning rate is blr * global_batch / 256.
    c.optimizer.blr = 1e-4
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    # Decoupled, on every parameter but norm scales and biases; embeddings and mask token are decayed too.
    c.optimizer.weight_decay = 0.05
    # Largest global norm of the gradient. 0: no clipping.
    c.optimizer.clip_norm = 0.0
    # "cosine" (to 0 at the end), "constant", or "rsqrt" (inverse square root); the last two end with a linear cooldown.
    c.optimizer.schedule = "cosine"
    # Lengths in the same form as train.total; warm-up is linear from 0, cooldown linear to 0.
    c.optimizer.warmup = "100 steps"
    c.optimizer.cooldown = "0 steps"
    # Decay per step of an exponential moving average of the parameters, which is then what is evaluated. 0: none.
    c.optimizer.ema = 0.0

    c.mesh = Section()
    # Devices along each axis. data: copies of the parameters (across slices); fsdp: parameters and batch are split;
    # tensor: matrices are split, every device of the axis sees the same samples. -1 takes what the others leave; if
    # both data and fsdp are -1, fsdp takes up to 16 (fm4m.sharding.LARGEST_FSDP).
    c.mesh.data = -1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1

    c.checkpoint = Section()
    # Steps between checkpoints, and how many of the newest stay. 0 steps: only the end of the run is saved.
    c.checkpoint.every = 1000
    c.checkpoint.keep = 3
    # Over 0: checkpoints at multiples of this many steps stay for good.
    c.checkpoint.keep_period = 0
    # Write in the background while training goes on.
    c.checkpoint.asynchronous = True

    c.fault = Section()
    # Seconds after which a run that does not go on is ended, with the name of the process that is to blame, to be
    # continued (exit code 76; fm4m.watchdog): for a step, its input and its values; and for what takes long by nature:
    # start, compilation, checkpoints, validation, pictures. timeout 0: never.
    c.fault.timeout = 600.0
    c.fault.slow_timeout = 3600.0
    # Seconds for all processes to come together at the start: pods start minutes apart where an image is pulled.
    c.fault.start_timeout = 900
    # Seconds without a sign of life after which JAX ends the others by a signal. Longer than the minute in which
    # fm4m.watchdog, which names the culprit, finds a dead process.
    c.fault.heartbeat_timeout = 300

    c.eval = Section()
    # Split to validate on, steps between validations (0: only before the first and after the last step), samples of it
    # (0: all of them), and samples a batch (0: train.global_batch / train.accumulation).
    c.eval.split = "validation"
    c.eval.every = 1000
    c.eval.samples = 0
    c.eval.batch = 0
    # Training batches (of eval.batch samples) whose masked targets are counted for the token-frequency baseline.
    # 0: none.
    c.eval.baseline_batches = 20

    c.log = Section()
    # Steps between lines of metrics, and between sample pictures (0: only at the end).
    c.log.every = 50
    c.log.pictures_every = 0
    # What the pictures show: modalities given to the model, number of validation samples, and how codes are drawn, as
    # "modality=image:FILE", "modality=text:FILE" or "modality=boxes:FILE". No tokenizers: no pictures.
    c.log.picture_inputs = ()
    c.log.picture_samples = 4
    c.log.picture_tokenizers = ()
    # Write TensorBoard event files beside metrics.jsonl (needs tensorboardX).
    c.log.tensorboard = True
    # Draw a progress bar where the output is a terminal.
    c.log.progress_bar = True
    # Trace steps for TensorBoard's profile plugin or xprof: "START:COUNT", as in "100:5". "": none.
    c.log.profile = ""
    # Project of Weights & Biases to send metrics and pictures to (needs the package wandb). "": none.
    c.log.wandb = ""
    return c.lock()


def model_overrides(config: Section) -> dict[str, Any]:
    """The fields of the registered size that the configuration replaces."""
    return {key: config.model[key] for key in config.model if key != "name" and config.model[key] is not None}


def budgets(config: Section, masking: Any) -> Any:
    """A mixture's `fm4m.masking.Masking` with the numbers of tokens that the configuration replaces."""
    given = {key: config.data[key] for key in ("num_inputs", "num_targets") if config.data[key]}
    return dataclasses.replace(masking, **given)


def split_duration(text: str, key: str) -> tuple[float, str]:
    """``"500B tokens"`` -> (500e9, "tokens"). Raises ConfigError naming ``key`` for anything else."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ConfigError(
            f"{key} = {str(text)[:200]!r} is not a length: write a number and steps, samples or tokens, as in "
            "'500B tokens'"
        )
    unit = match[3] if match[3].endswith("s") else match[3] + "s"
    amount = float(match[1].replace("_", "")) * _SCALES[match[2]]
    if not math.isfinite(amount):
        raise ConfigError(f"{key} = {text[:40]!r}...: is not a finite length")
    return amount, unit


def duration_steps(text: str, key: str, *, global_batch: int, tokens_per_sample: int, epoch_samples: int = 0) -> int:
    """Optimizer steps of a length such as ``"500B tokens"``.

    ceil(samples / global_batch), or with ``epoch_samples`` E: ceil(samples / E) epochs of floor(E / global_batch)
    steps, the rounding of the reference implementation, where 500B tokens at 256 a sample and batch 8192 make
    196 x 1,220 = 239,120 steps. Warm-up lengths are never rounded to epochs.
    """
    amount, unit = split_duration(text, key)
    if unit == "steps":
        if amount != int(amount):
            raise ConfigError(f"{key} = {text!r} is not a whole number of steps")
        steps = int(amount)
    else:
        samples = amount / tokens_per_sample if unit == "tokens" else amount
        if epoch_samples:
            steps = math.ceil(samples / epoch_samples) * (epoch_samples // global_batch)
        else:
            steps = math.ceil(samples / global_batch)
    if steps > config_file.LARGEST:
        raise ConfigError(f"{key} = {text!r} makes {steps:.3g} steps, {config_file.LARGEST} is the most")
    return steps


def profiled_steps(text: str) -> tuple[int, int] | None:
    """``"100:5"`` -> (100, 5): first step and number of steps; None for "". Raises ConfigError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", text, re.ASCII)
    if not match:
        raise ConfigError(f"log.profile = {text!r}: must be '' (none) or START:COUNT in steps, as in '100:5'")
    return int(match[1]), int(match[2])


def validate(c: Section) -> None:
    """Checks values that have the right type but no meaning. Raises ConfigError naming the key and what is allowed."""

    need = requirements(c)
    config_file.check_numbers(c)
    need(c.seed >= 0, "seed", "must be 0 or more")
    need(bool(c.data.mixture), "data.mixture", "name the mixture to train on")
    for key in ("num_inputs", "num_targets"):
        need(0 <= c.data[key] <= 2**20, f"data.{key}", f"must be 0 (what the mixture says) or more, {2**20} at most")
    need(c.train.global_batch > 0, "train.global_batch", "must be at least 1")
    for key in ("train.global_batch", "eval.batch"):
        need(leaf(c, key) <= 2**24, key, f"must be {2**24} at most")
    need(c.train.accumulation > 0, "train.accumulation", "must be at least 1")
    need(
        c.train.global_batch % c.train.accumulation == 0,
        "train.global_batch",
        f"must be divisible by train.accumulation = {c.train.accumulation}",
    )
    need(c.train.epoch_samples == 0 or c.train.epoch_samples >= c.train.global_batch, "train.epoch_samples",
         f"must be 0 or at least train.global_batch = {c.train.global_batch}")  # fmt: skip
    need(split_duration(c.train.total, "train.total")[0] > 0, "train.total", "must be more than nothing")
    need(c.train.loss in ("mod", "token"), "train.loss", "must be 'mod' or 'token'")
    need(c.train.loss_method in ("blocked", "dense"), "train.loss_method", "must be 'blocked' or 'dense'")
    need(c.train.max_skipped >= 0, "train.max_skipped", "must be 0 (stop at the first) or more")
    need(c.train.stop_after >= 0, "train.stop_after", "must be 0 (run to the end) or more")
    need(c.optimizer.blr > 0, "optimizer.blr", "must be more than 0")
    for key in ("b1", "b2", "ema"):
        need(0 <= c.optimizer[key] < 1, f"optimizer.{key}", "must be in [0, 1)")
    need(c.optimizer.eps > 0, "optimizer.eps", "must be more than 0")
    need(c.optimizer.weight_decay >= 0, "optimizer.weight_decay", "must be 0 or more")
    need(c.optimizer.clip_norm >= 0, "optimizer.clip_norm", "must be 0 (no clipping) or more")
    need(c.optimizer.schedule in SCHEDULES, "optimizer.schedule", f"must be one of {', '.join(SCHEDULES)}")
    split_duration(c.optimizer.warmup, "optimizer.warmup")
    cooldown, _ = split_duration(c.optimizer.cooldown, "optimizer.cooldown")
    need(
        cooldown == 0 or c.optimizer.schedule != "cosine",
        "optimizer.cooldown",
        "the cosine schedule has none; use '0 steps'",
    )
    for axis in ("data", "fsdp", "tensor"):
        need(c.mesh[axis] == -1 or c.mesh[axis] > 0, f"mesh.{axis}", "must be -1 (what is left) or at least 1")
    need(
        c.mesh.tensor != -1 or -1 not in (c.mesh.data, c.mesh.fsdp),
        "mesh.tensor",
        "can be -1 only where the other two axes are given",
    )
    for key in ("checkpoint.every", "checkpoint.keep_period", "eval.every", "eval.samples", "eval.batch",
                "eval.baseline_batches", "log.pictures_every"):  # fmt: skip
        need(leaf(c, key) >= 0, key, "must be 0 or more")
    need(c.checkpoint.keep > 0, "checkpoint.keep", "must be at least 1, or a run could not resume")
    need(c.log.every > 0, "log.every", "must be at least 1")
    need(c.log.picture_samples > 0, "log.picture_samples", "must be at least 1; none: log.picture_tokenizers = ()")
    need(c.fault.timeout == 0 or c.fault.timeout >= 1, "fault.timeout", "must be 0 (never) or at least 1 second")
    need(c.fault.slow_timeout >= c.fault.timeout, "fault.slow_timeout",
         f"must be at least fault.timeout = {c.fault.timeout:g}")  # fmt: skip
    for key in ("start_timeout", "heartbeat_timeout"):
        need(c.fault[key] >= 10, f"fault.{key}", "must be at least 10 seconds")
    profiled_steps(c.log.profile)


def from_command_line(argv: Sequence[str]) -> tuple[Section, str]:
    """Reads ``[program, --config=FILE, --config.a.b=VALUE ..., --workdir=DIR]``.

    Returns the validated configuration and the folder of the run. Ends the process with exit code 2 and one sentence on
    standard error for a missing flag, an unknown key, a value of another type or out of range.
    """
    try:
        config, others = config_file.from_flags(argv[1:], _USAGE, default, validate, ("workdir",))
        if not others["workdir"]:
            raise ConfigError(f"--workdir is missing; {_USAGE}")
        return config, others["workdir"]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_flags(args: Sequence[str], usage: str) -> Section:
    """The validated configuration of ``--config=FILE`` and ``--config.SECTION.KEY=VALUE`` flags.

    Raises ConfigError in one sentence, which ends with ``usage`` where a flag is missing or unknown.
    """
    return config_file.from_flags(args, usage, default, validate)[0]


def load(path: str) -> Section:
    """The configuration of a file, as `fm4m.config_file.load` gives it, or that of ``FILE.py:TEXT``; not validated."""
    return config_file.load(path, default)
