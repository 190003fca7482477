# /// script
# requires-python = ">=3.11"
# dependencies = ["tritonclient[grpc]==2.73.0"]
# ///
"""A stranger's client, in an environment of its own: its protobuf is older than ours.

uv run triton_client.py ADDRESS MODEL IMAGE
"""

import sys
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

address, model, path = sys.argv[1:]
client = InferenceServerClient(address)
if not (client.is_server_ready() and client.is_model_ready(model)):
    sys.exit("not ready")
metadata = client.get_model_metadata(model)
if metadata.inputs[0].datatype != "BYTES":
    sys.exit(f"unexpected metadata: {metadata}")
tensor = InferInput("image", [1], "BYTES")
tensor.set_data_from_numpy(np.array([Path(path).read_bytes()], dtype=object))
wanted = [InferRequestedOutput(name) for name in ("score", "label", "visualization")]
result = client.infer(model, [tensor], outputs=wanted)
if not bytes(result.as_numpy("visualization")[0]).startswith(b"\x89PNG"):
    sys.exit("no picture came back")
print(f"score={result.as_numpy('score')[0]:.4f} anomalous={result.as_numpy('label')[0]}")
