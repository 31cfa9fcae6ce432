from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm4m import modalities
from fm4m.modalities import Modality, ModalitySet


def small_set() -> ModalitySet:
    return ModalitySet(
        (
            Modality("rgb", "pixels", grid=(8, 8), patch_size=8, channels=3),
            Modality("depth", "tokens", 500, (8, 8)),
            Modality("clip", "tokens", 128, (7, 7)),
            Modality("global", "tokens", 300, (4, 4), learned_positions=True),
            Modality("text_states", "embedding", max_tokens=77, channels=96),
            Modality("caption", "sequence", 4300, max_tokens=32),
        )
    )


def test_offsets_tile_every_table_without_overlap():
    s = small_set()
    assert s.outputs == ("depth", "clip", "global", "caption")
    assert s.slot_offset == {"depth": 0, "clip": 64, "global": 113, "caption": 129}
    assert s.num_slots == 161
    assert s.input_offset == {"depth": 0, "clip": 512, "global": 640, "caption": 1024}
    assert s.input_rows == 1024 + 4352
    assert s.continuous_offset == {"rgb": 0, "text_states": 64}
    assert s.continuous_rows == 64 + 78  # an embedding has one more vector: what a masked span shows
    assert [(b.kind, b.offset, b.rows) for b in s.position_blocks] == [
        ("1d", 0, 512),
        ("2d", 512, 64),
        ("2d", 576, 49),
        ("learned", 625, 16),
    ]
    assert s.position_offset["rgb"] == s.position_offset["depth"] == 512
    assert (s.position_rows, s.learned_position_rows) == (641, 16)
    assert s.output_ranges[s.index("clip")].tolist() == [512, 640]
    assert s.output_ranges[s.index("rgb")].tolist() == [0, 0]
    assert s.is_sequence.tolist() == [False] * 5 + [True]


def test_json_round_trip_and_hash():
    s = ModalitySet(small_set().modalities, inputs=("rgb", "caption"), outputs=("depth",))
    again = ModalitySet.from_dict(json.loads(json.dumps(s.to_dict())))
    assert again == s and hash(again) == hash(s)


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 60000), st.integers(1, 300)), min_size=1, max_size=6))
def test_rows_are_multiples_of_128_and_ranges_disjoint(shapes):
    s = ModalitySet(tuple(Modality(f"m{i}", "sequence", v, max_tokens=n) for i, (v, n) in enumerate(shapes)))
    assert s.output_rows % 128 == 0 and all(o % 128 == 0 for o in s.output_offset.values())
    ranges = s.output_ranges
    assert (ranges[1:, 0] >= ranges[:-1, 1]).all() and ranges[-1, 1] <= s.output_rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="x", kind="voxels"), "not one of"),
        (dict(name="x", kind="tokens", vocab_size=10), "grid"),
        (dict(name="x", kind="tokens", vocab_size=70000, grid=(2, 2)), "65536"),
        (dict(name="x", kind="sequence", vocab_size=10), "max_tokens"),
        (dict(name="x", kind="sequence", vocab_size=10, max_tokens=600), "512"),
        (dict(name="x", kind="pixels", grid=(2, 2), channels=3), "patch_size"),
        (dict(name="x", kind="pixels", grid=(2, 2), patch_size=8, vocab_size=3, channels=3), "vocab_size"),
        (dict(name="x", kind="tokens", vocab_size=5, grid=(2, 2), max_tokens=5), "contradicts"),
    ],
)
def test_a_bad_modality_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as e:
        Modality(**fields)
    assert "'x'" in str(e.value)


def test_unknown_names_suggest_the_nearest():
    s = small_set()
    with pytest.raises(KeyError, match="Did you mean 'depth'"):
        s.index("dept")
    with pytest.raises(KeyError, match="Did you mean 'depth'"):
        ModalitySet(s.modalities, outputs=("depht",))
    with pytest.raises(ValueError, match="'rgb'.*no codes"):
        ModalitySet(s.modalities, outputs=("rgb",))
    with pytest.raises(ValueError, match="'depth' occurs twice"):
        ModalitySet((s["depth"], s["depth"]))
    with pytest.raises(ValueError, match="'colour'"):
        Modality.from_dict({"name": "x", "kind": "tokens", "colour": 3})


def test_registry_refuses_a_second_meaning():
    modalities.register(Modality("test_registry_edges", "tokens", 16, (8, 8)))
    modalities.register(Modality("test_registry_edges", "tokens", 16, (8, 8)))
    with pytest.raises(ValueError, match="registered already"):
        modalities.register(Modality("test_registry_edges", "tokens", 17, (8, 8)))
    with pytest.raises(KeyError, match="Did you mean 'test_registry_edges'"):
        modalities.get("test_registry_edgse")
