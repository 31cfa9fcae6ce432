"""Static configuration of an image, feature or vector tokenizer, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from fm4m.tokenizers.diffusion_config import DiffusionConfig

DOMAINS = ("rgb", "depth", "normal", "semseg", "features", "edges", "mask", "vector")
ENCODERS = ("vit", "mlp")
DIFFUSION_DECODERS = ("unet", "uvit")
DECODERS = (*ENCODERS, *DIFFUSION_DECODERS)
QUANTIZERS = ("cosine", "euclidean", "memcodes", "fsq")
# Channels of the array as stored, per domain; features and vectors bring their own number.
_CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 1, "edges": 1, "mask": 1}
# Domains whose stored arrays have no channel axis.
_FLAT = ("depth", "semseg", "edges", "mask")
# Width, blocks and heads of the reference implementation's ViTs; their MLPs are four times as wide.
_VITS = {"vit_s": (512, 8, 8), "vit_b": (768, 12, 12), "vit_l": (1024, 24, 16)}
_MLP = re.compile(r"BottleneckMLP/B_(\d+)-Wi_(\d+)(?:-E_(\d+))?")


def preset(side: str, name: str) -> dict[str, Any]:
    """Fields of `VQConfig` for an encoder or decoder by the name the reference implementation gives it.

    Args:
      side: "encoder" or "decoder".
      name: "vit_s", "vit_b", "vit_l", or "BottleneckMLP/B_6-Wi_1024" (6 blocks of width 1024; "-E_2" after it sets the
        expansion, 4 otherwise; Bachmann et al. 2023, "Scaling MLPs").

    Raises ValueError for another side or name.
    """
    if side not in ("encoder", "decoder"):
        raise ValueError(f"a preset is for the 'encoder' or the 'decoder', not for {side!r}")
    if name in _VITS:
        dim, depth, heads = _VITS[name]
        return {side: "vit", f"{side}_dim": dim, f"{side}_depth": depth, f"{side}_heads": heads, "mlp_ratio": 4.0}
    if match := _MLP.fullmatch(name):
        depth, dim, expansion = (int(group or 4) for group in match.groups())
        return {side: "mlp", f"{side}_dim": dim, f"{side}_depth": depth, "mlp_ratio": float(expansion)}
    raise ValueError(f"no preset {name!r}; known: {', '.join(_VITS)} and BottleneckMLP/B_<blocks>-Wi_<width>")


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Shape of one tokenizer (4M, appendix on tokenizers; the reference implementation's `vq`).

    Attributes:
      domain: one of `DOMAINS`; decides preprocessing, loss and picture.
      name: what messages call the tokenizer; the domain if empty.
      image_size: (height, width) in pixels of the image that the codes describe; (1, 1) for vectors. Other sizes can
        be given when it runs.
      patch_size: side of a patch in pixels; 1 where the cells of a feature map are counted as its pixels.
      channels: channels of the input array (semseg: 1, a map of class ids; vector: its length).
      num_classes: semseg only, number of class ids; 0 otherwise.
      class_dim: semseg only, width of the class embedding (64 in the reference implementation).
      class_names, palette: semseg only, one name and one RGB triple (0..255) per class id.
      quantizer: one of `QUANTIZERS`, see `fm4m.tokenizers.quantize`.
      codebook_size, latent_dim: number of codes and width of the latents; FSQ sets both from its levels.
      num_codebooks: memcodes only, codebooks that each code a slice of the latent; 1 otherwise.
      fsq_levels: FSQ only, values per latent channel, such as (8, 5, 5, 5) for 1000 codes.
      norm_latents: put latents on the unit sphere before quantisation, so that the straight-through gradient
        and the commitment loss see directions only.
      encoder, decoder: one of `ENCODERS`, `DECODERS`; "unet" and "uvit" are denoisers (DiVAE).
      encoder_dim, encoder_depth, encoder_heads: width, blocks and heads of the encoder (an MLP has no heads); likewise
        `decoder_*`, which denoisers do not use.
      mlp_ratio: hidden width of every MLP over the token width.
      patch_proj: the encoder cuts patches from pixels; False for feature maps, whose arrays are of the grid's size.
      post_mlp: residual tanh MLP after the last block of a ViT encoder and decoder.
      out_conv: two ConvNeXt blocks on the decoded pixels, which smooth the seams between patches.
      encoder_size, decoder_size: (height, width) of the image that a ViT's position table is made for, from which
        other grids are interpolated; `image_size` if None.
      diffusion: schedule and network of a denoiser; set exactly when `decoder` is one.
    """

    domain: str
    image_size: tuple[int, int]
    patch_size: int
    channels: int
    name: str = ""
    num_classes: int = 0
    class_dim: int = 64
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    codebook_size: int = 1024
    latent_dim: int = 32
    norm_latents: bool = False
    encoder_dim: int = 192
    encoder_depth: int = 4
    encoder_heads: int = 3
    decoder_dim: int = 192
    decoder_depth: int = 4
    decoder_heads: int = 3
    mlp_ratio: float = 4.0
    post_mlp: bool = True
    out_conv: bool = False
    encoder: str = "vit"
    decoder: str = "vit"
    quantizer: str = "cosine"
    num_codebooks: int = 1
    fsq_levels: tuple[int, ...] = ()
    patch_proj: bool = True
    encoder_size: tuple[int, int] | None = None
    decoder_size: tuple[int, int] | None = None
    diffusion: DiffusionConfig | None = None

    def __post_init__(self):
        """Freezes sequences into tuples and refuses combinations that cannot work (ValueError naming the field)."""
        freeze = object.__setattr__
        for field in ("image_size", "encoder_size", "decoder_size", "fsq_levels"):
            if getattr(self, field) is not None:
                freeze(self, field, tuple(int(n) for n in getattr(self, field)))
        freeze(self, "class_names", tuple(self.class_names))
        freeze(self, "palette", tuple(tuple(int(v) for v in rgb) for rgb in self.palette))
        if not self.name:
            freeze(self, "name", self.domain)
        for field, known in (
            ("domain", DOMAINS), ("encoder", ENCODERS), ("decoder", DECODERS), ("quantizer", QUANTIZERS),
        ):  # fmt: skip
            if getattr(self, field) not in known:
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(known)}")
        self._check_quantizer()
        self._check_sizes()
        self._check_networks()
        self._check_domain()

    def _require(self, ok: bool, field: str, problem: str) -> None:
        if not ok:
            raise ValueError(f"tokenizer {self.name!r}: {field} = {getattr(self, field)!r} {problem}")

    def _check_quantizer(self) -> None:
        if self.quantizer == "fsq":
            self._require(len(self.fsq_levels) >= 1, "fsq_levels", "must list the levels of every latent channel")
            self._require(min(self.fsq_levels) >= 2, "fsq_levels", "must be 2 or more each")
            total = 1
            for level in self.fsq_levels:
                total *= level
            self._require(total < 2**31, "fsq_levels", "make more codes than an int32 can number")
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            for field, implied in (("codebook_size", total), ("latent_dim", len(self.fsq_levels))):
                given = getattr(self, field) in (defaults[field], implied)
                self._require(given, field, f"must be {implied}, which fsq_levels make")
                object.__setattr__(self, field, implied)
        else:
            self._require(not self.fsq_levels, "fsq_levels", f"are for fsq only, not for {self.quantizer}")
        if self.quantizer == "memcodes":
            heads = self.num_codebooks
            self._require(heads >= 1 and self.latent_dim % heads == 0, "num_codebooks", "must divide latent_dim")
        else:
            self._require(self.num_codebooks == 1, "num_codebooks", f"must be 1 for {self.quantizer}")
        if self.quantizer in ("memcodes", "fsq"):
            self._require(not self.norm_latents, "norm_latents", f"has no meaning for {self.quantizer}")

    def _check_sizes(self) -> None:
        for field in ("patch_size", "channels", "codebook_size", "latent_dim", "encoder_depth", "decoder_depth"):
            self._require(getattr(self, field) >= 1, field, "must be at least 1")
        for field in ("image_size", "encoder_size", "decoder_size"):
            size = getattr(self, field)
            if size is None:
                continue
            self._require(len(size) == 2, field, "must be (height, width)")
            fits = all(n >= self.patch_size and n % self.patch_size == 0 for n in size)
            self._require(fits, field, f"must be divisible by patch_size {self.patch_size}")

    def _check_networks(self) -> None:
        for side in ("encoder", "decoder"):
            dim, heads, kind = (getattr(self, f) for f in (f"{side}_dim", f"{side}_heads", side))
            self._require(dim >= 1, f"{side}_dim", "must be at least 1")
            if kind == "vit":
                fits = heads >= 1 and dim % heads == 0
                self._require(fits, f"{side}_dim", f"must be divisible by {side}_heads {heads}")
                self._require(dim % 4 == 0, f"{side}_dim", "must be divisible by 4 (2D sine-cosine positions)")
            if kind == "mlp":
                self._require(self.cell_size == 1, side, "sees single cells: set patch_proj False, or patch_size 1")
        denoiser = self.decoder in DIFFUSION_DECODERS
        self._require((self.diffusion is not None) == denoiser, "diffusion", f"does not fit decoder {self.decoder!r}")
        self._require(self.decoder == "vit" or not self.out_conv, "out_conv", "is for a ViT decoder only")

    def _check_domain(self) -> None:
        expected = _CHANNELS.get(self.domain)
        if expected is not None:
            self._require(self.channels == expected, "channels", f"must be {expected} for {self.domain}")
        if self.domain == "vector":
            self._require(self.grid == (1, 1), "image_size", "must be one cell for vectors, as (1, 1)")
            self._require(self.cell_size == 1, "patch_size", "must be 1 for vectors")
        if self.decoder in DIFFUSION_DECODERS:
            fits = self.domain not in ("semseg", "vector")
            self._require(fits, "decoder", f"cannot denoise {self.domain}: its output is no image of its input")
        if self.domain != "semseg":
            self._require(self.num_classes == 0, "num_classes", f"must be 0 for {self.domain}")
            return
        self._require(2 <= self.num_classes <= 256, "num_classes", "must be 2..256 for semseg (ids are uint8)")
        for field in ("class_names", "palette"):
            fits = len(getattr(self, field)) in (0, self.num_classes)
            self._require(fits, field, f"must have num_classes = {self.num_classes} entries (or none)")
        fits = all(len(rgb) == 3 and all(0 <= v <= 255 for v in rgb) for rgb in self.palette)
        self._require(fits, "palette", "must hold RGB triples of 0..255")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def cell_size(self) -> int:
        """Side in array elements of what one code describes: the patch size, or 1 without patch projection."""
        return self.patch_size if self.patch_proj else 1

    @property
    def num_tokens(self) -> int:
        """Codes of one array at the configured size."""
        return self.grid[0] * self.grid[1] * self.num_codebooks

    @property
    def encoder_grid(self) -> tuple[int, int]:
        """Rows and columns of the encoder's position table."""
        size = self.encoder_size or self.image_size
        return size[0] // self.patch_size, size[1] // self.patch_size

    @property
    def decoder_grid(self) -> tuple[int, int]:
        """Rows and columns of a ViT decoder's position table."""
        size = self.decoder_size or self.image_size
        return size[0] // self.patch_size, size[1] // self.patch_size

    @property
    def in_channels(self) -> int:
        """Channels the encoder sees: the class embedding's width for semseg, else `channels`."""
        return self.class_dim if self.domain == "semseg" else self.channels

    @property
    def out_channels(self) -> int:
        """Channels the decoder writes: one logit per class for semseg, else `channels`."""
        return self.num_classes if self.domain == "semseg" else self.channels

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of one stored array without the batch: [C] for vectors, [H, W] or [H, W, C] otherwise."""
        return self.array_shape_of(self.grid)

    def array_shape_of(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one stored array that has `grid` codes."""
        if self.domain == "vector":
            return (self.channels,)
        size = grid[0] * self.cell_size, grid[1] * self.cell_size
        return size if self.domain in _FLAT else (*size, self.channels)

    def grid_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The grid of arrays of shape [B, ...]: rows and columns of whole cells (see `array_shape_of`)."""
        if self.domain == "vector" or len(shape) < 3:
            return self.grid
        return shape[1] // self.cell_size, shape[2] // self.cell_size

    def to_json(self) -> str:
        """The configuration as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VQConfig:
        """Builds a configuration from a dictionary; ValueError names unknown and missing keys."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"unknown key(s) in tokenizer configuration: {', '.join(unknown)}; known: {', '.join(fields)}"
            )
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise ValueError(f"tokenizer configuration lacks {', '.join(missing)}")
        if isinstance(values.get("diffusion"), dict):
            values = values | {"diffusion": DiffusionConfig.from_dict(values["diffusion"])}
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> VQConfig:
        """Inverse of `to_json`; ValueError for text that is not a JSON object, unknown keys or missing keys."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"tokenizer configuration must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)
