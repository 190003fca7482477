"""The bare model: decode, prepare, ONNX Runtime, in one process, a thread for each core.

python -m tests.bench.bare FOLDER SECONDS RATE prints {"rate", "latencies_ms"}; RATE 0 is a closed loop.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image
from vigil_common.bundle import open_bundle
from vigil_inference.bootstrap import cpus

from tests.bench.bench import arrivals

WARM_UP = 10


def main() -> None:
    """Entry point."""
    folder, seconds, rate = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    bundle = open_bundle((folder / "bundle.tar").read_bytes())
    images = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as name:
        bundle.extract(Path(name))
        model = Path(name) / bundle.manifest.artefacts["onnxruntime"].path
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    batch = bundle.manifest.fixed_batch or 1

    def judge(data: bytes) -> float:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 255
        tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        if batch > 1:
            tensor = np.repeat(tensor, batch, axis=0)
        return float(session.run(["pred_score"], {"input": tensor})[0].reshape(-1)[0])

    for image in images[:WARM_UP]:
        judge(image)
    threads = cpus()
    latencies: list[float] = []
    began = time.monotonic()

    def one_after_the_other(first: int) -> None:
        for index in itertools.count(first, threads):
            if time.monotonic() - began >= seconds:
                return
            judge(images[index % len(images)])
            latencies.append(0.0)

    def due(index: int, at: float) -> None:
        judge(images[index % len(images)])
        latencies.append((time.monotonic() - began - at) * 1000)

    with ThreadPoolExecutor(threads) as pool:
        if rate == 0:
            list(pool.map(one_after_the_other, range(threads)))
        else:
            for index, at in enumerate(arrivals(seconds, rate)):
                time.sleep(max(0.0, began + at - time.monotonic()))
                pool.submit(due, index, at)
    print(json.dumps({"rate": len(latencies) / (time.monotonic() - began), "latencies_ms": latencies}))


if __name__ == "__main__":
    main()
