"""Exchange with the world outside.

layout.py             the reference implementation's state dict, key by key, as views of our parameters
reference_config.py   its configuration: as strings in a file's metadata, as JSON beside it, as ours
tensor_file.py        safetensors files, read and written one tensor at a time
ml4m.py               whole models: folders and files that the reference implementation reads and writes
stablehlo.py          inference as `jax.export` artefacts that run without fm4m
"""
