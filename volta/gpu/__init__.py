"""Run the rows of a bundle on an NVIDIA card; this package is all of volta that a bundle contains."""
