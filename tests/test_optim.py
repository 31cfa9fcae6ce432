from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm4m import optim
from fm4m.config_file import ConfigError


@pytest.mark.parametrize(
    ("total", "warmup", "peak"), [(239_120, 4_769, 3.2e-3), (100, 10, 1.0), (10, 0, 2.0), (7, 1, 1.0)]
)
def test_cosine_is_the_reference_table(total, warmup, peak):
    cosine = [0.5 * peak * (1 + np.cos(np.pi * i / (total - warmup))) for i in range(total - warmup)]
    table = np.concatenate([np.linspace(0, peak, warmup), cosine])
    steps = np.unique(
        np.r_[np.arange(min(total, 50)), warmup - 2 : warmup + 3, np.linspace(0, total - 1, 50)].astype(int)
    )
    steps = steps[(steps >= 0) & (steps < total)]
    got = np.asarray(jax.jit(optim.schedule(peak, total, warmup))(steps))
    np.testing.assert_allclose(got, table[steps], rtol=2e-5, atol=1e-7 * peak)


def test_constant_and_rsqrt_with_cooldown():
    constant = optim.schedule(2.0, 100, 10, "constant", cooldown=20)
    np.testing.assert_allclose(constant(np.array([0, 9, 10, 79, 80, 90, 99])), [0, 2, 2, 2, 2, 1, 0.1], rtol=1e-6)
    rsqrt = optim.schedule(2.0, 1000, 100, "rsqrt")
    np.testing.assert_allclose(rsqrt(np.array([99, 100, 400])), [2, 2, 1], rtol=1e-6)


def test_schedule_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="longer than the whole run"):
        optim.schedule(1.0, 10, 8, "constant", cooldown=3)
    with pytest.raises(ConfigError, match="one of cosine"):
        optim.schedule(1.0, 10, 8, "linear")


def test_decay_set_of_a_model():
    from fm4m import model
    from fm4m.modalities import Modality, ModalitySet

    modalities = ModalitySet(
        (
            Modality("image", "pixels", grid=(2, 2), patch_size=2, channels=3),
            Modality("states", "embedding", max_tokens=4, channels=8),
            Modality("grid", "tokens", vocab_size=8, grid=(2, 2), learned_positions=True),
            Modality("words", "sequence", vocab_size=300, max_tokens=8),
        )
    )
    config = model.ModelConfig(
        16, 1, 1, 2, qkv_bias=True, proj_bias=True, mlp_bias=True, norm_bias=True, qk_norm=True, tied_heads=False,
        share_modality_embeddings=False, num_register_tokens=1,
    )  # fmt: skip
    params = jax.eval_shape(lambda k: model.init_params(config, modalities, k), jax.random.key(0))
    mask = {optim.path_name(p): m for p, m in jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))}
    decayed = {name for name, m in mask.items() if m}
    tables = {f"{side}_embedding/{n}" for side in ("encoder", "decoder") for n in ("tokens", "modality", "positions")}
    tables |= {"decoder_embedding/mask_token", "encoder_embedding/registers", "head/tokens"}
    assert {n for n in decayed if not n.endswith("/kernel")} == tables
    kept = {name for name, m in mask.items() if not m}
    assert kept and all(n.endswith(("/bias", "/scale")) for n in kept)
    assert {n for n in mask if n.endswith("/kernel")} <= decayed


def test_update_is_optax_adamw_with_clipping():
    rate = optim.schedule(0.1, 50, 5)
    ours = optim.adamw(rate, weight_decay=0.05, clip_norm=1.0)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3) / 7, "norm": {"scale": jnp.ones(3)}}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, mask=optim.decay_mask(params)),
    )
    a, state, b, their_state = params, ours.init(params), params, theirs.init(params)
    for i in range(8):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(i + 3 * x) * (2 if i % 2 else 0.1), a)
        a, state, values = ours.update(grads, state, a, jnp.int32(i))
        updates, their_state = theirs.update(grads, their_state, b)
        b = optax.apply_updates(b, updates)
        assert float(values["grad_norm"]) == pytest.approx(float(optax.global_norm(grads)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    assert not np.allclose(a["kernel"], params["kernel"])


def test_state_does_not_depend_on_clipping():
    params = {"kernel": jnp.ones((2, 2))}
    plain, clipped = (optim.adamw(lambda s: 0.1, clip_norm=c).init(params) for c in (0.0, 1.0))
    assert jax.tree.structure(plain) == jax.tree.structure(clipped)
    assert set(plain) == {"mu", "nu"}
