"""Static configuration of a VQ-VAE tokenizer and its JSON form."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

DOMAINS = ("rgb", "depth", "normal", "semseg", "features")
# Channels of the array as stored, per domain; features bring their own number.
_CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "semseg": 1}


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Shape of one ViT VQ-VAE (4M appendix on tokenizers; the reference implementation's `vq`).

    Attributes:
      domain: one of `DOMAINS`; decides preprocessing, loss and picture.
      name: what messages call the tokenizer; the domain if empty.
      image_size: (height, width) of the input in pixels, or in cells for a feature map.
      patch_size: side of a patch in pixels; 1 for feature maps, whose cells are the tokens.
      channels: channels of the input array (semseg: 1, a map of class ids).
      num_classes: semseg only, number of class ids; 0 otherwise.
      class_dim: semseg only, width of the class embedding (64 in the reference implementation).
      class_names, palette: semseg only, one name and one RGB triple (0..255) per class id.
      codebook_size, latent_dim: number of codes and their width.
      norm_latents: put latents on the unit sphere before quantisation, so that the straight-through gradient
        and the commitment loss see directions only.
      encoder_dim, encoder_depth, encoder_heads: encoder ViT; likewise `decoder_*`.
      mlp_ratio: hidden width of every MLP over the token width.
      post_mlp: residual tanh MLP after the last block of encoder and decoder.
      out_conv: two ConvNeXt blocks on the decoded pixels, which smooth the seams between patches.
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

    def __post_init__(self):
        """Freezes sequences into tuples and refuses combinations that cannot work (ValueError naming the field)."""
        freeze = object.__setattr__
        freeze(self, "image_size", tuple(int(n) for n in self.image_size))
        freeze(self, "class_names", tuple(self.class_names))
        freeze(self, "palette", tuple(tuple(int(v) for v in rgb) for rgb in self.palette))
        if not self.name:
            freeze(self, "name", self.domain)

        if self.domain not in DOMAINS:
            raise ValueError(f"domain {self.domain!r} is not one of {', '.join(DOMAINS)}")
        self._require(len(self.image_size) == 2, "image_size", "must be (height, width)")
        for field in ("patch_size", "channels", "codebook_size", "latent_dim", "encoder_depth", "decoder_depth"):
            self._require(getattr(self, field) >= 1, field, "must be at least 1")
        self._require(
            all(n >= self.patch_size and n % self.patch_size == 0 for n in self.image_size),
            "image_size", f"must be divisible by patch_size {self.patch_size}",
        )
        for side in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{side}_dim"), getattr(self, f"{side}_heads")
            self._require(heads >= 1 and dim % heads == 0, f"{side}_dim", f"must be divisible by {side}_heads {heads}")
            self._require(dim % 4 == 0, f"{side}_dim", "must be divisible by 4 (2D sine-cosine positions)")
        expected = _CHANNELS.get(self.domain)
        if expected is not None:
            self._require(self.channels == expected, "channels", f"must be {expected} for {self.domain}")
        if self.domain == "semseg":
            self._require(2 <= self.num_classes <= 256, "num_classes", "must be 2..256 for semseg (ids are uint8)")
            for field in ("class_names", "palette"):
                self._require(
                    len(getattr(self, field)) in (0, self.num_classes), field,
                    f"must have num_classes = {self.num_classes} entries (or none)",
                )
            self._require(
                all(len(rgb) == 3 and all(0 <= v <= 255 for v in rgb) for rgb in self.palette), "palette",
                "must hold RGB triples of 0..255",
            )
        else:
            self._require(self.num_classes == 0, "num_classes", f"must be 0 for {self.domain}")

    def _require(self, ok: bool, field: str, problem: str) -> None:
        if not ok:
            raise ValueError(f"tokenizer {self.name!r}: {field} = {getattr(self, field)!r} {problem}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

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
        """Shape of one stored array without the batch: [H, W] for depth and semseg, else [H, W, C]."""
        return self.image_size if self.domain in ("depth", "semseg") else (*self.image_size, self.channels)

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
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> VQConfig:
        """Inverse of `to_json`; ValueError for text that is not a JSON object, unknown keys or missing keys."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"tokenizer configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"tokenizer configuration must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)
