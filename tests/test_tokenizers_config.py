"""The tokenizers' static configuration: JSON, presets, what is refused."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from fm4m.tokenizers import diffusion_config
from fm4m.tokenizers.config import DOMAINS, VQConfig, preset

SMALL = {
    "codebook_size": 24, "latent_dim": 8, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16,
    "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
UNET = diffusion_config.DiffusionConfig(unet={"channels": 32, "channel_mult": (1, 1), "attention_downsamples": (2,)})
OTHERS = {
    "features": {"image_size": (2, 4), "patch_size": 1, "channels": 12},
    "vector": {"image_size": (1, 1), "patch_size": 1, "channels": 12, "encoder": "mlp", "decoder": "mlp"},
    "semseg": {"channels": 1, "num_classes": 5, "palette": [(i, 2 * i, 3 * i) for i in range(5)]},
    "rgb": {"channels": 3, "decoder": "unet", "diffusion": UNET},
    "normal": {"channels": 3, "quantizer": "fsq", "fsq_levels": (5, 5), "codebook_size": 25, "latent_dim": 2},
}


def small(domain: str, **fields) -> VQConfig:
    given = {"image_size": (16, 32), "patch_size": 8, "channels": 1} | SMALL | OTHERS.get(domain, {}) | fields
    return VQConfig(domain, **given)


@pytest.mark.parametrize("domain", DOMAINS)
def test_json_round_trip(domain):
    config = small(domain)
    again = VQConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize("domain", ["rgb", "depth", "normal", "semseg", "features"])
def test_files_of_before_still_read(domain, request):
    path = request.config.rootpath / "data_pipelines" / "rooms" / "tokenizers" / f"{domain}.safetensors"
    with safe_open(path, "numpy") as file:
        config = VQConfig.from_json(file.metadata()["config"])
    assert config.domain == domain and config.grid == (8, 8) and config.num_tokens == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key.*colour"),
        ({"domain": "sound"}, "'sound' is not one of"),
        ({"encoder": "unet"}, "encoder 'unet' is not one of vit, mlp"),
        ({"quantizer": "lfq"}, "quantizer 'lfq' is not one of"),
        ({"patch_size": 7}, "divisible by patch_size 7"),
        ({"encoder_size": (20, 20)}, "encoder_size = .* divisible by patch_size 8"),
        ({"encoder_heads": 3}, "divisible by encoder_heads 3"),
        ({"encoder_dim": 18}, r"divisible by 4"),
        ({"channels": 4}, "must be 1 for depth"),
        ({"num_classes": 4}, "num_classes = 4 must be 0"),
        ({"domain": "semseg"}, "must be 2..256"),
        ({"domain": "semseg", "num_classes": 2, "palette": [[0, 0, 300], [1, 1, 1]]}, "palette"),
        ({"domain": "vector"}, "one cell"),
        ({"encoder": "mlp"}, "encoder = 'mlp' sees single cells"),
        ({"num_codebooks": 2}, "num_codebooks = 2 must be 1 for cosine"),
        ({"quantizer": "memcodes", "num_codebooks": 3}, "num_codebooks = 3 must divide latent_dim"),
        ({"quantizer": "memcodes", "norm_latents": True}, "norm_latents"),
        ({"quantizer": "fsq"}, "fsq_levels"),
        ({"quantizer": "fsq", "fsq_levels": [8, 1]}, "2 or more"),
        ({"quantizer": "fsq", "fsq_levels": [8, 5]}, "codebook_size = 24 must be 40"),
        ({"fsq_levels": [8]}, "for fsq only"),
        ({"decoder": "unet"}, "diffusion = None does not fit decoder 'unet'"),
        ({"diffusion": UNET.to_dict()}, "does not fit decoder 'vit'"),
        ({"diffusion": {"unets": 1}}, "unets"),
        ({"out_conv": True, "decoder": "unet", "diffusion": UNET.to_dict()}, "out_conv"),
    ],
)  # fmt: skip
def test_refused(change, message):
    values = json.loads(small("depth").to_json())
    with pytest.raises(ValueError, match=message):
        VQConfig.from_dict({**values, **change})


def test_missing_keys_and_bad_json():
    with pytest.raises(ValueError, match="lacks image_size, channels"):
        VQConfig.from_dict({"domain": "rgb", "patch_size": 8})
    with pytest.raises(ValueError, match="not JSON"):
        VQConfig.from_json("{")


def test_presets():
    config = VQConfig("rgb", (224, 224), 16, 3, **preset("encoder", "vit_b") | preset("decoder", "vit_l"))
    assert (config.encoder_dim, config.encoder_depth, config.encoder_heads) == (768, 12, 12)
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (1024, 24, 16)
    assert preset("encoder", "BottleneckMLP/B_6-Wi_1024-E_2") == {
        "encoder": "mlp", "encoder_dim": 1024, "encoder_depth": 6, "mlp_ratio": 2.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no preset 'MLP/B_6-Wi_1024'"):
        preset("decoder", "MLP/B_6-Wi_1024")
    with pytest.raises(ValueError, match="not for 'middle'"):
        preset("middle", "vit_b")


def test_shapes_of_grids():
    features = VQConfig("features", (224, 224), 14, 768, patch_proj=False)
    assert (features.grid, features.array_shape, features.cell_size) == ((16, 16), (16, 16, 768), 1)
    assert features.array_shape_of((4, 6)) == (4, 6, 768) and features.grid_of((9, 4, 6, 768)) == (4, 6)
    depth = small("depth", encoder_size=(64, 64))
    assert (depth.array_shape, depth.encoder_grid, depth.decoder_grid) == ((16, 32), (8, 8), (2, 4))
    assert depth.grid_of((9, 24, 8)) == (3, 1)
    vector = small("vector", quantizer="memcodes", num_codebooks=4)
    assert (vector.array_shape, vector.num_tokens, vector.grid_of((3, 12))) == ((12,), 4, (1, 1))
