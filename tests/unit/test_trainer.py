from __future__ import annotations

import io
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from vigil_common.bundle import Bundle, open_bundle, pack
from vigil_common.errors import InvalidBundle, InvalidInput
from vigil_inference.model import LoadedModel
from vigil_trainer import TrainResult, import_export, train
from vigil_trainer.features import line_kernels, shifted

from tests.support.cells import load_cells

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

OUTPUTS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")


@lru_cache(maxsize=1)
def trained() -> TrainResult:
    return train(load_cells().train, name="cells")


def tensor(image: bytes) -> NDArray[np.float32]:
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None] / np.float32(255))


def session(bundle: Bundle) -> Any:
    return onnxruntime.InferenceSession(
        bundle.files[bundle.manifest.artefacts["onnxruntime"].path], providers=["CPUExecutionProvider"]
    )


def scores(model: Any, images: list[bytes]) -> NDArray[np.float32]:
    return np.array([model.run(["pred_score"], {"input": tensor(image)})[0][0] for image in images])


def test_cells_are_told_apart_and_fitting_is_quick() -> None:
    began = time.process_time()
    model = session(open_bundle(trained().bundle))
    cpu_s = time.process_time() - began
    cells = load_cells()
    normal, defective = scores(model, cells.normal), scores(model, cells.defective)
    difference = defective[:, None] - normal[None]
    assert (difference > 0).mean() + (difference == 0).mean() / 2 >= 0.92
    assert (normal >= 0.5).mean() <= 0.1
    assert cpu_s <= 20
    assert trained().auroc is None


def test_the_graph_keeps_the_contract_of_anomalib_for_any_size_and_batch() -> None:
    model = session(open_bundle(trained().bundle))
    batch = np.random.default_rng(0).random((3, 3, 90, 170), dtype=np.float32)
    score, label, picture, mask = model.run(list(OUTPUTS), {"input": batch})
    assert (score.shape, score.dtype, label.shape, label.dtype) == ((3,), np.float32, (3,), np.bool_)
    assert (picture.shape, picture.dtype) == ((3, 1, 128, 128), np.float32)
    assert (mask.shape, mask.dtype) == ((3, 1, 128, 128), np.bool_)
    assert score.min() >= 0
    assert score.max() <= 1
    assert (label == (score >= 0.5)).all()
    assert (mask == (picture >= 0.5)).all()
    alone = [model.run(["pred_score"], {"input": batch[i : i + 1]})[0][0] for i in range(3)]
    assert score == pytest.approx(alone, abs=1e-5)


def test_kernels_side_by_side_find_what_they_find_one_by_one() -> None:
    kernels = line_kernels()
    size = kernels.shape[-1]
    pixels = np.random.default_rng(0).random((size + 5, size + 5), dtype=np.float32)
    one_by_one = np.einsum("yxij,kij->kyx", sliding_window_view(pixels, (size, size)), kernels[:, 0])
    wide = sliding_window_view(pixels, (size + 1, size + 1))[::2, ::2]
    found = np.einsum("yxij,kij->kyx", wide, shifted(kernels, 2)[:, 0])
    places = found.reshape(2, 2, len(kernels), 3, 3)
    for y in range(2):
        for x in range(2):
            assert places[y, x] == pytest.approx(one_by_one[:, y::2, x::2], abs=1e-5)


def test_parity_samples_score_as_the_bundle_says() -> None:
    bundle = open_bundle(trained().bundle)
    assert len(bundle.manifest.parity) == 4
    found = scores(session(bundle), [bundle.files[sample.image] for sample in bundle.manifest.parity])
    assert found == pytest.approx([sample.score for sample in bundle.manifest.parity], abs=1e-5)


def test_the_same_images_give_the_same_bundle() -> None:
    images = load_cells().train[:12]
    assert train(images, name="cells").bundle == train(images, name="cells").bundle


