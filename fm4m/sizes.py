"""The configuration of a model, and the registered sizes."""

from __future__ import annotations

import dataclasses

from fm4m.attention import IMPLEMENTATIONS
from fm4m.layers import ACTIVATIONS, REMAT_POLICIES
from fm4m.modalities import round_up, unknown_name
from fm4m.positions import COORDINATES

EXECUTION = ("scan_group", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model.

    Attributes:
      dim: width D of the residual stream, a multiple of ``num_heads`` and of 4.
      encoder_depth, decoder_depth: layers.
      num_heads: attention heads.
      mlp_ratio: hidden width of the MLP over ``dim``; a gated MLP has two thirds of it, rounded down.
      gated_mlp: whether the MLP has a gate.
      activation: ``"silu"`` or ``"gelu"`` (exact, with the error function).
      qkv_bias, proj_bias, mlp_bias, norm_bias: which projections and norms have a bias. The projection of the encoder's
        output into the decoder has one always.
      qk_norm: layer-normalise queries and keys per head.
      attention_init: ``"xavier"`` draws query and key kernels independently, as the reference implementation;
        ``"aligned"`` starts the keys as a copy of the queries, both three times as large, and the encoder's projection
        into the decoder 0.3 times as large, so that equal positions attend to each other from the first step (in the
        spirit of Trockman and Kolter 2023, "Mimetic initialization of self-attention layers").
      grid_positions: ``"sincos"`` as the reference implementation, or ``"fourier"``, whose frequencies tell cells of
        a grid apart and put the same place of a picture into the same position whatever the grid
        (`fm4m.positions.fourier`, `shared_unit`). Together with ``"aligned"``, a model of width 128 begins to use the
        image within its first hundred steps.
      num_register_tokens: learned tokens put before the encoder's input.
      share_modality_embeddings: one modality embedding for both sides.
      tied_heads: the output head is the decoder's token table.
      decoder_sep_mask: a decoder token sees only its own modality. False: also all modalities before its own, in the
        order of the packed batch.
      decoder_causal_mask: every decoder token, of grids too, sees only itself and earlier slots.
      mlp_multiple: the hidden width of the MLP is stored rounded up to a multiple of this. The columns beyond
        ``mlp_dim`` start at zero and stay zero: the activation of 0 is 0, so that neither output nor gradient reaches
        them. 128 is the width of a TPU's lanes, and 1,365, 2,730 and 5,461 are no multiples of it.
      scan_group: how a stack of layers is run: 1 scans one compiled layer (short compilation), g > 1 scans groups of g
        layers, 0 unrolls all of them (fastest on TPU, and minutes of compilation: `fm4m.aot` tells).
      remat: what the backward pass keeps, one of `fm4m.layers.REMAT_POLICIES`.
      attention: the implementation, one of `fm4m.attention.IMPLEMENTATIONS`.
      dtype: ``"bfloat16"`` or ``"float32"`` for activations and matrix multiplications; parameters are float32.
    """

    dim: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    gated_mlp: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    attention_init: str = "xavier"
    grid_positions: str = "sincos"
    num_register_tokens: int = 0
    share_modality_embeddings: bool = True
    tied_heads: bool = True
    decoder_sep_mask: bool = True
    decoder_causal_mask: bool = False
    mlp_multiple: int = 1
    scan_group: int = 1
    remat: str = "none"
    attention: str = "einsum"
    dtype: str = "bfloat16"

    def __post_init__(self):
        if min(self.dim, self.encoder_depth, self.decoder_depth, self.num_heads) < 1:
            raise ValueError(f"dim, depths and num_heads must be positive: {self}")
        # Bounds that no model reaches: larger numbers end in some library, without a name.
        for field, least, most in (("dim", 1, 2**20), ("encoder_depth", 1, 2**16), ("decoder_depth", 1, 2**16),
                                   ("mlp_ratio", 0, 1000), ("mlp_multiple", 1, 2**20), ("scan_group", 0, 2**16),
                                   ("num_register_tokens", 0, 2**16)):  # fmt: skip
            if not least <= getattr(self, field) <= most:
                raise ValueError(f"{field} {getattr(self, field)} must be {least} to {most}")
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads ({self.num_heads}) and of 4")
        if self.mlp_multiple < 1 or self.mlp_dim < 1:
            raise ValueError(f"mlp_multiple and the hidden width of the MLP must be at least 1: {self}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name(self.activation, ACTIVATIONS, "activation"))
        if self.attention_init not in ("xavier", "aligned"):
            raise ValueError(unknown_name(self.attention_init, ("xavier", "aligned"), "attention initialisation"))
        if self.grid_positions not in COORDINATES:
            raise ValueError(unknown_name(self.grid_positions, COORDINATES, "kind of grid positions"))
        if self.remat not in REMAT_POLICIES:
            raise ValueError(unknown_name(self.remat, REMAT_POLICIES, "remat policy"))
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(unknown_name(self.attention, IMPLEMENTATIONS, "implementation of attention"))
        if any(self.scan_group and depth % self.scan_group for depth in (self.encoder_depth, self.decoder_depth)):
            raise ValueError(
                f"scan_group {self.scan_group} does not divide {self.encoder_depth} and {self.decoder_depth} layers"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")

    @property
    def identity(self) -> dict:
        """The fields that say what the model computes; the others (`EXECUTION`) say how, and may change at any time."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in EXECUTION}

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP (of each branch, when gated)."""
        hidden = int(self.dim * self.mlp_ratio)
        return int(2 * hidden / 3) if self.gated_mlp else hidden

    @property
    def padded_mlp_dim(self) -> int:
        """Hidden width of the MLP as stored."""
        return round_up(self.mlp_dim, self.mlp_multiple)


def _registered_sizes() -> dict[str, ModelConfig]:
    stems = {  # depth of each side, width
        "tiny": (6, 384),
        "small": (8, 512),
        "base": (12, 768),
        "large": (24, 1024),
        "xlarge": (24, 2048),
    }
    biases = dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), True)
    variants = {
        "gelu": {"gated_mlp": False, "activation": "gelu", **biases},
        "swiglu_nobias": {},
        "swiglu_qknorm_nobias": {"qk_norm": True},
    }
    sizes = {}
    for stem, (depth, dim) in stems.items():
        for variant, options in variants.items():
            if "qknorm" in variant and stem in ("tiny", "small"):
                continue
            name = f"fm_{stem}_{depth}e_{depth}d_{variant}"
            sizes[name] = ModelConfig(dim, depth, depth, num_heads=dim // 64, **options)
    return sizes


# The 13 models of the reference implementation, by its names.
SIZES = _registered_sizes()


def model_config(name: str, **overrides) -> ModelConfig:
    """The registered model of that name with some fields replaced.

    Raises KeyError naming the nearest registered name, TypeError naming the nearest field.
    """
    if name not in SIZES:
        raise KeyError(unknown_name(name, SIZES, "registered model"))
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    for field in overrides:
        if field not in fields:
            raise TypeError(unknown_name(field, fields, "field of ModelConfig"))
    return dataclasses.replace(SIZES[name], **overrides)
