"""Whole models in the reference implementation's format: round trips, key sets, and files that are refused."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from fixtures import FIXTURES, needs_fixtures
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_model import MODALITIES

import fm4m
from fm4m import export
from fm4m.interop import ml4m, reference_config
from fm4m.interop.layout import Layout
from fm4m.interop.reference_config import FormatError
from fm4m.interop.tensor_file import TensorFileError
from fm4m.modality_sets import MOD7
from fm4m.model import ModelConfig, model_config

CONFIG = ModelConfig(32, 2, 1, num_heads=2, mlp_ratio=2.5, mlp_multiple=16, num_register_tokens=2, dtype="float32")


def parameters(config=CONFIG, seed=0):
    """Random numbers in every tensor (and zeros where the layout only pads), without a compilation."""
    rng, layout = np.random.default_rng(seed), Layout(config, MODALITIES)
    params = layout.zeros()
    for key in layout.parameters:
        layout.set(params, key, rng.normal(size=layout.shape(key)).astype(np.float32))
    return params


@pytest.fixture
def folder(tmp_path):
    ml4m.save(tmp_path / "model", CONFIG, MODALITIES, parameters())
    return tmp_path / "model"


def edit(folder, change):
    """Rewrites the weights with ``change(tensors, metadata)`` applied."""
    path = folder / "model.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    tensors = dict(load_file(path))
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_modality_embeddings": False, "norm_bias": True, "qkv_bias": True, "qk_norm": True},
        {"gated_mlp": False, "activation": "gelu", "mlp_bias": True, "proj_bias": True, "decoder_sep_mask": False},
        {"grid_positions": "fourier"},
    ],
)
def test_saved_models_come_back(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = parameters(config)
    ml4m.save(tmp_path / "model", config, MODALITIES, params)
    loaded = fm4m.load(tmp_path / "model")
    assert loaded.config == config and loaded.modalities == MODALITIES
    # By the reference's keys: rows that nothing uses (a modality's embedding on a side that lacks it) are not stored.
    layout = Layout(config, MODALITIES)
    for key in layout.parameters:
        np.testing.assert_array_equal(layout.get(loaded.params, key), layout.get(params, key), err_msg=key)
    untied = fm4m.load(tmp_path / "model" / "model.safetensors", tie_heads=False)
    assert not untied.config.tied_heads
    np.testing.assert_array_equal(untied.params["head"]["tokens"], params["decoder_embedding"]["tokens"])


def test_import_and_export_give_the_same_file_again(tmp_path, folder):
    # Position tables that differ in the last bits, as those that the reference computes in float32.
    def nudge(tensors, _):
        key = "encoder_embeddings.caption.pos_emb"
        tensors[key] = np.nextafter(tensors[key], np.float32(2))

    edit(folder, nudge)
    assert export.main(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 0
    assert export.main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}", "--format=ml-4m"]) == 0
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.tobytes() == second[key].tobytes(), key
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())


def test_average_and_moments_come_along(tmp_path):
    params, ema = parameters(), parameters(seed=1)
    moments = {"mu": parameters(seed=2), "nu": parameters(seed=3)}
    ml4m.save(tmp_path / "model", CONFIG, MODALITIES, params, ema=ema, opt_state=moments, step=7)
    options = ["--with=ema,optimizer"]
    assert export.main(["import", f"--from={tmp_path / 'model'}", f"--to={tmp_path / 'run'}", *options]) == 0
    run = fm4m.load(tmp_path / "run", ema=True)
    assert run.meta["step"] == 7 and run.meta["origin"]["format"] == "ml-4m"
    assert_equal_trees(run.params, ema)
    assert_equal_trees(fm4m.load(tmp_path / "run" / "checkpoints" / "7").params, params)
    back = ["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}", "--format=ml-4m", options[0]]
    assert export.main(back) == 0
    for name in ("model", "ema", "optimizer"):
        first, second = (load_file(tmp_path / f / f"{name}.safetensors") for f in ("model", "back"))
        assert set(first) == set(second) and all(np.array_equal(first[k], second[k]) for k in first), name
    # The average as the model itself.
    assert export.main([*back[:2], f"--to={tmp_path / 'average'}", back[3], "--weights=ema"]) == 0
    assert_equal_trees(fm4m.load(tmp_path / "average").params, ema)


def test_shared_tensors_are_left_out_and_named(folder):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        keys, metadata = set(file.keys()), file.metadata()
    shared = {f"encoder_embeddings.{n}.mod_emb" for n in MODALITIES.inputs if n in MODALITIES.outputs}
    assert shared and not shared & keys and shared <= set(metadata)
    assert metadata["act_layer"] == "SiLU" and metadata["gated_mlp"] == "True"


@needs_fixtures
def test_the_references_own_folder_format(tmp_path):
    source = FIXTURES / "parity" / "fm_swiglu_rgb_weights.safetensors"
    expected = json.loads((FIXTURES / "parity" / "fm_swiglu_rgb_hub_format.json").read_text())
    assert export.main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    assert export.main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'hub'}", "--format=ml-4m"]) == 0
    with safe_open(tmp_path / "hub" / "model.safetensors", "numpy") as file:
        assert sorted(file.keys()) == sorted(expected["keys"])
        assert expected["metadata"].items() <= file.metadata().items()
    assert json.loads((tmp_path / "hub" / "config.json").read_text()) == expected["config_json"]
    first, second = load_file(source), load_file(tmp_path / "hub" / "model.safetensors")
    assert all(first[key].tobytes() == second[key].tobytes() for key in second)
    assert set(first) - set(second) == set(expected["missing_vs_state_dict"])
    # Without fm4m's own description, as others would have it.
    (tmp_path / "hub" / "fm4m.json").unlink()
    assert fm4m.load(tmp_path / "hub").modalities["caption"].vocab_size == 512


# ---- what is refused, and that nothing is left of it


def drop(key):
    return lambda tensors, metadata: tensors.pop(key)


def put(key, shape, value=0.0):
    return lambda tensors, metadata: tensors.update({key: np.full(shape, value, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("decoder.0.cross_attn.kv.weight"), r"lacks decoder.0.cross_attn.kv.weight.*2 \+ 1 layers of width 32"),
        (drop("encoder_embeddings.caption.pos_emb"), "lacks encoder_embeddings.caption.pos_emb"),
        (put("encoder.2.norm1.weight", (32,)), "holds encoder.2.norm1.weight, which its configuration has no place"),
        (put("mask_token", (1, 32)), r"mask_token has shape \(1, 32\); its configuration asks for \(1, 1, 32\)"),
        (put("encoder_norm.bias", (32,), 0.5), "encoder_norm.bias is not zero"),
        (put("encoder_embeddings.depth.pos_emb", (1, 16, 32)), "depth.pos_emb is not what the formula"),
        (put("encoder_embeddings.caption.mod_emb", (1, 1, 32), 9.0), "mod_emb differ, but share_modality_embeddings"),
        (lambda t, m: m.update(dim="64"), "dim is 32 in .*config.json but 64 in the metadata"),
        (lambda t, m: m.update(act_layer="ReLU"), "act_layer is 'ReLU'; expected one of SiLU, GELU"),
        (lambda t, m: m.update(encoder_depth="-3"), "encoder_depth is -3; expected a whole number from 1"),
        (lambda t, m: m.update(domains_in="__import__('os').abort()"), "domains_in is .*; expected a list"),
        (lambda t, m: m.update(dim="(" * 9000), "dim is "),
    ],
)
def test_contradictions_are_named_and_leave_nothing(tmp_path, folder, change, message, capsys):
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        fm4m.load(folder)
    assert export.main(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_truncated_files(tmp_path, folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(TensorFileError, match=r"model.safetensors is not a whole safetensors file"):
        fm4m.load(folder)
    assert export.main(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_heads_that_differ_cannot_be_tied(folder):
    edit(folder, put("decoder_embeddings.caption.to_logits.weight", (300, 32), 1.0))
    fm4m.load(folder, tie_heads=False)
    with pytest.raises(FormatError, match=r"caption.to_logits.weight .*differ, but tied heads were asked for"):
        fm4m.load(folder, tie_heads=True)


def test_modalities_that_only_fm4m_knows_need_their_description(folder):
    (folder / "fm4m.json").unlink()
    with pytest.raises(FormatError, match=r"no modality of the released 4M models named .*pass the modality set"):
        fm4m.load(folder)
    assert fm4m.load(folder, modalities=MODALITIES).modalities == MODALITIES


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(FormatError, match="pytorch_model.bin is a pickle, which could execute anything"):
            fm4m.load(path)
    with pytest.raises(FileNotFoundError, match="is no model"):
        fm4m.load(tmp_path / "absent.pth")


def test_targets_that_exist_are_kept(tmp_path, folder, capsys):
    shutil.copytree(folder, tmp_path / "mine")
    assert export.main(["export", f"--from={folder}", f"--to={tmp_path / 'mine'}", "--format=ml-4m"]) == 2
    assert export.main(["import", f"--from={folder}", f"--to={tmp_path / 'mine'}"]) == 2
    assert capsys.readouterr().err.count("mine exists already") == 2
    with pytest.raises(FileNotFoundError, match="is no model: expected a run folder"):
        fm4m.load(tmp_path)


def test_half_precision_files_are_read(folder):
    edit(folder, lambda tensors, _: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), parameters())
    assert_equal_trees(fm4m.load(folder).params["decoder"], rounded["decoder"])


def test_metadata_that_is_no_configuration_does_no_harm(folder):
    def replace(tensors, metadata):
        metadata.clear()
        metadata.update(source="a place", format="pt")

    edit(folder, replace)
    assert fm4m.load(folder).config == CONFIG
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"allow_zero_attn": True}))
    with pytest.raises(FormatError, match="allow_zero_attn is set, which fm4m has no attention for"):
        fm4m.load(folder)


def test_an_average_with_other_heads_cannot_be_tied(tmp_path):
    config = dataclasses.replace(CONFIG, tied_heads=False)
    ml4m.save(tmp_path / "model", config, MODALITIES, parameters(config), ema=parameters(config))
    fm4m.load(tmp_path / "model", ema=True)
    with pytest.raises(FormatError, match=r"ema.safetensors: decoder_embeddings.* differ, but tied heads"):
        fm4m.load(tmp_path / "model", ema=True, tie_heads=True)


def test_options_that_do_not_apply_are_refused(tmp_path, folder, capsys):
    assert export.main(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 0
    with pytest.raises(ValueError, match="is a run, which has modalities and heads of its own"):
        fm4m.load(tmp_path / "run", tie_heads=True)
    served = ["export", f"--from={folder}", f"--to={tmp_path / 'x'}"]
    for arguments in (["--format=stablehlo", "--with=ema"], ["--format=ml-4m", "--inputs=caption"]):
        with pytest.raises(SystemExit):
            export.main([*served, *arguments])
    assert "--with is for --format=ml-4m" in capsys.readouterr().err
    (folder / "fm4m.json").rename(tmp_path / "sets.json")
    arguments = ["import", f"--from={folder}", f"--to={tmp_path / 'again'}", f"--modalities={tmp_path / 'sets.json'}"]
    assert export.main(arguments) == 0 and fm4m.load(tmp_path / "again").modalities == MODALITIES


def test_metadata_is_read_as_literals_only():
    fields = reference_config.parse(
        {
            "domains_in": "['caption', 'det']", "domains_out": "['caption']", "dim": "64", "encoder_depth": "2",
            "decoder_depth": "2", "num_heads": "4", "gated_mlp": "true", "act_layer": "torch.nn.SiLU", "format": "pt",
        },
        "a file",
    )  # fmt: skip
    assert fields["gated_mlp"] is True and fields["act_layer"] == "SiLU" and fields["share_modality_embeddings"] is True
    with pytest.raises(FormatError, match=r"a file: the configuration lacks dim, encoder_depth"):
        reference_config.parse({"domains_in": [], "domains_out": []}, "a file")


MEASURED = """
import resource, sys
from fm4m import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = export.main(sys.argv[1:])
print("KILOBYTES", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_large_model_is_never_twice_in_memory(tmp_path):
    config = model_config("fm_small_8e_8d_swiglu_nobias", tied_heads=False)
    params = Layout(config, MOD7).zeros()
    for leaf in jax.tree.leaves(params):
        leaf[...] = np.random.default_rng(0).standard_normal(leaf.shape[-1])
    ml4m.save(tmp_path / "model", config, MOD7, params)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 8e8
    del params
    for arguments in (
        ["import", f"--from={tmp_path / 'model'}", f"--to={tmp_path / 'run'}"],
        ["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}", "--format=ml-4m"],
    ):
        done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used = 1024 * int(re.search(r"KILOBYTES (\d+)", done.stdout)[1])
        assert used < 1.5 * size, f"{arguments[0]} took {used / size:.2f} times the model's size"
    assert filecmp.cmp(tmp_path / "model/model.safetensors", tmp_path / "back/model.safetensors", shallow=False)
