"""One module a mixture: importing it registers modalities, tasks and mixture (``data.modules`` of a configuration)."""
