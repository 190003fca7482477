from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from vigil_common.bundle import (
    MANIFEST,
    Artefact,
    BundleCheck,
    Manifest,
    ModelOutputs,
    ParitySample,
    digest,
    open_bundle,
    pack,
    read_manifest,
)
from vigil_common.errors import InvalidBundle

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MODEL = "onnx/model.onnx"
OUTSIDE, CORRUPT = "BUNDLE_PATH_OUTSIDE", "BUNDLE_CORRUPT"


def manifest(name: str = "cells") -> Manifest:
    return Manifest(
        name=name,
        artefacts={"onnxruntime": Artefact(path=MODEL, files=(MODEL,))},
        outputs=ModelOutputs(score="pred_score"),
        parity=(ParitySample(image="parity/0.png", score=0.25, tolerance=1e-4),),
        lineage={"trainer": "test"},
    )


FILES = {MODEL: b"graph", "parity/0.png": b"picture"}


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def valid_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    text = yaml.safe_dump(manifest().model_dump(mode="json", exclude_none=True)).encode()
    return [member(name, content) for name, content in {**FILES, MANIFEST: text}.items()]


def with_manifest(text: bytes) -> bytes:
    return tar([*(member(name, content) for name, content in FILES.items()), member(MANIFEST, text)])


def refusal(bundle: bytes, *, expected_digest: str | None = None) -> str:
    with pytest.raises(InvalidBundle) as caught:
        open_bundle(bundle, expected_digest=expected_digest)
    assert caught.value.message
    return caught.value.reason


names = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)


@given(
    name=names,
    files=st.dictionaries(names.map("data/{}".format), st.binary(max_size=2000), max_size=6),
    model=st.binary(max_size=2000),
    score=st.floats(0, 1),
)
def test_what_is_packed_opens_as_it_was_and_has_one_digest(
    name: str, files: dict[str, bytes], model: bytes, score: float
) -> None:
    wanted = manifest(name).model_copy(update={"parity": (ParitySample(image=MODEL, score=score),)})
    content = {MODEL: model, **files}
    bundle = pack(wanted, content)
    opened = open_bundle(bundle, expected_digest=digest(bundle))
    assert opened.manifest == read_manifest(bundle) == wanted
    assert opened.files == content
    assert pack(opened.manifest, dict(reversed(content.items()))) == bundle


@given(cuts=st.lists(st.integers(1, 4000), max_size=30))
def test_a_bundle_is_checked_alike_however_it_is_cut(cuts: list[int]) -> None:
    bundle = pack(manifest(), {**FILES, "big": bytes(range(256)) * 20})
    check, at = BundleCheck(), 0
    for size in [*cuts, len(bundle)]:
        check.feed(bundle[at : at + size])
        at += size
    found = check.finish()
    assert (found.digest, found.size_bytes, found.manifest) == (digest(bundle), len(bundle), manifest())
    assert found.formats == ("onnxruntime",)
    assert yaml.safe_load(found.text)["name"] == "cells"
    assert {name: bundle[at.offset : at.offset + at.size] for name, at in found.members.items()} == {
        **FILES,
        "big": bytes(range(256)) * 20,
    }


def test_what_stands_behind_the_end_is_refused() -> None:
    assert refusal(pack(manifest(), FILES) + b"more") == CORRUPT


def test_a_bundle_that_ends_between_two_files_is_refused() -> None:
    bundle = pack(manifest(), FILES)
    assert refusal(bundle[: len(bundle.rstrip(b"\0")) // 512 * 512 + 512]) == CORRUPT


def test_the_tar_says_nothing_of_when_or_by_whom_it_was_made() -> None:
    with tarfile.open(fileobj=io.BytesIO(pack(manifest(), FILES))) as archive:
        members = archive.getmembers()
    assert [info.name for info in members] == sorted([*FILES, MANIFEST])
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in members} == {(0, 0, 0, "", "")}


def test_extraction_writes_every_file_below_the_folder(tmp_path: Path) -> None:
    open_bundle(pack(manifest(), FILES)).extract(tmp_path / "model")
    found = {str(path.relative_to(tmp_path / "model")): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES


def test_another_digest_is_refused() -> None:
    bundle = pack(manifest(), FILES)
    assert refusal(bundle, expected_digest=digest(bundle + b"x")) == "DIGEST_MISMATCH"


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (member("../outside", b"x"), OUTSIDE),
        (member("a/../../outside", b"x"), OUTSIDE),
        (member("/etc/outside", b"x"), OUTSIDE),
        (member("..\\outside", b"x"), OUTSIDE),
        (member("link", kind=tarfile.SYMTYPE, link="/etc/passwd"), OUTSIDE),
        (member("link", kind=tarfile.LNKTYPE, link=MODEL), OUTSIDE),
        (member("device", kind=tarfile.CHRTYPE), OUTSIDE),
        (member("pipe", kind=tarfile.FIFOTYPE), OUTSIDE),
        (member("sparse", kind=tarfile.GNUTYPE_SPARSE), OUTSIDE),
        (member(MODEL, b"another"), CORRUPT),
        (member("onnx", b"a file where others have a folder"), CORRUPT),
        (member("./plain", b"x"), CORRUPT),
    ],
)
def test_a_hostile_member_is_refused(hostile: tuple[tarfile.TarInfo, bytes], reason: str) -> None:
    assert refusal(tar([*valid_members(), hostile])) == reason


