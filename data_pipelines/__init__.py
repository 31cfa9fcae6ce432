"""Input pipelines and data sets: everything that turns stored files into batches."""
