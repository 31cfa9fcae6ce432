"""Model and loss on eight devices against one; test_loss.py runs this in a process of its own."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_model import MODALITIES, random_batch

from fm4m.loss import cross_entropy_sums, modality_weights
from fm4m.model import ModelConfig, forward, head_table, init_params

AXES, BATCH_AXES = ("data", "fsdp", "tensor"), ("data", "fsdp")


def main():
    config = ModelConfig(32, 2, 2, num_heads=2, num_register_tokens=2, remat="dots", dtype="float32")
    params, batch = init_params(config, MODALITIES, jax.random.key(0)), random_batch(0, 8, 24, 20)

    def loss(params, batch, at_use=None, **kwargs):
        hidden = forward(params, config, MODALITIES, batch, at_use)
        sums, counts = cross_entropy_sums(hidden, head_table(params, config), batch, MODALITIES, **kwargs)
        return (modality_weights(counts, MODALITIES) * sums).sum(), counts

    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)

        def gather(name, group):
            return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, PartitionSpec()), group)

        def rows_over_fsdp(path, leaf, mesh=mesh):
            matrix = path[-1].key in ("kernel", "tokens") and leaf.shape[-2] % 2 == 0
            spec = PartitionSpec(*(None,) * (leaf.ndim - 2), "fsdp", None) if matrix else PartitionSpec()
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        with jax.set_mesh(mesh):
            sharded = jax.tree.map_with_path(rows_over_fsdp, params)
            spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
            options = {"mesh": mesh, "batch_axes": BATCH_AXES, "at_use": gather if kind == AxisType.Explicit else None}
            step = jax.jit(jax.value_and_grad(functools.partial(loss, **options), has_aux=True))
            (value, counts), gradient = step(sharded, spread)
        np.testing.assert_allclose(value, expected[0][0], rtol=1e-5)
        np.testing.assert_array_equal(counts, expected[0][1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), gradient, expected[1])
        print(kind.name)


if __name__ == "__main__":
    main()
