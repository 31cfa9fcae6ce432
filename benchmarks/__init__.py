"""What the README's speed tables are made from: `benchmarks.step` (the core alone) and `benchmarks.input_pipeline`."""
