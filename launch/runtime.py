"""What Google Cloud calls things: runtime images, accelerator types, labels of GKE.

Sources, by title of the page of Google's documentation: runtime images from "TPU software versions", section "PyTorch
and JAX"; accelerator types from "TPU configurations"; node labels from "Plan TPUs in GKE". The machines of a slice are
counted in `fm4m.aot.topology`.
"""

from __future__ import annotations

import dataclasses

from fm4m.aot.topology import Topology


@dataclasses.dataclass(frozen=True)
class Generation:
    """Names of a generation of TPUs.

    Attributes:
      image: runtime image of its virtual machines for JAX.
      prefix: what its accelerator types begin with.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
    """

    image: str
    prefix: str
    gke: str


GENERATIONS = {
    "v4": Generation("tpu-ubuntu2204-base", "v4", "tpu-v4-podslice"),
    "v5e": Generation("v2-alpha-tpuv5-lite", "v5litepod", "tpu-v5-lite-podslice"),
    "v5p": Generation("v2-alpha-tpuv5", "v5p", "tpu-v5p-slice"),
    "v6e": Generation("v2-alpha-tpuv6e", "v6e", "tpu-v6e-slice"),
}


def generation(topology: Topology) -> Generation:
    """The names of a slice type's generation."""
    return GENERATIONS[topology.name.split("-")[0]]


def accelerator_type(topology: Topology) -> str:
    """The slice type as gcloud and xpk write it: v5e-64 is v5litepod-64 there."""
    return f"{generation(topology).prefix}-{topology.name.split('-')[1]}"