def test_abnormal_images_set_the_threshold_and_are_measured() -> None:
    cells = load_cells()
    seen: list[tuple[int, int]] = []
    result = train(cells.train[:60], cells.defective[:20], name="cells", progress=lambda *at: seen.append(at), parity=2)
    assert result.auroc is not None
    assert result.auroc > 0.8
    assert seen == [(done, 80) for done in range(1, 81)]
    bundle = open_bundle(result.bundle)
    assert len(bundle.manifest.parity) == 2
    found = scores(session(bundle), cells.defective[:20])
    assert (found >= 0.5).mean() > 0.5


def test_an_image_given_twice_is_not_measured_by_what_learned_it() -> None:
    cells = load_cells()
    normal, abnormal = cells.train[:21], cells.defective[:20]
    once, twice = (train(images, abnormal, name="cells", parity=0) for images in (normal, normal * 2))
    assert once.auroc is not None
    assert once.auroc < 0.99
    assert twice.auroc == pytest.approx(once.auroc, abs=0.02)
    with pytest.raises(InvalidInput, match="only 3 do"):
        train(normal[:3] * 2, name="cells")


def test_the_image_whose_score_is_the_threshold_is_called_anomalous_by_the_graph_too() -> None:
    cells, chance = load_cells(), np.random.default_rng(0)
    for _ in range(2):
        normal = [cells.train[place] for place in chance.choice(len(cells.train), 30, replace=False)]
        abnormal = [cells.defective[place] for place in chance.choice(len(cells.defective), 8, replace=False)]
        found = scores(session(open_bundle(train(normal, abnormal, name="cells", parity=0).bundle)), abnormal)
        assert not ((found < 0.5) & (found > 0.5 - 1e-5)).any()


def scratched(image: bytes) -> tuple[bytes, bytes]:
    """A cell with a bright patch, and its mask."""
    pixels = np.array(Image.open(io.BytesIO(image)).convert("L"))
    mask = np.zeros_like(pixels)
    mask[100:160, 120:200] = 255
    pixels[mask > 0] = 255
    files = []
    for picture in (pixels, mask):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    return files[0], files[1]


def test_masks_measure_the_maps_and_must_fit_their_images() -> None:
    cells = load_cells()
    patched = [scratched(image) for image in cells.normal[:4]]
    abnormal, masks = [image for image, _ in patched], {index: mask for index, (_, mask) in enumerate(patched)}
    result = train(cells.train[:40], abnormal, name="cells", masks=masks)
    assert result.f1 == 1.0
    assert result.pixel_auroc is not None
    assert result.pixel_auroc > 0.9
    assert result.pro is not None
    assert result.pro > 0.5
    lineage = open_bundle(result.bundle).manifest.lineage
    assert lineage["metrics"]["pixel_auroc"] == result.pixel_auroc
    small = io.BytesIO()
    Image.new("L", (10, 10)).save(small, "PNG")
    with pytest.raises(InvalidInput) as mismatch:
        train(cells.train[:10], abnormal, name="cells", masks={0: small.getvalue()})
    assert mismatch.value.reason == "MASK_SIZE_MISMATCH"


