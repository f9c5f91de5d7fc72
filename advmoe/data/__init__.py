"""Images in: one file per source, fixed splits, batches. Loading an image or a data file never runs code."""
