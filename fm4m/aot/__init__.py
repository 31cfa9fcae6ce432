"""Compiles the real train step for a named TPU topology, without a TPU, and says what it will need and how fast it is.

    python -m fm4m.aot --config=configs/4m_l.py --topology=v4-128

See `fm4m.aot.__main__` for the command line. Importing this package loads neither JAX's backends nor libtpu.
"""
