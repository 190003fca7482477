"""Bare reduct-py: the same images and as many labels, in batches of 32, each of one entry, its faster way.

python -m tests.bench.bare_store FOLDER URL COUNT
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from reduct import Client, RecordBatch
from vigil_common.store.reduct import frame_settings

BATCH = 32
LABELS = 18
# As storage's own bucket has them.
SETTINGS = frame_settings()


async def main() -> None:
    """Entry point."""
    folder, url, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    images = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    now_us = int(time.time() * 1e6)
    labels = {f"label{index}": "0123456789abcdef" for index in range(LABELS)}
    async with Client(url) as client:
        bucket = await client.create_bucket("bench-bare", SETTINGS, exist_ok=True)
        for start in range(0, count, BATCH):
            batch = RecordBatch()
            for index in range(start, min(start + BATCH, count)):
                image = images[index % len(images)]
                batch.add(f"c{start // BATCH % 4}", now_us + index, image, content_type="image/png", labels=labels)
            errors = await bucket.write_record_batch(batch)
            if errors:
                raise RuntimeError(str(errors))


if __name__ == "__main__":
    asyncio.run(main())
