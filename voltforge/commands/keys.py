"""`./doit key`: print the key that signs wheels, and make it at the first call."""

from __future__ import annotations

import os
from pathlib import Path

from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console
from voltforge.wheel import signing


def show_key(pipeline: Pipeline) -> None:
    """Print the public key; make the key pair if there is none, and sign the wheels of the wheelhouse with it.

    Raises:
        VoltforgeError: the key cannot be written or read.
    """
    path = Path(os.environ.get("VOLTFORGE_KEY") or signing.default_key(os.environ))
    signer = signing.Signer.load(path) if path.exists() else signing.make_key(path)
    console.step(f"private key {path}: keep it secret")
    for name in pipeline.wheelhouse.sign(signer):
        console.note(f"signed {name}")
    console.note("To trust this key, add it to the file that VOLTFORGE_TRUSTED names,")
    console.note(f"or to {signing.default_trusted(os.environ)}:")
    console.screen.print(f"{signer.keyid}\n{signer.public}", end="")
