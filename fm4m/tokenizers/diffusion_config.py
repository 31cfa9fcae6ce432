"""Static configuration of a diffusion decoder: noise schedule, prediction target, sampler and denoising network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SCHEDULES = ("linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "shifted_cosine")
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SAMPLERS = ("ddim", "ddpm")
SPACINGS = ("trailing", "leading", "linspace")
LOSSES = ("mse", "l1", "smooth_l1")
CONDITIONINGS = ("concat", "xattn")
# Channels of every convolutional level are normalised in this many groups.
GROUPS = 32


def _freeze(config: Any, field: str) -> None:
    object.__setattr__(config, field, tuple(int(n) for n in getattr(config, field)))


def _require(ok: bool, config: Any, field: str, problem: str) -> None:
    if not ok:
        raise ValueError(f"{type(config).__name__}: {field} = {getattr(config, field)!r} {problem}")


def _from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    return cls(**values)


def _check_levels(config: Any, field: str, channels: tuple[int, ...]) -> None:
    _require(len(channels) > 0, config, field, "must name at least one level")
    _require(
        all(c > 0 and c % GROUPS == 0 for c in channels), config, field,
        f"must give widths that are multiples of {GROUPS} (group normalisation)",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The patched UNet (Dhariwal & Nichol 2021 on pixel-unshuffled images; the reference implementation's default).

    Attributes:
      patch_size: side of the squares of pixels that become one cell of the finest level.
      channels: width of the finest level.
      channel_mult: width of every level over `channels`; each level halves the resolution of the one before.
      res_blocks: residual blocks per level on the way down; the way up has one more.
      attention_downsamples: downsampling factors (in cells: 1, 2, 4, ...) whose blocks are followed by self-attention.
      dropout: rate inside the residual blocks, in training.
    """

    patch_size: int = 4
    channels: int = 256
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    res_blocks: int = 3
    attention_downsamples: tuple[int, ...] = (4, 8)
    dropout: float = 0.0

    def __post_init__(self):
        """Freezes sequences and refuses impossible values (ValueError naming the field)."""
        _freeze(self, "channel_mult")
        _freeze(self, "attention_downsamples")
        for field in ("patch_size", "res_blocks"):
            _require(getattr(self, field) >= 1, self, field, "must be at least 1")
        _check_levels(self, "channels", (self.channels,))
        _require(len(self.channel_mult) >= 1 and min(self.channel_mult) >= 1, self, "channel_mult", "must be positive")
        levels = {2**i for i in range(len(self.channel_mult))}
        _require(
            set(self.attention_downsamples) <= levels, self, "attention_downsamples",
            f"must be among the levels' factors {sorted(levels)}",
        )  # fmt: skip
        _require(0 <= self.dropout < 1, self, "dropout", "must be at least 0 and below 1")

    @property
    def stride(self) -> int:
        """Pixels per cell of the coarsest level: sides of pictures must be multiples of it."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


@dataclasses.dataclass(frozen=True)
class UViTConfig:
    """The UViT: convolutional levels around a transformer (Hoogeboom et al. 2023, "simple diffusion").

    Attributes:
      patch_size: side of the squares of pixels that the first convolution turns into one cell.
      block_channels: width of every convolutional level; each level halves the resolution of the one before.
      layers: residual blocks per level on the way down; the way up has one more.
      extra_downsample: halve the resolution once more before the transformer, by a bare convolution (the f16 presets).
      dim, depth, heads, mlp_ratio: the transformer.
      conditioning: "concat" adds the projected latents to the tokens, "xattn" attends to the latents in every block.
      position_grid: rows and columns of the sine-cosine table that is resized to the actual grid.
      long_skip: every block of the transformer's second half sees the output of its mirror in the first (Bao et al.
        2023, "All are worth words"); the depth is odd then, the block in the centre has no mirror.
      resolution_embedding: tell the network the (height, width) that the picture had before it was resized.
      dropout: rate inside the transformer, in training.
    """

    patch_size: int = 4
    block_channels: tuple[int, ...] = (128, 256)
    layers: int = 2
    extra_downsample: bool = True
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    conditioning: str = "concat"
    position_grid: int = 32
    long_skip: bool = False
    resolution_embedding: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        """Freezes sequences and refuses impossible values (ValueError naming the field)."""
        _freeze(self, "block_channels")
        for field in ("patch_size", "layers", "depth", "heads", "position_grid"):
            _require(getattr(self, field) >= 1, self, field, "must be at least 1")
        _check_levels(self, "block_channels", self.block_channels)
        _require(self.dim % self.heads == 0, self, "dim", f"must be divisible by heads {self.heads}")
        _require(self.dim % 4 == 0, self, "dim", "must be divisible by 4 (two-dimensional sine-cosine positions)")
        _require(self.conditioning in CONDITIONINGS, self, "conditioning", f"is not one of {', '.join(CONDITIONINGS)}")
        _require(
            not self.long_skip or (self.depth >= 3 and self.depth % 2 == 1), self, "depth",
            "must be odd and at least 3 with long_skip: pairs of blocks around one in the centre",
        )  # fmt: skip
        _require(0 <= self.dropout < 1, self, "dropout", "must be at least 0 and below 1")

    @property
    def stride(self) -> int:
        """Pixels per token of the transformer: sides of pictures must be multiples of it."""
        return self.patch_size * 2 ** (len(self.block_channels) - 1 + self.extra_downsample)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """How a tokenizer's decoder turns noise into a picture under the condition of the code rows.

    Exactly one of `unet` and `uvit` is set. Defaults are those of the reference implementation's RGB tokenizer.

    Attributes:
      unet, uvit: the denoising network.
      schedule: one of `SCHEDULES`; the shifted cosine carries its shift, "shifted_cosine:0.5".
      zero_terminal_snr: rescale the schedule so that the last step is pure noise (Lin et al. 2023, algorithm 1). The
        shifted cosine always ends so.
      prediction: what the network's output means: the clean picture, the noise, or the velocity
        sqrt(abar) * noise - sqrt(1 - abar) * picture (Salimans & Ho 2022).
      loss: distance between output and target in training, a mean over all pixels; smooth_l1 has its kink at 1.
      steps: noise levels of training.
      sampler: "ddim" (eta 0) or "ddpm".
      sampling_steps: evaluations of the network per picture unless asked otherwise.
      spacing: which noise levels these visit (Lin et al. 2023, table 2).
      clip: clip every predicted picture to [-1, 1].
      thresholding: clip it to its own quantile `threshold_quantile` of absolute values instead, that limit being kept
        within [1, `threshold_max`], and scale to [-1, 1] (Saharia et al. 2022, section 2.3).
    """

    unet: UNetConfig | None = None
    uvit: UViTConfig | None = None
    schedule: str = "linear"
    zero_terminal_snr: bool = True
    prediction: str = "sample"
    loss: str = "mse"
    steps: int = 1000
    sampler: str = "ddim"
    sampling_steps: int = 25
    spacing: str = "trailing"
    clip: bool = False
    thresholding: bool = False
    threshold_quantile: float = 0.995
    threshold_max: float = 1.0

    def __post_init__(self):
        """Builds the network's configuration from a dictionary where given one; ValueError names a wrong field."""
        for field, cls in (("unet", UNetConfig), ("uvit", UViTConfig)):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                object.__setattr__(self, field, _from_dict(cls, value))
            elif value is not None and not isinstance(value, cls):
                raise ValueError(f"DiffusionConfig: {field} must be a {cls.__name__}, got {type(value).__name__}")
        if (self.unet is None) == (self.uvit is None):
            raise ValueError("DiffusionConfig: exactly one of unet and uvit must be set, the network that denoises")
        kind, _, shift = self.schedule.partition(":")
        _require(kind in SCHEDULES, self, "schedule", f"is not one of {', '.join(SCHEDULES)}")
        _require((kind == "shifted_cosine") == bool(shift), self, "schedule", "needs a shift, as in shifted_cosine:0.5")
        if shift:
            try:
                positive = 0 < float(shift) < float("inf")
            except ValueError:
                positive = False
            _require(positive, self, "schedule", "needs a positive number as its shift")
        choices = {"prediction": PREDICTIONS, "loss": LOSSES, "sampler": SAMPLERS, "spacing": SPACINGS}
        for field, allowed in choices.items():
            _require(getattr(self, field) in allowed, self, field, f"is not one of {', '.join(allowed)}")
        _require(self.steps >= 2, self, "steps", "must be at least 2")
        _require(1 <= self.sampling_steps <= self.steps, self, "sampling_steps", f"must be 1..{self.steps} (steps)")
        _require(not (self.clip and self.thresholding), self, "clip", "excludes thresholding")
        _require(0 < self.threshold_quantile <= 1, self, "threshold_quantile", "must be above 0 and at most 1")
        _require(self.threshold_max >= 1, self, "threshold_max", "must be at least 1")

    @property
    def network(self) -> UNetConfig | UViTConfig:
        """The denoising network's configuration, whichever it is."""
        return self.unet or self.uvit

    @property
    def kind(self) -> str:
        """"unet" or "uvit"."""
        return "unet" if self.unet is not None else "uvit"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {k: _lists(v) for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionConfig:
        """Inverse of `to_dict`; left-out fields have their defaults. ValueError names an unknown or wrong field."""
        return _from_dict(cls, values)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _presets() -> dict[str, UNetConfig | UViTConfig]:
    presets: dict[str, UNetConfig | UViTConfig] = {"unet_patched": UNetConfig()}
    sizes = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
    for size, (dim, depth, heads) in sizes.items():
        plain = UViTConfig(dim=dim, depth=depth, heads=heads)
        name = f"uvit_{size}_p4"
        presets[f"{name}_f16"] = plain
        if size == "h":
            continue
        presets[f"{name}_f8"] = dataclasses.replace(plain, extra_downsample=False)
        presets[f"{name}_f16_longskip"] = dataclasses.replace(plain, depth=depth + 1, long_skip=True)
        # The transformer's resolution is reached by a third level of convolutions instead of a bare one.
        presets[f"{name}_f16_extraconv"] = dataclasses.replace(
            plain, block_channels=(128, 256, 512), extra_downsample=False
        )
    return presets


PRESETS = _presets()


def preset(name: str, **changes: Any) -> DiffusionConfig:
    """A diffusion decoder with one of the networks of `PRESETS` by name; ``changes`` are fields of `DiffusionConfig`.

    Raises ValueError naming the known presets for another name.
    """
    if name not in PRESETS:
        raise ValueError(f"{name!r} is not a known denoising network; there are {', '.join(PRESETS)}")
    return DiffusionConfig(**{name.split("_")[0]: PRESETS[name]}, **changes)
