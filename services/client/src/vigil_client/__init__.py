"""Vigil client library: stream images, get verdicts, survive lost connections.

async with VigilClient("localhost:50051") as client:
    async for result in client.stream(frames):
        print(result.frame_id, result.verdict or result.error)
"""

from vigil_client.client import VigilClient
from vigil_client.routes import RouteClient
from vigil_client.storage import StorageClient
from vigil_client.types import (
    Annotation,
    Failure,
    Frame,
    HumanLabel,
    Model,
    Result,
    ReviewedFrame,
    ReviewItem,
    Route,
    ServiceError,
    SettingError,
    StoredFrame,
    Verdict,
    Visualization,
    WaitFor,
    new_frame_id,
)

__all__ = [
    "Annotation",
    "Failure",
    "Frame",
    "HumanLabel",
    "Model",
    "Result",
    "ReviewItem",
    "ReviewedFrame",
    "Route",
    "RouteClient",
    "ServiceError",
    "SettingError",
    "StorageClient",
    "StoredFrame",
    "Verdict",
    "VigilClient",
    "Visualization",
    "WaitFor",
    "new_frame_id",
]
