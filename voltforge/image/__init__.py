"""The runtime image: its base, its layers and the OCI archive."""
