"""The configuration of a tokenizer as the reference implementation stores it, and as ours.

The reference stores the arguments of its classes `VQVAE` and `DiVAE`; what a file does not say has the class's default.
Which of the two it is follows from the decoder's name.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

from fm4m.interop.reference_config import FormatError, literal
from fm4m.tokenizers import diffusion_config
from fm4m.tokenizers.config import DIFFUSION_DECODERS, DOMAINS, VQConfig, preset

log = logging.getLogger("fm4m")

_DEFAULTS = {
    "image_size": 224, "image_size_enc": None, "image_size_dec": None, "n_channels": 3, "n_labels": None,
    "enc_type": "vit_b_enc", "patch_proj": True, "post_mlp": False, "patch_size": 16, "patch_size_dec": None,
    "quant_type": "lucid", "codebook_size": 16384, "num_codebooks": 1, "latent_dim": 32, "norm_codes": True,
    "norm_latents": False, "out_conv": False,
}  # fmt: skip
_DIFFUSION_DEFAULTS = {
    "num_train_timesteps": 1000, "scheduler": "ddpm", "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction", "clip_sample": False, "thresholding": True, "conditioning": "concat",
    "dec_transformer_dropout": 0.2, "zero_terminal_snr": True,
}  # fmt: skip
_OPTIONAL = ("image_size_enc", "image_size_dec", "n_labels", "patch_size_dec")
# Said in files, and without a meaning for a finished tokenizer.
_IRRELEVANT = {
    "format", "config", "dec_type", "sync_codebook", "ema_decay", "threshold_ema_dead_code", "code_replacement_policy",
    "commitment_weight", "kmeans_init", "ckpt_path", "ignore_keys", "freeze_enc", "undo_std", "model_type",
    "cls_free_guidance_dropout", "masked_cfg", "masked_cfg_low", "masked_cfg_high",
}  # fmt: skip
# Parts of the released files' names -> domain; earlier ones win.
_NAMES = (
    ("global|poses?", "vector"), ("sam|masks?", "mask"), ("clip.*|dino.*|imagebind.*|feat.*", "features"),
    ("edges?|canny", "edges"), ("semseg", "semseg"), ("normals?", "normal"), ("depth", "depth"), ("rgb", "rgb"),
)  # fmt: skip
# Arguments of the reference's networks -> fields of ours.
_VIT = {"dim_tokens": "dim", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio"}
_UNET = {
    "patch_size": "patch_size", "model_channels": "channels", "num_res_blocks": "res_blocks",
    "attention_resolutions": "attention_downsamples", "channel_mult": "channel_mult", "dropout": "dropout",
}  # fmt: skip
_UVIT = {
    "patch_size": "patch_size", "block_out_channels": "block_channels", "layers_per_block": "layers",
    "downsample_before_mid": "extra_downsample", "mid_layers": "depth", "mid_num_heads": "heads", "mid_dim": "dim",
    "mid_mlp_ratio": "mlp_ratio", "mid_hw_posemb": "position_grid", "mid_use_long_skip": "long_skip",
    "res_embedding": "resolution_embedding",
}  # fmt: skip
# Fields that say what a tokenizer is called and shown as, not what it computes.
_COSMETIC = ("name", "class_names", "palette")


def domain_of(name: str) -> str | None:
    """The domain that a file's name says, as "4M_tokenizers_DINOv2-B14-global_8k_16_224"; None if it says none."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    for pattern, domain in _NAMES:
        if any(re.fullmatch(pattern, word) for word in words):
            return domain
    return None