def test_a_sparse_member_is_refused_before_it_grows() -> None:
    info, _ = member("sparse", b"")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40)}
    info.pax_headers["GNU.sparse.map"] = f"{1 << 40},0"
    assert refusal(tar([*valid_members(), (info, b"")])) == OUTSIDE


@pytest.mark.parametrize("cut", [1, 700, 1500])
def test_a_bundle_cut_short_is_refused(cut: int) -> None:
    assert refusal(pack(manifest(), FILES)[:cut]) in {CORRUPT, "BUNDLE_FILE_MISSING"}


def test_what_is_no_tar_is_refused() -> None:
    assert refusal(b"no tar at all" * 100) == CORRUPT


@given(st.binary(max_size=3000))
def test_any_bytes_are_opened_or_refused_and_nothing_else(data: bytes) -> None:
    assert refusal(data)


@given(st.data())
def test_a_damaged_bundle_is_opened_or_refused_and_nothing_else(data: st.DataObject) -> None:
    bundle = bytearray(pack(manifest(), FILES))
    bundle[data.draw(st.integers(0, len(bundle) - 1))] = data.draw(st.integers(0, 255))
    try:
        open_bundle(bytes(bundle))
    except InvalidBundle as error:
        assert error.reason  # noqa: PT017 - either outcome is right


def test_a_file_that_the_manifest_names_must_be_there() -> None:
    with pytest.raises(InvalidBundle, match=r"parity/0\.png") as caught:
        pack(manifest(), {MODEL: b"graph"})
    assert caught.value.reason == "BUNDLE_FILE_MISSING"


def test_a_bundle_without_a_manifest_is_refused() -> None:
    assert refusal(tar([member(MODEL, b"graph")])) == "BUNDLE_FILE_MISSING"


def test_a_manifest_without_a_score_is_refused() -> None:
    content = manifest().model_dump(mode="json", exclude_none=True)
    content["outputs"] = {"map": "anomaly_map"}
    assert refusal(with_manifest(yaml.safe_dump(content).encode())) == "BUNDLE_OUTPUT_MISSING"


@pytest.mark.parametrize(
    "change",
    [{"name": "Cells"}, {"name": "a" * 64}, {"name": "cells-"}, {"unknown": 1}, {"fixed_batch": 0}, {"artefacts": {}}],
)
def test_a_manifest_that_breaks_a_rule_is_refused(change: dict[str, object]) -> None:
    content = {**manifest().model_dump(mode="json", exclude_none=True), **change}
    assert refusal(with_manifest(yaml.safe_dump(content).encode())) == "MANIFEST_INVALID"


@pytest.mark.parametrize("text", [b"a: [", b"\xff\xfe", b"just words", b"", b"!!python/object:os.system {}"])
def test_a_manifest_that_is_no_yaml_mapping_is_refused(text: bytes) -> None:
    assert refusal(with_manifest(text)) == "MANIFEST_INVALID"


def test_limits_hold_for_bytes_files_and_the_manifest() -> None:
    bundle = pack(manifest(), FILES)
    with pytest.raises(InvalidBundle) as caught:
        open_bundle(bundle, max_bytes=len(bundle) - 1)
    assert caught.value.reason == "BUNDLE_TOO_LARGE"
    assert refusal(tar(member(f"file{index}") for index in range(300))) == "BUNDLE_TOO_LARGE"
    assert refusal(with_manifest(b"#" * (2 << 20))) == "BUNDLE_TOO_LARGE"


@pytest.mark.parametrize("threshold", [".nan", ".inf"])
def test_a_threshold_that_is_no_number_is_refused(threshold: str) -> None:
    """Nothing is over it, so every image would be normal."""
    text = yaml.safe_dump(manifest().model_dump(mode="json", exclude_none=True))
    assert (
        refusal(with_manifest(text.replace("threshold: 0.5", f"threshold: {threshold}").encode())) == "MANIFEST_INVALID"
    )
