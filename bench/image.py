"""Put the image together from a warm wheelhouse, and say what it weighs and how long that took.

The engine's own cache of layers is emptied of the last image before; wheels, base and uv's cache are warm.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voltforge.image import container_engine
from voltforge.image.stages import NAME, Runtime
from voltforge.pipeline.checkout import Settings
from voltforge.pipeline.pipeline import Pipeline
from voltforge.system import console, files
from voltforge.system.process import run


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runtime = Runtime(Pipeline.load(ROOT, Settings(torch="thin")))
    runtime.wheels()
    runtime.base.run()
    chosen = container_engine.choose()
    if runtime.image.record():
        for tag in runtime.image.result().tags[:1]:
            run([chosen.kind, "rmi", "--force", f"{NAME}:{tag}"], ok=(0, 1, 125))
    runtime.image.path.unlink(missing_ok=True)
    done = run([ROOT / "doit", "torch=thin", "image"], cwd=ROOT)
    kept = runtime.image.result()
    layers = [size for _, size in kept.compressed]
    whole = kept.base_size + sum(kept.layers.values())
    without = whole - kept.projects.get("nvidia-cudnn-cu12", 0)
    rows = [
        ("uncompressed", files.size(whole)),
        ("uncompressed with torch=source cudnn=0, calculated", files.size(without)),
        ("compressed", files.size(sum(layers))),
        ("layers", str(len(layers))),
        ("moved by an update of vLLM", files.size(sum(layers[-3:]))),
        ("time to put it together", f"{done.usage.wall:.0f} s"),
        ("CPU time", f"{done.usage.cpu:.0f} s"),
        ("peak memory, all processes", files.size(done.usage.peak)),
    ]
    console.table(Path(kept["path"]).name, ("", ""), rows)


if __name__ == "__main__":
    main()
