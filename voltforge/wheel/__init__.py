"""Wheels: thinning, checks, SBOM, provenance, signatures and the wheelhouse."""
