"""Run the checks of a GPU bundle on an NVIDIA card; of volta, a bundle contains this package alone."""
