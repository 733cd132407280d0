"""The runtime image: base, layers and OCI archive."""