def parse(
    values: Mapping[str, Any], where: str, shapes: Mapping[str, tuple[int, ...]], domain: str | None,
    presets: Mapping[str, Mapping[str, Any]],
) -> VQConfig:  # fmt: skip
    """Our configuration of a reference tokenizer.

    Args:
      values: typed values (JSON) or texts (a file's metadata).
      where: the file, for messages.
      shapes: of its tensors; they tell a `VQVAE` from a `DiVAE` where the decoder is not named.
      domain: what its images are of, if known; else it must follow from the configuration.
      presets: sizes of networks that are none of the released ones, by name: {"dim_tokens", "depth", "num_heads",
        "mlp_ratio"} for a ViT, {"patch_size", "model_channels", "num_res_blocks", "attention_resolutions",
        "channel_mult"} for a UNet, {"patch_size", "block_out_channels", "layers_per_block", "downsample_before_mid",
        "mid_layers", "mid_num_heads", "mid_dim", "mid_mlp_ratio", "mid_hw_posemb", "mid_use_long_skip",
        "res_embedding"} for a UViT.

    Raises FormatError naming the field that is wrong, or that fm4m has no tokenizer for.
    """
    typed = {k: literal(v, k, where) if isinstance(v, str) else v for k, v in values.items()}
    post_quant = "post_quant_proj.weight" in shapes
    decoder_name = typed.get("dec_type") or ("vit_b_dec" if post_quant else "unet_patched")
    known = _DEFAULTS | (_DIFFUSION_DEFAULTS if _denoiser(decoder_name) else {})
    unknown = set(typed) - set(_DEFAULTS) - set(_DIFFUSION_DEFAULTS) - _IRRELEVANT
    unknown = sorted(name for name in unknown if "." not in name)  # with a dot: second names of tensors
    if unknown:
        log.warning("%s: configuration key(s) %s are not known and have no effect", where, ", ".join(unknown))
    fields = {name: _checked(name, typed.get(name, default), default, where) for name, default in known.items()}
    if not any(key.startswith("decoder.") for key in shapes):
        raise FormatError(f"{where} holds no decoder; fm4m reads whole tokenizers")

    is_mlp = "MLP" in fields["enc_type"]
    domain = domain or _implied_domain(fields, is_mlp, where)
    try:
        ours = _sizes("encoder", fields["enc_type"], presets, where)
        ours |= _decoder(decoder_name, fields, ours, presets, where)
        ours |= _quantizer(fields, where)
        ours |= _shape(domain, fields, where)
        return VQConfig(domain=domain, out_conv=fields["out_conv"], post_mlp=fields["post_mlp"], **ours)
    except FormatError:
        raise
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: its configuration makes no tokenizer of domain {domain!r}: {error}") from error


def _denoiser(name: str) -> str | None:
    return next((kind for kind in DIFFUSION_DECODERS if name.startswith(f"{kind}_")), None)


def _checked(name: str, value: Any, default: Any, where: str) -> Any:
    if value is None and name in _OPTIONAL:
        return None
    if isinstance(default, bool):
        ok, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, str):
        ok, wanted = isinstance(value, str), "a name"
    elif isinstance(default, float):
        ok, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        # Bounds that no tokenizer reaches, so that a damaged file cannot ask for more memory than there is.
        ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**22
        wanted = "a whole number from 1 to 4194304"
    if not ok:
        raise FormatError(f"{where}: {name} is {value!r}; expected {wanted}")
    return value


def _implied_domain(fields: Mapping[str, Any], is_mlp: bool, where: str) -> str:
    if fields["n_labels"] is not None:
        return "semseg"
    if is_mlp:
        return "vector"
    if not fields["patch_proj"]:
        return "features"
    if fields["n_channels"] == 3:
        return "rgb"
    raise FormatError(
        f"{where}: nothing says what its images of {fields['n_channels']} channel(s) are of; pass domain=, one of "
        f"{', '.join(DOMAINS)}"
    )


def _sizes(side: str, name: str, presets: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    if name in presets:
        given = presets[name]
        if not given.get("qkv_bias", True):
            raise FormatError(f"{where}: {name} has no bias in its attention, which fm4m's tokenizers have")
        try:
            sizes = {f"{side}_{ours}": given[theirs] for theirs, ours in _VIT.items() if ours != "mlp_ratio"}
        except KeyError as error:
            raise FormatError(f"the preset {name} lacks {error.args[0]}; a ViT needs {', '.join(_VIT)}") from None
        return {side: "vit", **sizes, "mlp_ratio": float(given.get("mlp_ratio", 4.0))}
    try:
        return preset(side, name.removesuffix("_enc" if side == "encoder" else "_dec"))
    except ValueError as error:
        raise FormatError(
            f"{where}: {error}; give the sizes of {name!r} in presets={{{name!r}: {{'dim_tokens': ..., 'depth': ..., "
            "'num_heads': ..., 'mlp_ratio': ...}}"
        ) from None


def _decoder(
    name: str, fields: Mapping[str, Any], encoder: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]],
    where: str,
) -> dict[str, Any]:  # fmt: skip
    kind = _denoiser(name)
    if kind is None:
        sizes = _sizes("decoder", name, presets, where)
        if sizes["mlp_ratio"] != encoder["mlp_ratio"]:
            raise FormatError(f"{where}: encoder and decoder differ in mlp_ratio, which fm4m has one of")
        return sizes
    network = diffusion_config.PRESETS.get(name) or _custom(name, presets, where)
    if kind == "uvit":
        network = dataclasses.replace(
            network, conditioning=fields["conditioning"], dropout=float(fields["dec_transformer_dropout"])
        )
    diffusion = diffusion_config.DiffusionConfig(
        **{kind: network},
        schedule=fields["beta_schedule"], zero_terminal_snr=fields["zero_terminal_snr"],
        prediction=fields["prediction_type"], steps=fields["num_train_timesteps"], sampler=fields["scheduler"],
        clip=fields["clip_sample"] and not fields["thresholding"], thresholding=fields["thresholding"],
    )  # fmt: skip
    return {"decoder": kind, "diffusion": diffusion}


