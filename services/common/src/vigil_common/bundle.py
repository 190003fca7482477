"""The model bundle: a canonical tar whose SHA-256 is the model's identity.

Canonical means sorted names, zero times and owners, so that the same content has the same digest wherever it is packed.
Nothing is trusted: names, kinds, sizes, digest and manifest are checked before anything is shown, written or run.
`BundleCheck` does so while the bundle comes in, chunk by chunk, and holds no more of it than vigil.yaml; `open_bundle`
does so for a bundle in memory.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vigil_common.errors import InvalidBundle

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet
    from pathlib import Path

MANIFEST = "vigil.yaml"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_BUNDLE_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILES = 256

Runtime = Literal["onnxruntime", "openvino"]
Precision = Literal["f32", "bf16", "int8"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Artefact(_Strict):
    """What one runtime loads: its main file, and all files that belong to it."""

    path: str
    files: tuple[str, ...]


class ModelInput(_Strict):
    """The tensor that the graph takes; width and height are None where it takes any size."""

    name: str = "input"
    layout: Literal["NCHW"] = "NCHW"
    color: Literal["RGB"] = "RGB"
    value_range: tuple[float, float] = (0.0, 1.0)
    width: int | None = Field(default=None, ge=1, le=16384)
    height: int | None = Field(default=None, ge=1, le=16384)
    resize: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = True


class ModelOutputs(_Strict):
    """Names of the graph's outputs; only the score is required."""

    score: str
    label: str | None = None
    map: str | None = None
    mask: str | None = None


class ParitySample(_Strict):
    """An image in the bundle with the score that the model must give it."""

    image: str
    score: float
    tolerance: float = Field(default=1e-3, ge=0)


class Variant(_Strict):
    """The same model made over for speed; a worker takes it where it is the fastest and holds its own parity.

    Attributes:
        runtime: What loads it.
        artefact: Its files.
        precision: Of its arithmetic.
        threshold: Where its own scores part normal from anomalous. A worker moves its scores so that this comes to
            stand on the bundle's threshold (`vigil_common.scores.moved`).
        scores: What it says of the bundle's parity samples, in their order, once moved.
        tolerance: How far it may be off there.
    """

    runtime: Runtime
    artefact: Artefact
    precision: Precision
    threshold: float = Field(gt=0, lt=1)
    scores: tuple[float, ...]
    tolerance: float = Field(default=1e-3, ge=0)


