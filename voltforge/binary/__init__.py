"""What is inside a binary: ELF files, fatbins and the cubins in them."""