def test_files_and_colour_and_deep_grey_are_read(tmp_path: Path) -> None:
    paths = []
    for index in range(4):
        path = tmp_path / f"{index}.png"
        noise = np.random.default_rng(index).integers(0, 65536, (40, 50))
        if index % 2:
            Image.fromarray(noise.astype(np.uint16)).save(path)
        else:
            Image.fromarray((noise[..., None] // 257).astype(np.uint8).repeat(3, axis=2)).save(path)
        paths.append(path)
    assert open_bundle(train(paths, name="noise").bundle).manifest.name == "noise"


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        train(load_cells().train[:3], name="cells")
    assert caught.value.reason == "TOO_FEW_IMAGES"


def export(
    path: Path, *, batch: int | str = "batch", outputs: tuple[str, ...] = OUTPUTS[:2], external: bool = False
) -> Path:
    """A graph whose score is the mean of the image, with the names that Anomalib gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("Conv", ["input", "third"], ["grey"]),
        helper.make_node("GlobalAveragePool", ["grey"], ["mean"]),
        helper.make_node("Flatten", ["mean"], [outputs[0]]),
    ]
    infos = [helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, [batch, 1])]
    if len(outputs) > 1:
        nodes.append(helper.make_node("GreaterOrEqual", [outputs[0], "half"], [outputs[1]]))
        infos.append(helper.make_tensor_value_info(outputs[1], TensorProto.BOOL, [batch, 1]))
    constants = {"third": np.full((1, 3, 1, 1), 1 / 3, np.float32), "half": np.float32(0.5)}
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, "height", "width"])
    graph = helper.make_graph(
        nodes, "export", [image], infos, [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    where = f"{path.name}.data" if external else None
    onnx.save_model(model, str(path), save_as_external_data=external, location=where, size_threshold=0)
    return path


def picture(folder: Path, level: int) -> Path:
    path = folder / f"{level}.png"
    Image.new("L", (20, 10), level).save(path)
    return path


@pytest.mark.parametrize("batch", [1, 2])
def test_an_export_is_described_by_its_graph_and_scored(tmp_path: Path, batch: int) -> None:
    path = export(tmp_path / "elpv" / "onnx" / "model.onnx", batch=batch, external=True)
    images = [picture(tmp_path, 51), picture(tmp_path, 204)]
    bundle = open_bundle(import_export(path.parents[1], name="cells", parity_images=images))
    manifest = bundle.manifest
    assert manifest.fixed_batch == batch
    assert (manifest.input.name, manifest.input.width, manifest.input.height) == ("input", None, None)
    assert (manifest.outputs.score, manifest.outputs.label) == ("pred_score", "pred_label")
    assert (manifest.outputs.map, manifest.outputs.mask) == (None, None)
    assert manifest.artefacts["onnxruntime"].files == ("onnx/model.onnx", "onnx/model.onnx.data")
    assert [sample.score for sample in manifest.parity] == pytest.approx([0.2, 0.8], abs=1e-5)


def test_parity_images_are_read_as_the_service_reads_them(tmp_path: Path) -> None:
    path = export(tmp_path / "model.onnx")
    deep, turned = tmp_path / "deep.png", tmp_path / "turned.jpg"
    Image.fromarray(np.full((10, 20), 26214, np.uint16)).save(deep)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((20, 10)).save(turned, exif=exif)
    bundle = open_bundle(import_export(path, name="cells", parity_images=[deep, turned]))
    samples = bundle.manifest.parity
    assert samples[0].score == pytest.approx(0.4, abs=1e-5)
    model = LoadedModel(pack(bundle.manifest, bundle.files), tmp_path / "loaded", engine="onnxruntime")
    assert all(sample.passed for sample in model.parity)


def test_a_cut_training_image_is_named_as_such() -> None:
    images = load_cells().train[:4]
    with pytest.raises(InvalidInput) as caught:
        train([*images, images[0][:5000]], name="cells")
    assert caught.value.reason == "IMAGE_TRUNCATED"


def test_an_export_names_itself_and_gets_parity_images_where_none_are_given(tmp_path: Path) -> None:
    path = export(tmp_path / "Hazel Nuts" / "latest" / "weights" / "onnx" / "model.onnx")
    model = onnx.load(str(path))
    model.producer_name, model.producer_version = "pytorch", "2.14"
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "namespace", ": anomalib.models.image.stfpm.lightning_model.Stfpm/model: other"
    onnx.save_model(model, str(path))
    bundle = open_bundle(import_export(tmp_path / "Hazel Nuts", tolerance=0.01, lineage={"note": "x"}))
    assert bundle.manifest.name == "hazel-nuts"
    said = bundle.manifest.lineage
    assert (said["algorithm"], said["exporter"], said["opset"], said["note"]) == ("stfpm", "pytorch 2.14", 18, "x")
    assert [sample.tolerance for sample in bundle.manifest.parity] == [0.01, 0.01]
    loaded = LoadedModel(pack(bundle.manifest, bundle.files), tmp_path / "loaded", engine="onnxruntime")
    assert all(sample.passed for sample in loaded.parity)


def imported_from(path: Path) -> str:
    return str(open_bundle(import_export(path, name="cells")).manifest.lineage["imported_from"])


def test_of_several_trainings_the_latest_is_taken_and_named(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for number in (10, 9, 0):
        export(results / f"v{number}" / "weights" / "onnx" / "model.onnx")
    assert imported_from(results) == "results/v10"
    (results / "latest").symlink_to("v9")
    assert imported_from(results) == "results/v9"
    assert imported_from(results / "latest") == "v9"
    assert imported_from(results / "v0" / "weights" / "onnx" / "model.onnx") == "model.onnx"


def test_of_several_models_none_is_taken_before_one_is_named(tmp_path: Path) -> None:
    for name in ("Stfpm", "Padim"):
        export(tmp_path / name / "cells" / "v0" / "weights" / "onnx" / "model.onnx")
    with pytest.raises(InvalidBundle, match=r"several models: name one of .*/Padim/cells/v0, .*/Stfpm/cells/v0"):
        imported_from(tmp_path)
    assert imported_from(tmp_path / "Padim") == "Padim/cells/v0"


def test_both_files_are_of_one_training(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    for number in (0, 1):
        path = export(tmp_path / f"v{number}" / "weights" / "onnx" / "model.onnx")
        if number == 0:
            folder = path.parents[1] / "openvino"
            folder.mkdir()
            openvino.save_model(openvino.convert_model(str(path)), str(folder / "model.xml"))
    assert set(open_bundle(import_export(tmp_path / "v0", name="cells")).manifest.artefacts) == {
        "onnxruntime",
        "openvino",
    }
    assert set(open_bundle(import_export(tmp_path, name="cells")).manifest.artefacts) == {"onnxruntime"}


def test_runtimes_that_disagree_are_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "nuts" / "model.onnx")
    other = onnx.load(str(path))
    third = next(one for one in other.graph.initializer if one.name == "third")
    third.CopyFrom(numpy_helper.from_array(np.full((1, 3, 1, 1), 0.2, np.float32), "third"))
    onnx.save_model(other, str(tmp_path / "other.onnx"))
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(str(tmp_path / "other.onnx")), str(tmp_path / "nuts" / "model.xml"))
    assert refusal(tmp_path / "nuts") == "PARITY_FAILED"
    assert open_bundle(import_export(tmp_path / "nuts", tolerance=1)).manifest.name == "nuts"


def test_a_single_file_with_any_batch_is_taken(tmp_path: Path) -> None:
    path = export(tmp_path / "model.onnx", outputs=("pred_score",))
    manifest = open_bundle(import_export(path, name="cells", parity_images=[])).manifest
    assert manifest.fixed_batch is None
    assert manifest.outputs.label is None
    assert list(manifest.artefacts) == ["onnxruntime"]


def refusal(path: Path) -> str:
    with pytest.raises(InvalidBundle) as caught:
        import_export(path, name="cells", parity_images=[])
    return caught.value.reason


def test_an_export_without_a_score_is_refused(tmp_path: Path) -> None:
    assert refusal(export(tmp_path / "model.onnx", outputs=("output",))) == "BUNDLE_OUTPUT_MISSING"


def test_an_export_without_its_weights_is_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "model.onnx", external=True)
    path.with_name("model.onnx.data").unlink()
    assert refusal(path) == "BUNDLE_FILE_MISSING"


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "EXPORT_NOT_FOUND"
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no model")
    assert refusal(broken) == "EXPORT_UNREADABLE"


Shape = list[int | str | None]


def graph_export(
    folder: Path,
    *nodes: onnx.NodeProto,
    kind: int = TensorProto.FLOAT,
    shape: Shape | None = None,
    listed: bool = False,
    **constants: object,
) -> onnx.ModelProto:
    """A graph that takes an image of this type and shape; its weights stand among its inputs where they are listed."""
    weights = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    image = helper.make_tensor_value_info("input", kind, shape or ["batch", 3, "height", "width"])
    inputs = [image, *(helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in weights if listed)]
    output = helper.make_tensor_value_info("pred_score", TensorProto.FLOAT, ["batch"])
    graph = helper.make_graph(nodes, "export", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(folder / "model.onnx"))
    return model


def mean_of(name: str) -> onnx.NodeProto:
    return helper.make_node("ReduceMean", [name], ["pred_score"], axes=[1, 2, 3], keepdims=0)


def node(kind: str, inputs: list[str], output: str, **said: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **said)


def serves(bundle: bytes, folder: Path) -> bool:
    """Whether a worker loads it and finds its parity."""
    parity = LoadedModel(bundle, folder, engine="onnxruntime").parity
    return bool(parity) and all(sample.passed for sample in parity)


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    graph_export(
        tmp_path, node("Sub", ["input", "input"], "zero"), node("Div", ["zero", "zero"], "nan"), mean_of("nan")
    )
    with pytest.raises(InvalidBundle, match="gives nan as the score of image 0 on onnxruntime") as caught:
        import_export(tmp_path, name="cells")
    assert caught.value.reason == "SCORE_NOT_FINITE"


@pytest.mark.parametrize(("factor", "said"), [(255.0, "gives 51 as"), (-1.0, "gives -0.2 as")])
def test_a_score_outside_of_0_to_1_is_refused_and_told(tmp_path: Path, factor: float, said: str) -> None:
    graph_export(tmp_path / "export", node("Mul", ["input", "factor"], "more"), mean_of("more"), factor=factor)
    with pytest.raises(InvalidBundle, match=f"{said} the score of image 0") as caught:
        import_export(tmp_path / "export", name="cells", parity_images=[picture(tmp_path, 51)])
    assert caught.value.reason == "SCORE_OUT_OF_RANGE"


def test_a_score_of_one_that_a_sum_rounded_up_is_taken(tmp_path: Path) -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    nodes = (
        node("Mul", ["input", "none"], "zero"),
        node("Add", ["zero", "above"], "all"),
        node("ReduceMax", ["all"], "m"),
    )
    graph_export(tmp_path, *nodes, mean_of("m"), none=0, above=above)
    assert open_bundle(import_export(tmp_path, name="cells")).manifest.parity[0].score == above


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        (TensorProto.FLOAT, ["batch", 224, 224, 3], r"input: float \[\?, 224, 224, 3\]"),
        (TensorProto.FLOAT, ["batch", 1, 64, 64], r"input: float \[\?, 1, 64, 64\]"),
        (TensorProto.UINT8, ["batch", 3, 64, 64], r"input: uint8 \[\?, 3, 64, 64\]"),
        (TensorProto.FLOAT16, [1, 3, 64, 64], r"input: float16 \[1, 3, 64, 64\]"),
        (TensorProto.FLOAT, ["batch", 3], r"input: float \[\?, 3\]"),
    ],
)
def test_an_input_that_is_no_such_image_is_refused_and_told_what_it_must_be(
    tmp_path: Path, kind: int, shape: Shape, said: str
) -> None:
    cast = node("Cast", ["input"], "floats", to=TensorProto.FLOAT)
    graph_export(tmp_path, cast, node("ReduceMean", ["floats"], "pred_score", keepdims=0), kind=kind, shape=shape)
    with pytest.raises(
        InvalidBundle, match=rf"{said}; it must take an image tensor \[N, 3, height, width\] of 32-bit"
    ) as caught:
        import_export(tmp_path, name="cells")
    assert caught.value.reason == "EXPORT_UNREADABLE"


def test_an_input_that_only_a_run_shows_to_be_no_such_image_is_refused(tmp_path: Path) -> None:
    grey = node("Conv", ["input", "kernel"], "grey")
    graph_export(tmp_path, grey, mean_of("grey"), shape=["b", "c", "h", "w"], kernel=np.ones((1, 1, 1, 1)))
    with pytest.raises(
        InvalidBundle, match=r"can't run model.onnx on an image tensor \[N, 3, height, width\]"
    ) as caught:
        import_export(tmp_path, name="cells")
    assert caught.value.reason == "MODEL_UNLOADABLE"


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16])
def test_openvino_turns_floats_to_16_bits_but_not_to_bytes(tmp_path: Path, kind: int) -> None:
    openvino = pytest.importorskip("openvino")
    cast = node("Cast", ["input"], "floats", to=TensorProto.FLOAT)
    graph_export(tmp_path / "graph", cast, mean_of("floats"), kind=kind, shape=[1, 3, 64, 64])
    path = tmp_path / "export" / "model.xml"
    path.parent.mkdir()
    openvino.save_model(openvino.convert_model(str(tmp_path / "graph" / "model.onnx")), str(path))
    if kind == TensorProto.UINT8:  # it would cut each to 0
        assert refusal(path) == "EXPORT_UNREADABLE"
        return
    model = LoadedModel(import_export(path, name="cells"), tmp_path / "loaded")
    assert [sample.passed for sample in model.parity] == [True, True]


def test_weights_that_are_listed_among_the_inputs_are_none(tmp_path: Path) -> None:
    kernel, grey = np.full((1, 3, 1, 1), 1 / 3), node("Conv", ["input", "kernel"], "grey")
    graph_export(tmp_path / "export", grey, mean_of("grey"), listed=True, kernel=kernel)
    bundle = import_export(tmp_path / "export", name="cells")
    assert open_bundle(bundle).manifest.input.name == "input"
    assert serves(bundle, tmp_path / "loaded")


def test_what_has_to_be_given_besides_the_image_is_refused(tmp_path: Path) -> None:
    model = graph_export(tmp_path, node("Mul", ["input", "factor"], "more"), mean_of("more"))
    model.graph.input.append(helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1]))
    onnx.save_model(model, str(tmp_path / "model.onnx"))
    assert refusal(tmp_path) == "EXPORT_UNREADABLE"


@pytest.mark.parametrize("location", ["model.onnx.data", "weights/all.bin"])
def test_constants_whose_data_lies_beside_the_graph_are_taken_with_it(tmp_path: Path, location: str) -> None:
    kernel = numpy_helper.from_array(np.full((1, 3, 1, 1), 1 / 3, np.float32), "kernel")
    nodes = node("Constant", [], "kernel", value=kernel), node("Conv", ["input", "kernel"], "grey"), mean_of("grey")
    model = graph_export(tmp_path / "export", *nodes)
    (tmp_path / "export" / location).parent.mkdir(exist_ok=True)
    onnx.save_model(
        model, str(tmp_path / "export" / "model.onnx"), save_as_external_data=True, convert_attribute=True,
        location=location, size_threshold=0,
    )  # fmt: skip
    bundle = import_export(tmp_path / "export", name="cells")
    files = open_bundle(bundle).manifest.artefacts["onnxruntime"].files
    assert files == ("onnx/model.onnx", f"onnx/{location}")
    assert serves(bundle, tmp_path / "loaded")


@pytest.mark.parametrize("place", ["../weights.bin", "/etc/hostname"])
def test_weights_outside_of_the_exports_folder_are_refused(tmp_path: Path, place: str) -> None:
    path = export(tmp_path / "export" / "model.onnx", external=True)
    (tmp_path / "weights.bin").write_bytes(path.with_name("model.onnx.data").read_bytes())
    model = onnx.load(str(path), load_external_data=False)
    for one in model.graph.initializer:
        next(entry for entry in one.external_data if entry.key == "location").value = place
    path.write_bytes(model.SerializeToString())
    assert refusal(path) == "BUNDLE_PATH_OUTSIDE"
