"""Two processes restore: what one of them sees, both act on. The test starts this file twice."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from checkpoint_cases import describe, make_state, run_in

from fm4m import checkpoint, sharding, stored_step
from fm4m.checkpoint import CheckpointError

HERE = pathlib.Path(__file__).resolve()


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE), address, str(tmp_path / "run")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "PYTHONPATH": paths}
    both = [subprocess.Popen([*command, str(i)], env=env, **options) for i in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][-3000:] + said[1][-3000:]


def main(address, workdir, index):
    jax.distributed.initialize(address, 2, index)
    folder = pathlib.Path(workdir) / "checkpoints"
    state = jax.tree.map(np.asarray, make_state(64, 128))
    where = sharding.state_shardings(state, sharding.make_mesh())
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    del abstract["step"]
    with run_in(workdir, keep=9) as checkpoints:
        assert checkpoints.restore_newest(abstract) is None
        placed = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), state, where)
        for step in (2, 4, 6, 8):
            checkpoints.save(placed, describe(step))
        checkpoints.wait()
    if index == 0:
        (folder / "8" / "meta" / "metadata").write_text("{")
    sharding.wait_for_all("one file is damaged")
    handler = stored_step.ocp.StandardCheckpointHandler
    whole = handler.restore

    def restore(expected):
        with run_in(workdir) as checkpoints:
            got, meta = checkpoints.restore_newest(abstract)
        assert meta["step"] == expected, meta["step"]
        for part, tree in got.items():
            for x, saved in zip(jax.tree.leaves(tree), jax.tree.leaves(state[part]), strict=True):
                for shard in x.addressable_shards:
                    np.testing.assert_array_equal(shard.data, saved[shard.index])

    def unreadable(self, path, **options):
        if index == 1 and path.parent.name == "6":
            raise ValueError("DATA_LOSS: seen by one process alone")
        return whole(self, path, **options)

    def other_values(self, path, **options):
        tree = whole(self, path, **options)
        if index == 1 and path.parent.name == "4" and path.name == "params":
            x = tree["decoder_norm"]["scale"]  # which every device has whole
            parts = [shard.data + 1 for shard in x.addressable_shards]
            tree["decoder_norm"]["scale"] = jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
        return tree

    def no_memory(self, path, **options):
        if index == 1:
            raise MemoryError("not here")
        return whole(self, path, **options)

    restore(6)
    handler.restore = unreadable
    restore(4)
    handler.restore = other_values
    restore(2)
    handler.restore, stored_step.PAUSES = no_memory, ()
    with pytest.raises(CheckpointError, match="process 1: .*cannot be read at the moment: MemoryError: not here"):
        restore(2)
    handler.restore = whole
    assert sorted(p.name for p in folder.iterdir()) == ["2", "damaged-4", "damaged-6", "damaged-8"]
    assert checkpoint.load_params(workdir)[1]["step"] == 2
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
