"""Looking at a set before training: ``python -m data_pipelines.show NAME``, see `data_pipelines.show.__main__`."""
