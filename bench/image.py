"""Measure the size of the runtime image, and the time to build it.

The last image is removed from the container engine first. The wheels, the base image and uv's cache exist before.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.image import container_engine
from voltforge.image.stages import RuntimeImage
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import run


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runtime = RuntimeImage(Pipeline.load(ROOT, Settings(torch="thin")))
    runtime.wheels()
    runtime.base.run()
    engine = container_engine.choose()
    if runtime.image.record():
        run([engine.kind, "rmi", "--force", runtime.image.result().name], ok=(0, 1, 125))
    runtime.image.path.unlink(missing_ok=True)
    done = run([ROOT / "doit", "image"], cwd=ROOT)
    image = runtime.image.result()
    layers = [layer_size for _, layer_size in image.compressed]
    size = image.base_size + sum(image.layers.values())
    without_cudnn = size - image.projects.get("nvidia-cudnn-cu12", 0)
    rows = [
        ("uncompressed", files.size(size)),
        ("uncompressed with torch=source cudnn=0, calculated", files.size(without_cudnn)),
        ("compressed", files.size(sum(layers))),
        ("layers", str(len(layers))),
        ("to transfer for an update of vLLM", files.size(sum(layers[-3:]))),
        ("time to build the image", f"{done.usage.wall:.0f} s"),
        ("CPU time", f"{done.usage.cpu:.0f} s"),
        ("peak memory, all processes", files.size(done.usage.peak)),
    ]
    console.table(image.path.name, ("", ""), rows)


if __name__ == "__main__":
    main()
