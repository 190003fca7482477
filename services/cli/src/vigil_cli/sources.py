"""Images from folders, globs, files, videos and cameras."""

from __future__ import annotations

import asyncio
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from vigil_common.store.labels import MAX_VALUE_BYTES, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".mjpeg", ".mjpg", ".m4v"})
_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "udp://")
_JPEG_QUALITY = 95
# The label by which a stored frame leads back to its file.
SOURCE = "source"


class SourceError(ValueError):
    """Nothing can be read from there; the message says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the paths given amount to.

    Attributes:
        images: Image files, sorted within each path.
        streams: Videos and camera URLs, read after the images.
        left_out: How many files of folders and globs are no images by their names.
    """

    images: tuple[Path, ...]
    streams: tuple[str, ...]
    left_out: int = 0

    @property
    def total(self) -> int | None:
        """How many images there are; None where a video or camera decides."""
        return None if self.streams else len(self.images)

    async def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        """Name and encoded image, one after another."""
        for path in self.images:
            yield str(path), await asyncio.to_thread(path.read_bytes)
        for url in self.streams:
            async for number, image in _video(url):
                yield f"{url}#{number}", image


def source_label(name: str) -> str:
    """A file's name as a label may hold it, which takes ASCII alone."""
    label = quote(os.fsencode(name), safe="/#")
    while (excess := len(encode(label)) - MAX_VALUE_BYTES) > 0:
        label = label[-(-excess // 3) :]  # no sign takes more in the store; a file's end tells more than its beginning
    return label


def find_images(folder: Path) -> list[Path]:
    """Every image below a folder, sorted."""
    return _images(_files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _matching(pattern: str) -> list[Path]:
    found = (Path(match) for match in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute, too
    return sorted(path for path in found if path.is_file())


def _images(files: Sequence[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def open_source(paths: Sequence[str]) -> Source:
    """Sort out what each path is.

    Raises:
        SourceError: Where a path is nothing, or holds no image.
    """
    images: list[Path] = []
    streams: list[str] = []
    left_out = 0
    for text in paths:
        path = Path(text)
        if text.startswith(_SCHEMES):
            streams.append(text)
        elif path.is_file():
            if path.suffix.lower() in VIDEO_SUFFIXES:
                streams.append(text)
            else:
                images.append(path)
        elif path.is_dir() or glob.has_magic(text):
            files = _files(path) if path.is_dir() else _matching(text)
            found = _images(files)
            if not found:
                raise SourceError(f"no image in {text}")
            images += found
            left_out += len(files) - len(found)
        else:
            raise SourceError(f"there is no {text}")
    return Source(tuple(images), tuple(streams), left_out)


async def _video(url: str) -> AsyncIterator[tuple[int, bytes]]:
    try:
        import cv2  # noqa: PLC0415 - heavy, and only in the video extra
    except ImportError as error:
        raise SourceError("videos and cameras need OpenCV: install vigil-cli[video]") from error
    capture = await asyncio.to_thread(cv2.VideoCapture, url)
    try:
        if not capture.isOpened():
            raise SourceError(f"OpenCV can't open {url}")
        number = 0
        while True:
            there, pixels = await asyncio.to_thread(capture.read)
            if not there:
                return
            encoded, image = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            if encoded:
                yield number, image.tobytes()
            number += 1
    finally:
        capture.release()