class Manifest(_Strict):
    """vigil.yaml."""

    name: str
    task: Literal["anomaly-detection"] = "anomaly-detection"
    artefacts: dict[Runtime, Artefact] = Field(min_length=1)
    input: ModelInput = ModelInput()
    outputs: ModelOutputs
    threshold: float = Field(default=0.5, allow_inf_nan=False)
    fixed_batch: int | None = Field(default=None, ge=1, le=1024)
    parity: tuple[ParitySample, ...] = ()
    variants: dict[str, Variant] = Field(default_factory=dict)
    lineage: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("must be 1 to 63 lower-case letters, digits and dashes, and begin with a letter")
        return name

    @model_validator(mode="after")
    def _variants(self) -> Self:
        for name, variant in self.variants.items():
            if not NAME.fullmatch(name) or name in self.artefacts:
                raise ValueError(f"variant {name!r} needs a name of its own, of lower-case letters, digits and dashes")
            if len(variant.scores) != len(self.parity):
                raise ValueError(
                    f"variant {name} has {len(variant.scores)} scores for {len(self.parity)} parity samples"
                )
            if not 0 < self.threshold < 1:
                raise ValueError("a bundle with variants needs a threshold between 0 and 1")
        return self


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file's bytes stand in the tar."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What a bundle that passed every check is; `text` is vigil.yaml, `members` are all other files."""

    manifest: Manifest
    text: str
    members: Mapping[str, Member]
    digest: str
    size_bytes: int

    @property
    def formats(self) -> tuple[str, ...]:
        """Runtimes it has artefacts for."""
        return tuple(sorted(self.manifest.artefacts))


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that passed every check."""

    manifest: Manifest
    files: Mapping[str, bytes]
    digest: str

    def extract(self, folder: Path) -> None:
        """Write its files below the folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def digest(bundle: bytes) -> str:
    """The identity: "sha256:" and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(bundle).hexdigest()}"


def pack(manifest: Manifest, files: Mapping[str, bytes]) -> bytes:
    """Make a canonical bundle.

    Raises:
        InvalidBundle: As `open_bundle`: what would not open is not packed.
    """
    fields = manifest.model_dump(mode="json", exclude_none=True)
    if not manifest.variants:  # as before there were any, so that the same content keeps its digest
        del fields["variants"]
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    content = {**files, MANIFEST: text.encode()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(content):
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(content[name]))
    bundle = buffer.getvalue()
    open_bundle(bundle)
    return bundle


def read_manifest(bundle: bytes) -> Manifest:
    """The manifest of a bundle, after every check of `open_bundle`."""
    return open_bundle(bundle).manifest


def open_bundle(bundle: bytes, *, expected_digest: str | None = None, max_bytes: int = MAX_BUNDLE_BYTES) -> Bundle:
    """Check a bundle and give its content.

    Raises:
        InvalidBundle: DIGEST_MISMATCH, or as `BundleCheck`.
    """
    found = digest(bundle)
    if expected_digest is not None and found != expected_digest:
        raise InvalidBundle("DIGEST_MISMATCH", f"the bundle's digest is {found}, expected was {expected_digest}")
    layout = _Layout(max_bytes)
    layout.feed(memoryview(bundle))
    manifest = layout.finish()
    view = memoryview(bundle)
    files = {name: bytes(view[at.offset : at.offset + at.size]) for name, at in layout.members.items()}
    return Bundle(manifest, files, found)


class BundleCheck:
    """Checks a bundle as it comes.

    Args:
        max_bytes: More are refused.

    Raises:
        InvalidBundle: BUNDLE_TOO_LARGE, BUNDLE_CORRUPT, BUNDLE_PATH_OUTSIDE, BUNDLE_FILE_MISSING,
            BUNDLE_OUTPUT_MISSING or MANIFEST_INVALID; by `feed` as soon as it shows, by `finish` for the rest.
    """

    def __init__(self, max_bytes: int = MAX_BUNDLE_BYTES) -> None:
        self._layout = _Layout(max_bytes)
        self._hash = hashlib.sha256()

    def feed(self, chunk: bytes) -> None:
        """The next bytes, cut anywhere."""
        self._layout.feed(memoryview(chunk))
        self._hash.update(chunk)

    def finish(self) -> Checked:
        """What it is, now that all of it has come."""
        manifest = self._layout.finish()
        digest = f"sha256:{self._hash.hexdigest()}"
        return Checked(manifest, self._layout.text.decode(), self._layout.members, digest, self._layout.size_bytes)


class _Layout:
    """Follows the tar's headers; keeps the content of vigil.yaml alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._header = bytearray()
        self._left = 0  # of the member's content with its padding
        self._text_left = 0
        self._ended = False
        self.size_bytes = 0
        self.text = bytearray()
        self.members: dict[str, Member] = {}
        self._has_manifest = False

    def feed(self, view: memoryview) -> None:
        at = self.size_bytes
        self.size_bytes += len(view)
        if self.size_bytes > self._max_bytes:
            raise InvalidBundle(
                "BUNDLE_TOO_LARGE", f"the bundle has more than the {self._max_bytes} bytes that are taken"
            )
        while len(view):
            if self._ended:
                if bytes(view).strip(b"\0"):
                    raise InvalidBundle("BUNDLE_CORRUPT", "there is more behind the end of the tar; fetch it again")
                return
            if self._left:
                taken = view[: self._left]
                if self._text_left:
                    self.text += taken[: self._text_left]
                    self._text_left -= min(len(taken), self._text_left)
                self._left -= len(taken)
            else:
                taken = view[: tarfile.BLOCKSIZE - len(self._header)]
                self._header += taken
                if len(self._header) == tarfile.BLOCKSIZE:
                    self._begin(bytes(self._header), at + len(taken))
                    self._header.clear()
            view = view[len(taken) :]
            at += len(taken)

    def _begin(self, block: bytes, offset: int) -> None:
        """Read a member's header; its content stands at the offset."""
        if not any(block):
            self._ended = True
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise InvalidBundle("BUNDLE_CORRUPT", f"the bundle is no readable tar ({error}); fetch it again") from error
        known = self.members.keys() | ({MANIFEST} if self._has_manifest else set())
        _check_member(member, known)
        self._left = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.name == MANIFEST:
            self._has_manifest, self._text_left = True, member.size
        else:
            self.members[member.name] = Member(offset, member.size)

    def finish(self) -> Manifest:
        if not self._ended:
            raise InvalidBundle("BUNDLE_CORRUPT", "the bundle ends early or is no tar; fetch it again")
        names = {*self.members, MANIFEST}
        for name in names:
            if both := next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in names), None):
                raise InvalidBundle("BUNDLE_CORRUPT", f"{both!r} is a file and the folder of {name!r}")
        manifest = _manifest(bytes(self.text) if self._has_manifest else None)
        artefacts = [*manifest.artefacts.values(), *(variant.artefact for variant in manifest.variants.values())]
        named = {name for artefact in artefacts for name in (artefact.path, *artefact.files)}
        named |= {sample.image for sample in manifest.parity}
        if missing := sorted(named - self.members.keys()):
            text = f"{MANIFEST} names {', '.join(missing)}, which is not in the bundle"
            raise InvalidBundle("BUNDLE_FILE_MISSING", text)
        return manifest


def _check_member(member: tarfile.TarInfo, known: AbstractSet[str]) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise InvalidBundle("BUNDLE_PATH_OUTSIDE", f"{member.name!r} points outside the bundle")
    # A sparse file of a few bytes unfolds to any size.
    if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or member.issparse():
        raise InvalidBundle("BUNDLE_PATH_OUTSIDE", f"{member.name!r} is no plain file; links and devices are refused")
    if str(path) != member.name or member.name in known or member.size < 0:
        raise InvalidBundle("BUNDLE_CORRUPT", f"{member.name!r} stands twice or is not written plainly")
    if len(known) >= MAX_FILES:
        raise InvalidBundle("BUNDLE_TOO_LARGE", f"a bundle holds at most {MAX_FILES} files")
    if member.name == MANIFEST and member.size > MAX_MANIFEST_BYTES:
        raise InvalidBundle("BUNDLE_TOO_LARGE", f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")


def _manifest(text: bytes | None) -> Manifest:
    if text is None:
        raise InvalidBundle("BUNDLE_FILE_MISSING", f"the bundle has no {MANIFEST}")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that are none
        raise InvalidBundle("MANIFEST_INVALID", f"{MANIFEST} is no YAML: {error}") from error
    outputs = content.get("outputs") if isinstance(content, dict) else None
    if isinstance(outputs, dict) and not outputs.get("score"):
        raise InvalidBundle("BUNDLE_OUTPUT_MISSING", f"{MANIFEST} names no output for the score")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or MANIFEST
        raise InvalidBundle("MANIFEST_INVALID", f"{MANIFEST}: {where}: {first['msg']}") from error
