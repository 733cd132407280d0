"""The contents of binaries: ELF files, fatbins and the cubins in them."""
