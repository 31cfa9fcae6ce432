"""Takes a training step apart: gradients by group of parameters, losses by sample, the first layer that went wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fm4m import loss as loss_lib
from fm4m import model as model_lib
from fm4m import sharding
from fm4m import step as step_lib
from fm4m.batch import RawBatch
from fm4m.masking import mask_batch
from fm4m.optim import path_name
from fm4m.plan import Plan


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the samples of one batch gave, as numpy arrays; B rows in the order of the stream.

    Attributes:
      sums: float32 [B, num modalities], summed cross-entropy in nats.
      counts: float32 [B, num modalities], predicted tokens.
      share: float64 [B], what each adds to the loss of the step; they add up to it.
      finite: bool [B], whether all activations are finite.
      broken: int [B], how many parts of `parts` a sample passes with finite activations; only for those not finite.
      task: int [B], index of the mixture's task.
    """

    sums: np.ndarray
    counts: np.ndarray
    share: np.ndarray
    finite: np.ndarray
    broken: np.ndarray
    task: np.ndarray


# ---- groups of parameters


def group_norms(plan: Plan, params: Any, batch: tuple[RawBatch, jax.Array]) -> dict[str, tuple[float, float]]:
    """(norm of the gradient, norm of the parameters) of every group, in the order in which data pass them.

    Groups are: each layer, each modality's rows of a table and each projection, and every other group by name.
    """
    stream = plan.stream
    gradients = step_lib.make_gradients(
        plan.config, plan.model, stream.modalities, plan.masking, stream.tasks, plan.abstract["params"], plan.mesh
    )

    def squares(params: Any, raw: RawBatch, position: jax.Array) -> tuple[Any, Any]:
        grads, _ = gradients(params, raw, position)
        parts = [jax.tree_util.tree_map_with_path(_squares, tree) for tree in (grads, params)]
        return tuple(sharding.reshard(part, plan.mesh, P()) for part in parts)

    found = [_by_group(plan, tree) for tree in jax.device_get(jax.jit(squares)(params, *batch))]
    return {name: (found[0][name] ** 0.5, found[1][name] ** 0.5) for name in found[0]}


def _squares(path: tuple, x: jax.Array) -> jax.Array:
    """Sums of squares: of each layer of a stack, of each row of a table, else of all."""
    name = path_name(path)
    if name.split("/")[0] in step_lib.STACKS:
        return (x * x).sum(tuple(range(1, x.ndim)))
    return (x * x).sum(-1) if name.endswith("/tokens") else (x * x).sum()


def _by_group(plan: Plan, tree: Any) -> dict[str, float]:
    modalities, out = plan.stream.modalities, {}

    def add(group: str, value: Any) -> None:
        out[group] = out.get(group, 0.0) + float(np.sum(value, dtype=np.float64))

    order = ["encoder_embedding", "encoder", "encoder_norm", "context_projection", "decoder_embedding", "decoder"]
    order += [name for name in tree if name not in order]
    for top in order:
        for path, value in jax.tree_util.tree_leaves_with_path(tree[top]):
            name = path_name(path)
            if top in step_lib.STACKS:
                for layer, part in enumerate(value):
                    add(f"{top} layer {layer}", part)
            elif name == "tokens":
                offsets = modalities.input_offset if top == "encoder_embedding" else modalities.output_offset
                ends = [*list(offsets.values())[1:], len(value)]
                for (modality, start), end in zip(offsets.items(), ends, strict=True):
                    add(f"{top} tokens {modality}", value[start:end])
            elif top.endswith("_embedding"):
                add(" ".join([top, *name.split("/")[:2]]), value)
            else:
                add(top, value)
    return out


# ---- samples


def parts(plan: Plan) -> list[str]:
    """What a sample passes, in order; `Samples.broken` counts them."""
    layers = {name: getattr(plan.model, f"{name}_depth") for name in step_lib.STACKS}
    encoder, decoder = ([f"{name} layer {i}" for i in range(depth)] for name, depth in layers.items())
    return ["the encoder's embeddings", *encoder, "the decoder's context or embeddings", *decoder]


def samples(plan: Plan, params: Any, batch: tuple[RawBatch, jax.Array]) -> Samples:
    """Losses of every sample of a batch, and for those that are not finite where that began.

    Nothing is differentiated, and the pass that ends after k layers is made with all later layers' parameters 0, which
    makes them add nothing: one program does for all k.
    """
    config, model, modalities, mesh = plan.config, plan.model, plan.stream.modalities, plan.mesh
    passes, key = config.train.accumulation, step_lib.mask_key(config.seed)
    specs = sharding.param_specs(plan.abstract["params"], mesh)
    layers = lambda name, layer: sharding.layer_weights(name, layer, mesh)  # noqa: E731

    def local(params: Any, depths: jax.Array, raw: RawBatch, position: jax.Array) -> tuple[jax.Array, ...]:
        def upto(depth: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where((jnp.arange(x.shape[0]) < depth).reshape(-1, *[1] * (x.ndim - 1)), x, 0)

        cut = {n: jax.tree.map(lambda x, d=d: upto(d, x), params[n]) for n, d in zip(step_lib.STACKS, depths)}
        stacks, gathered, _ = step_lib.weights_at_use({**params, **cut}, model, mesh)
        weights = {**gathered, **stacks}
        head = model_lib.head_table(weights, model)

        def one(row: tuple) -> tuple[jax.Array, jax.Array]:
            hidden, packed = jax.tree.map(lambda x: x[None], row)
            return loss_lib.cross_entropy_sums(hidden, head, packed, modalities, config.train.loss_method)

        def one_pass(packed: Any) -> tuple[jax.Array, ...]:
            encoded = model_lib.encode(weights, model, modalities, packed.encoder, packed.dense, layers)
            hidden = model_lib.decode(weights, model, modalities, encoded, packed.decoder, layers)
            finite = jnp.stack([jnp.isfinite(x).all((1, 2)) for x in (encoded.hidden, hidden)], 1)
            return *jax.lax.map(one, (hidden, packed)), finite

        packed = mask_batch(raw, plan.masking, modalities, plan.stream.tasks, key, position)
        split = jax.tree.map(lambda x: x.reshape(passes, x.shape[0] // passes, *x.shape[1:]), packed)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one_pass, split))

    rows = sharding.BATCH
    program = jax.jit(sharding.local_rows(local, mesh, in_specs=(specs, P(), rows, rows), out_specs=rows))
    run = lambda *depths: [sharding.to_host(x) for x in program(params, np.array(depths, np.int32), *batch)]  # noqa: E731

    encoder, decoder = (getattr(model, f"{name}_depth") for name in step_lib.STACKS)
    sums, counts, finite = run(encoder, decoder)
    broken = np.full(len(sums), encoder + decoder + 2)
    if not finite.all():
        passed = [run(depth, decoder)[2][:, 0] for depth in range(encoder + 1)]
        passed += [run(encoder, depth)[2][:, 1] for depth in range(decoder + 1)]
        # What is not finite stays so.
        broken = np.logical_and.accumulate(passed).sum(0)
    total = jnp.asarray(counts.sum(0, dtype=np.float32))
    weights = np.asarray(loss_lib.modality_weights(total, modalities, config.train.loss), np.float64)
    share = (weights * sums).sum(1)
    return Samples(sums, counts, share, finite.all(1), broken, sharding.to_host(batch[0].task))