def _custom(
    name: str, presets: Mapping[str, Mapping[str, Any]], where: str
) -> diffusion_config.UNetConfig | diffusion_config.UViTConfig:
    """The denoiser of that name in ``presets``, whose fields have the reference's names or ours."""
    if name not in presets:
        known = ", ".join(diffusion_config.PRESETS)
        raise FormatError(f"{where}: {name} is no known denoiser ({known}); give its sizes in presets")
    given = dict(presets[name])
    if not given.pop("mid_qkv_bias", True):
        raise FormatError(f"{where}: {name} has no bias in its attention, which fm4m's denoisers have")
    if _denoiser(name) == "unet":
        return diffusion_config.UNetConfig(**{_UNET.get(k, k): v for k, v in given.items()})
    return diffusion_config.UViTConfig(**{_UVIT.get(k, k): v for k, v in given.items()})


def _quantizer(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    sizes = {"codebook_size": fields["codebook_size"], "latent_dim": fields["latent_dim"]}
    if fields["quant_type"] == "memcodes":  # which do not look at norm_codes and norm_latents
        return sizes | {"quantizer": "memcodes", "num_codebooks": fields["num_codebooks"]}
    if fields["quant_type"] != "lucid" or fields["num_codebooks"] != 1:
        raise FormatError(
            f"{where}: quantizer {fields['quant_type']!r} with {fields['num_codebooks']} codebook(s); fm4m reads "
            "'lucid' with one and 'memcodes' with any number"
        )
    kind = "cosine" if fields["norm_codes"] else "euclidean"
    return sizes | {"quantizer": kind, "norm_latents": fields["norm_latents"]}


def _shape(domain: str, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    if fields["patch_size_dec"] not in (None, fields["patch_size"]):
        raise FormatError(f"{where}: patch_size_dec {fields['patch_size_dec']} is not patch_size; fm4m has one of them")
    if domain == "vector":
        return {"image_size": (1, 1), "patch_size": 1, "channels": fields["n_channels"]}
    shape: dict[str, Any] = {"patch_size": fields["patch_size"], "patch_proj": fields["patch_proj"]}
    for theirs, ours in (
        ("image_size", "image_size"), ("image_size_enc", "encoder_size"), ("image_size_dec", "decoder_size"),
    ):  # fmt: skip
        side = fields[theirs]
        # A table for the image's own size is what our configuration says by None.
        if theirs == "image_size" or side not in (None, fields["image_size"]):
            shape[ours] = (side, side)
    if domain == "semseg":
        classes = {"num_classes": fields["n_labels"] or 0, "class_dim": fields["n_channels"]}
        return shape | {"channels": 1, **classes}
    return shape | {"channels": fields["n_channels"]}


# ---- ours to theirs


def same_shape(a: VQConfig, b: VQConfig) -> bool:
    """Whether two configurations compute the same, whatever they are called."""
    ignored = {*_COSMETIC}
    for side in ("encoder", "decoder"):
        kind = getattr(a, side)
        unused = {"vit": (), "mlp": ("heads", "size")}.get(kind, ("dim", "depth", "heads", "size"))
        ignored |= {f"{side}_{field}" for field in unused}
    left, right = (dataclasses.asdict(config) for config in (a, b))
    return all(left[field] == right[field] for field in left if field not in ignored)


def from_config(config: VQConfig, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The reference's configuration of one of our tokenizers, by its names.

    Raises FormatError for what the reference has no tokenizer for, or no name (see ``presets`` of `parse`).
    """
    name = f"tokenizer {config.name!r}"
    if config.quantizer == "fsq":
        raise FormatError(f"{name} quantises by FSQ, which the reference implementation does not have")
    sizes = [s or config.image_size for s in (config.image_size, config.encoder_size, config.decoder_size)]
    if any(h != w for h, w in sizes):
        raise FormatError(f"{name} is for images of {sizes}; the reference implementation's are square")
    vector = config.domain == "vector"
    fields = dict(_DEFAULTS) | {
        "image_size": _DEFAULTS["image_size"] if vector else config.image_size[0],
        "image_size_enc": config.encoder_size and config.encoder_size[0],
        "image_size_dec": config.decoder_size and config.decoder_size[0],
        "patch_size": _DEFAULTS["patch_size"] if vector else config.patch_size,
        "n_channels": config.in_channels, "n_labels": config.num_classes or None, "patch_proj": config.patch_proj,
        "post_mlp": config.post_mlp, "out_conv": config.out_conv,
        "quant_type": "memcodes" if config.quantizer == "memcodes" else "lucid", "codebook_size": config.codebook_size,
        "num_codebooks": config.num_codebooks, "latent_dim": config.latent_dim,
        "norm_codes": config.quantizer != "euclidean", "norm_latents": config.norm_latents,
        "enc_type": _name("encoder", config, presets),
    }  # fmt: skip
    diffusion = config.diffusion
    if diffusion is None:
        return fields | {"dec_type": _name("decoder", config, presets)}
    del fields["out_conv"]
    network = diffusion.uvit
    return fields | {
        "dec_type": _denoiser_name(config, presets), "num_train_timesteps": diffusion.steps,
        "scheduler": diffusion.sampler, "beta_schedule": diffusion.schedule, "prediction_type": diffusion.prediction,
        "clip_sample": diffusion.clip, "thresholding": diffusion.thresholding,
        "zero_terminal_snr": diffusion.zero_terminal_snr,
        "conditioning": network.conditioning if network else _DIFFUSION_DEFAULTS["conditioning"],
        "dec_transformer_dropout": network.dropout if network else _DIFFUSION_DEFAULTS["dec_transformer_dropout"],
    }  # fmt: skip


def _name(side: str, config: VQConfig, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """What the reference calls an encoder or decoder of these sizes."""
    dim, depth = getattr(config, f"{side}_dim"), getattr(config, f"{side}_depth")
    if getattr(config, side) == "mlp":
        expansion = "" if config.mlp_ratio == 4 else f"-E_{config.mlp_ratio:g}"
        return f"BottleneckMLP/B_{depth}-Wi_{dim}{expansion}"
    suffix = side[:3]
    for name in (*(f"vit_{size}_{suffix}" for size in "sbl"), *presets):
        sizes = _sizes(side, name, presets, name) if name in presets and "dim_tokens" in presets[name] else {}
        sizes = sizes or (preset(side, name.removesuffix(f"_{suffix}")) if name not in presets else {})
        if sizes and all(getattr(config, field) == value for field, value in sizes.items()):
            return name
    raise FormatError(
        f"tokenizer {config.name!r}: the reference implementation has no {side} of width {dim} with {depth} blocks and "
        f"{getattr(config, f'{side}_heads')} heads; name one in presets={{NAME: {{'dim_tokens': {dim}, ...}}}} and "
        "register it there too"
    )


def _denoiser_name(config: VQConfig, presets: Mapping[str, Mapping[str, Any]]) -> str:
    network = config.diffusion.network
    plain = {"dropout": 0.0} | ({"conditioning": "concat"} if config.decoder == "uvit" else {})
    for name, known in diffusion_config.PRESETS.items():
        if type(known) is type(network) and dataclasses.replace(network, **plain) == known:
            return name
    for name in presets:
        if _denoiser(name) == config.decoder:
            known = _custom(name, presets, f"preset {name}")
            if dataclasses.replace(known, **plain) == dataclasses.replace(network, **plain):
                return name
    raise FormatError(
        f"tokenizer {config.name!r}: the reference implementation has no denoiser of these sizes; name one in presets"
    )
