"""What a wheel holds: thinning, checks, SBOM, signatures, and the wheelhouse that keeps it."""
