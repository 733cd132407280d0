"""Make the rows of the GPU bundle on a machine without a GPU."""
