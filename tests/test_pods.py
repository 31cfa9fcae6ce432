"""Every shipped configuration on an abstract mesh of 128 devices: layouts and collectives, without any device."""

from __future__ import annotations

import collections
import functools
import math
import pathlib
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from fm4m import config as config_lib
from fm4m import optim, recipes, sharding, step
from fm4m import plan as plans
from fm4m.batch import abstract_batch
from fm4m.optim import path_name

ROOT = pathlib.Path(__file__).parents[1]
RELEASED = sorted(p.stem for p in (ROOT / "configs").glob("4m*.py"))


def pod(data=8, fsdp=16, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)


@functools.cache
def lowered(name, mesh):
    """(abstract state, what the step returns, text of the lowered step) of a configuration."""
    config = config_lib.load(str(ROOT / "configs" / f"{name}.py"))
    modalities, masking, tasks = recipes.without_data(config)
    sharding.check_batch(mesh, config.train.global_batch, config.train.accumulation)
    model = plans.make_model_config(config, "tpu", masking.most_tokens)
    steps, warmup, cooldown = plans.lengths(config, masking)
    optimizer = optim.from_config(config, steps, warmup, cooldown)
    state = step.abstract_state(config, model, modalities, optimizer, mesh)
    batch = abstract_batch(modalities, config.train.global_batch, sharding.batch_sharding(mesh))
    made = step.make_step(config, model, modalities, masking, tasks, optimizer, mesh)
    traced = made.trace(state, *batch)
    return config, state, traced.out_info, traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_lower_on_128_devices(name):
    mesh = pod()
    _, state, (new, values), text = lowered(name, mesh)
    sharding.check_parameters_are_split(state["params"], mesh)
    for path, x in jax.tree_util.tree_leaves_with_path(state["params"]):
        split = jax.tree.leaves(tuple(x.sharding.spec))
        assert ("fsdp" in split) == path_name(path).endswith(("/kernel", "/tokens")), path_name(path)
    # State comes out as it went in, the optimizer's like the parameters; metrics are whole everywhere.
    layout = lambda tree: jax.tree.map(lambda x: x.sharding.spec, tree)  # noqa: E731
    assert layout(new) == layout(state)
    assert layout(new["opt_state"]["mu"]) == layout(new["opt_state"]["nu"]) == layout(new["params"])
    assert set(jax.tree.leaves(layout(values))) == {PartitionSpec()}
    # Gradients of all matrices are scattered; what is summed whole has at most a table's rows on one device.
    assert text.count("stablehlo.reduce_scatter") >= 20
    largest = max(map(math.prod, shapes_of(text, "all_reduce")))
    parts = max(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state["params"]))
    assert largest <= parts


def shapes_of(text, operation):
    """Shapes of the results of an operation in StableHLO text."""
    out, inside = [], False
    for line in text.splitlines():
        inside |= f'"stablehlo.{operation}"' in line
        # The types stand on the operation's line, or after its region.
        if inside and (kinds := re.search(r" : \([^)]*\) -> (.*)", line)):
            shapes = re.findall(r"tensor<((?:\d+x)*)[a-z]+\d+>", kinds[1])
            out += [tuple(int(n) for n in shape.split("x") if n) for shape in shapes]
            inside = False
    return out


def test_each_matrix_is_gathered_once_a_pass_and_the_head_once():
    config, state, _, text = lowered("4m_b", pod())
    assert config.model.scan_group == 0 and config.model.remat in (None, "none")
    gathered = shapes_of(text, "all_gather")
    matrices = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(state["params"]) if x.ndim > 1}
    # Every layer's matrices, and the rest whole: tables (the head is the decoder's), both projections.
    expected = collections.Counter()
    for name, x in matrices.items():
        if name.endswith("/tokens") or not re.match(r"(en|de)coder/", name):
            expected[x.shape] += name.endswith(("/kernel", "/tokens"))
        elif name.endswith("/kernel"):
            expected[x.shape[1:]] += x.shape[0]
    assert collections.Counter(gathered) == +expected


def test_lookups_have_no_collectives():
    """The lookup itself, forward and backward, in the program of one device."""
    from fm4m.collectives import take_rows

    mesh = pod()
    table = jax.ShapeDtypeStruct((1024, 64), "float32", sharding=sharding.replicated(mesh))
    index = jax.ShapeDtypeStruct((256, 32), "int32", sharding=sharding.batch_sharding(mesh))

    def gradient(table, index):
        return jax.grad(lambda t: take_rows(t, index).sum())(table)

    local = sharding.local_rows(gradient, mesh, in_specs=(PartitionSpec(), sharding.BATCH), out_specs=PartitionSpec())
    text = jax.jit(local).trace(table, index).lower(lowering_platforms=("tpu",)).as_text()
    assert "scatter" in text
    assert not re.search(r"all_gather|all_reduce|reduce_scatter|all_to_all|collective", text)
