"""One of two processes that sum a number in every step, watched: ``watched_pair.py WORKDIR TIMEOUT [FAIL_AT]``.

The same parts as in the trainer, without its half minute of compilation. At step FAIL_AT the last process raises.
"""

from __future__ import annotations

import logging
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fm4m import exit_codes, processes, watchdog


def main():
    workdir, timeout, fail_at = sys.argv[1], float(sys.argv[2]), int((sys.argv[3:] or [0])[0])
    logging.basicConfig(level=logging.INFO, force=True)
    processes.start()
    layout = NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("x",)), P("x"))
    try:
        with watchdog.Watchdog(workdir, timeout, timeout, own_errors=(watchdog.PeerError,)):
            add = jax.jit(lambda a: a + jnp.sum(a) * 0, out_shardings=layout)
            value = jax.make_array_from_process_local_data(layout, np.ones(1, np.float32), (2,))
            for step in range(1, 10**6):
                watchdog.mark("data", step)
                time.sleep(0.02)
                if fail_at == step and jax.process_index() == 1:
                    raise KeyError("no such thing")
                watchdog.mark("fetch", step)
                value = add(value).block_until_ready()
                if step % 20 == 0:
                    print("step", step, flush=True)
    except watchdog.PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.HUNG
    return exit_codes.DONE


if __name__ == "__main__":
    processes.run(main)
