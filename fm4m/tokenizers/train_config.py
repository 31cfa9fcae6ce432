"""Every key of a tokenizer's training, with its meaning; a file in ``configs/tokenizers/`` sets some of them."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ml_collections.config_dict import placeholder

from fm4m import config_file
from fm4m.config import SCHEDULES
from fm4m.config_file import ConfigError, Section, leaf, requirements
from fm4m.files import is_remote
from fm4m.tokenizers import arrays
from fm4m.tokenizers.config import VQConfig

DTYPES = ("float32", "bfloat16")
USAGE = (
    "usage: python -m fm4m.tokenizers.train --config=configs/tokenizers/FILE.py:NAME --out=FILE.safetensors "
    "[--workdir=DIR] [--config.SECTION.KEY=VALUE ...]"
)
_SCALES = {"": 1, "K": 10**3, "M": 10**6}
_LENGTH = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KM]?)\s+(step|sample|epoch)s?\s*")


def default(**model: Any) -> Section:
    """A locked configuration that holds every key.

    Args:
      **model: fields of `VQConfig`; the others have their defaults.
    """
    c = Section()
    # Seeds the parameters, the order of the data, crops, flips, image sizes and noise. Cannot be changed on resume.
    c.seed = 0
    # Folder of the persistent compilation cache ("": none).
    c.compilation_cache = ""

    c.model = _model_section(model)

    c.data = Section()
    # Where arrays come from: "rooms:PACK.zip", "features:FILE.npy" or "images:FOLDER" (fm4m.tokenizers.arrays).
    c.data.train = ""
    c.data.validation = ""
    # Mirror half of the arrays left to right.
    c.data.flip = True
    # Random crops: share of the area, from and to. (1.0, 1.0): none; of files in a folder then the centred square.
    c.data.crop_scale = (1.0, 1.0)

    c.train = Section()
    # Arrays of one step over all devices.
    c.train.global_batch = 256
    # Length of the run: "1500 steps", "2M samples" or "20 epochs", passes over the training source.
    c.train.total = "1000 steps"
    # A tokenizer's file to start from: its encoder and codebook, which must fit, and its decoder if that fits.
    c.train.init_from = ""
    # Train the decoder alone, on the codes of train.init_from.
    c.train.freeze_encoder = False
    # Of activations and matrix products: float32 or bfloat16. Parameters and the quantizer are float32.
    c.train.dtype = "float32"
    # Over 0: sides of the images, one size a step, from min_size to max_size (that of the model) by size_step pixels.
    c.train.min_size = 0
    c.train.size_step = 32
    # Steps that train a plain autoencoder before the codes are chosen from its latents by k-means. A codebook that
    # starts beside an untrained encoder collapses to a few codes, and a short run has no time to win the others back.
    c.train.autoencoder_steps = 0
    # Over 0: leave after this many steps of this process, saving nothing more, as a preemption would.
    c.train.stop_after = 0

    c.loss = Section()
    # One of fm4m.tokenizers.losses.LOSSES; "": the domain's own. A diffusion decoder has its own loss.
    c.loss.name = ""
    c.loss.commitment = 1.0
    # "module:function" that makes an extractor (fm4m.tokenizers.perceptual), which of its maps count (none: all), how
    # they are compared ("cosine", "l1" or "mse"), and the weight. "": no perceptual loss.
    c.loss.perceptual = ""
    c.loss.perceptual_layers = ()
    c.loss.perceptual_distance = "cosine"
    c.loss.perceptual_weight = 1.0

    c.codebook = Section()
    # Moving average of the codes; 0.99 in the reference implementation.
    c.codebook.decay = 0.99
    # A code used less than uniform use divided by this is replaced by a latent of the batch. 0: never.
    c.codebook.dead_code_coefficient = 32.0
    # Codes are replaced in this share of the run: one that comes late has no time to be learnt by the decoder.
    c.codebook.restart_until = 1.0
    # Choose the first codes by k-means on latents, at step train.autoencoder_steps.
    c.codebook.kmeans = False

    c.optimizer = Section()
    # AdamW. The peak learning rate is blr * global_batch / 256.
    c.optimizer.blr = 1e-4
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.99
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.05
    # Largest global norm of the gradient. 0: no clipping.
    c.optimizer.clip_norm = 1.0
    # "cosine" (to 0 at the end), "constant" or "rsqrt", after a linear warm-up.
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = "100 steps"
    # Decay of the moving average of the weights, which is what is evaluated and written. 0: none.
    c.optimizer.ema = 0.99
    # Let the first steps count less, (1 + step) / (10 + step): a plain average carries the random start for
    # 1 / (1 - ema) steps.
    c.optimizer.ema_warmup = False

    c.mesh = Section()
    # Devices along each axis, as in fm4m.config: data has copies of the parameters, fsdp parts of them.
    c.mesh.data = -1
    c.mesh.fsdp = 1

    c.checkpoint = Section()
    # Steps between checkpoints, and how many of the newest stay. 0 steps: only the end of the run is saved.
    c.checkpoint.every = 1000
    c.checkpoint.keep = 2
    c.checkpoint.asynchronous = True

    c.eval = Section()
    # Steps between evaluations (0: only at the end), and arrays of the validation source (0: all of them).
    c.eval.every = 0
    c.eval.samples = 512

    c.log = Section()
    # Steps between lines of metrics, and between sample pictures (0: only at the end).
    c.log.every = 50
    c.log.pictures_every = 0
    c.log.tensorboard = True
    c.log.progress_bar = True

    # Of the network's weights in the file: float32 or float16.
    c.store_dtype = "float32"
    return c.lock()


def _model_section(given: dict[str, Any]) -> Section:
    section = Section()
    known = {f.name: f for f in dataclasses.fields(VQConfig)}
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"model.{unknown[0]} is no field of a tokenizer; there are {', '.join(known)}")
    for name, field in known.items():
        value = given.get(name, None if field.default is dataclasses.MISSING else field.default)
        if name == "diffusion":
            if value is not None:
                section[name] = Section(value.to_dict())
        else:
            section[name] = placeholder(tuple) if value is None else value
    return section


def model_config(c: Section) -> VQConfig:
    """The tokenizer of a configuration, with what its training source says of labels and shapes.

    Raises ConfigError for fields that do not fit each other, FileNotFoundError for a source that is not there.
    """
    fields = {k: v for k, v in c.model.to_dict().items() if v is not None}
    if fields.get("domain") == "semseg":
        fields |= arrays.labels(c.data.train)
    fields |= arrays.shape_of(c.data.train, fields.get("domain", ""))
    try:
        return VQConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None


def length(text: str, key: str, *, batch: int, count: int) -> int:
    """Steps of a length such as ``"20 epochs"``; an epoch is floor(count / batch) steps.

    Raises ConfigError naming ``key`` for anything else.
    """
    match = _LENGTH.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ConfigError(f"{key} = {text!r} is not a length: write a number and steps, samples or epochs, as in "
                          "'20 epochs'")  # fmt: skip
    amount = float(match[1].replace("_", "")) * _SCALES[match[2]]
    if match[3] == "step" and amount != int(amount):
        raise ConfigError(f"{key} = {text!r} is not a whole number of steps")
    per_unit = {"step": 1.0, "sample": 1.0 / batch, "epoch": count // batch}[match[3]]
    return math.ceil(amount * per_unit)


def sizes(c: Section, model: VQConfig) -> tuple[tuple[int, int], ...]:
    """The image sizes that steps draw from; the model's own alone unless train.min_size is given.

    Raises ConfigError for sizes that patches do not divide, or that do not end at the model's.
    """
    low, by, (height, width) = c.train.min_size, c.train.size_step, model.image_size
    if not low:
        return (model.image_size,)
    if height != width or low > height or by < 1 or (height - low) % by:
        raise ConfigError(
            f"train.min_size = {low} and train.size_step = {by} do not lead to the model's image_size "
            f"{height} x {width}, which must be square"
        )
    found = tuple((n, n) for n in range(low, height + 1, by))
    if bad := [n for n, _ in found if n % model.patch_size]:
        raise ConfigError(f"train.min_size: {bad[0]} is not divisible by model.patch_size = {model.patch_size}")
    return found


def validate(c: Section) -> None:
    """Checks values that have the right type but no meaning. Raises ConfigError naming the key and what is allowed."""

    need = requirements(c)
    config_file.check_numbers(c)
    need(c.seed >= 0, "seed", "must be 0 or more")
    for key in ("train", "validation"):
        need(bool(c.data[key]), f"data.{key}", f"name a source, {', '.join(f'{k}:PATH' for k in arrays.KINDS)}")
    scale = c.data.crop_scale
    shares = len(scale) == 2 and all(isinstance(share, (int, float)) for share in scale)
    need(shares and 0 < scale[0] <= scale[1] <= 1, "data.crop_scale", "must be two shares of the area")
    need(c.train.global_batch > 0, "train.global_batch", "must be at least 1")
    need(c.train.dtype in DTYPES, "train.dtype", f"must be one of {', '.join(DTYPES)}")
    need(c.store_dtype in ("float32", "float16"), "store_dtype", "must be float32 or float16")
    need(bool(c.train.init_from) or not c.train.freeze_encoder, "train.freeze_encoder", "needs train.init_from")
    known = bool(c.train.init_from)
    need(not (c.codebook.kmeans and known), "codebook.kmeans", "must be False: train.init_from has the codes")
    need(not (c.train.autoencoder_steps and known), "train.autoencoder_steps",
         "must be 0: train.init_from has the codes")  # fmt: skip
    need(c.optimizer.blr > 0, "optimizer.blr", "must be more than 0")
    need(c.optimizer.schedule in SCHEDULES, "optimizer.schedule", f"must be one of {', '.join(SCHEDULES)}")
    for key in ("optimizer.b1", "optimizer.b2", "optimizer.ema", "codebook.decay"):
        need(0 <= leaf(c, key) < 1, key, "must be in [0, 1)")
    need(0 <= c.codebook.restart_until <= 1, "codebook.restart_until", "must be a share of the run")
    for key in ("train.min_size", "train.autoencoder_steps", "train.stop_after", "loss.commitment",
                "loss.perceptual_weight", "codebook.dead_code_coefficient", "optimizer.weight_decay",
                "optimizer.clip_norm", "checkpoint.every", "eval.every", "eval.samples",
                "log.pictures_every"):  # fmt: skip
        need(leaf(c, key) >= 0, key, "must be 0 or more")
    for key in ("checkpoint.keep", "log.every", "train.size_step"):
        need(leaf(c, key) > 0, key, "must be at least 1")


def identity(c: Section, data: dict[str, Any]) -> dict[str, Any]:
    """What a run may not change on resume, by key: seed, data, model, and what decides its steps. JSON-able."""
    kept = {"seed": c.seed, "data": data | {"flip": c.data.flip, "crop_scale": c.data.crop_scale}}
    kept |= {"model": c.model.to_dict(), "loss": c.loss.to_dict(), "codebook": c.codebook.to_dict()}
    train = {k: v for k, v in c.train.to_dict().items() if k not in ("total", "dtype", "stop_after")}
    flat = {f"{a}.{b}": v for a, section in (kept | {"train": train}).items() if isinstance(section, dict)
            for b, v in section.items()}  # fmt: skip
    return json.loads(json.dumps({"seed": c.seed} | flat))


# ---- the command line


def from_command_line(argv: Sequence[str]) -> tuple[Section, pathlib.Path, pathlib.Path]:
    """(configuration, folder of the run, file to write) of ``[program, --config=FILE:NAME, --out=FILE, ...]``.

    Without --workdir the run's folder is ``FILE.run``; without --out the file is ``WORKDIR/tokenizer.safetensors``.
    Raises ConfigError in one sentence for a missing flag, an unknown key, or a value of another type or out of range.
    """
    config, given = config_file.from_flags(argv[1:], USAGE, default, validate, ("workdir", "out"))
    out, workdir = given["out"], given["workdir"]
    if not (out or workdir):
        raise ConfigError(f"--out or --workdir must be given; {USAGE}")
    for path in (out, workdir):
        if path and is_remote(path):
            raise ConfigError(f"{path}: a tokenizer is trained in a local folder; copy its file afterwards")
    workdir = pathlib.Path(workdir or pathlib.Path(out).with_suffix(".run"))
    return config, workdir, pathlib.Path(out or workdir / "tokenizer.safetensors")
