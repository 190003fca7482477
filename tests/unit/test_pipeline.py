"""Loading and judging, on graphs made here."""

from __future__ import annotations

import asyncio
import io
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from vigil_common.bundle import Artefact, Manifest, ModelInput, ModelOutputs, ParitySample, Variant, open_bundle, pack
from vigil_common.errors import InvalidBundle, InvalidInput
from vigil_common.pixels import to_tensor
from vigil_inference.model import LoadedModel
from vigil_inference.pipeline import Judged, Pipeline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from vigil_common.pixels import Tensor
    from vigil_inference.engine import Outputs

DEADLINE_S = 10
RUNS = 2
RUN_S = 0.1


def png(level: int, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, level).save(file, "PNG")
    return file.getvalue()


def graph(*, batch: int | None = None, column: bool = False, axes: tuple[int, ...] = (1, 2, 3)) -> bytes:
    """The score is the image's mean, the map its first channel, the mask where that is over a half."""
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "n", 3, "h", "w"])
    over = helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)
    first = [helper.make_tensor(name, TensorProto.INT64, [1], [at]) for name, at in (("zero", 0), ("one", 1))]
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    flat = helper.make_tensor("flat", TensorProto.INT64, [2 if column else 1], [-1, 1] if column else [-1])
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "flat"], ["pred_score"]),
        helper.make_node("Slice", ["input", "zero", "one", "one"], ["anomaly_map"]),
        helper.make_node("Greater", ["anomaly_map", "half"], ["pred_mask"]),
    ]
    outputs = [
        helper.make_tensor_value_info("pred_score", TensorProto.FLOAT, ["n", 1] if column else ["n"]),
        helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["n", 1, "h", "w"]),
        helper.make_tensor_value_info("pred_mask", TensorProto.BOOL, ["n", 1, "h", "w"]),
    ]
    made = helper.make_graph(nodes, "mean", [image], outputs, [over, *first, half, flat])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def bundle(
    *, parity: float | None = None, batch: int | None = None, column: bool = False, content: bytes = b"", **fields: Any
) -> bytes:
    files = {"model.onnx": content or graph(batch=batch, column=column)}
    samples = []
    if parity is not None:
        files["sample.png"] = png(51)
        samples = [ParitySample(image="sample.png", score=parity)]
    outputs = {"score": "pred_score", "map": "anomaly_map", "mask": "pred_mask", **fields.pop("outputs", {})}
    manifest = Manifest(
        name="cells",
        artefacts={"onnxruntime": Artefact(path="model.onnx", files=("model.onnx",))},
        outputs=ModelOutputs(**outputs),
        parity=tuple(samples),
        fixed_batch=batch,
        **fields,
    )
    return pack(manifest, files)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidBundle) as caught:
        act()
    return caught.value.reason


@pytest.mark.parametrize("column", [False, True])
def test_scores_maps_and_masks_come_by_name_whatever_the_scores_shape(tmp_path: Path, column: bool) -> None:  # noqa: FBT001
    model = LoadedModel(bundle(column=column), tmp_path)
    batch = np.stack([np.full((3, 4, 5), level, dtype=np.float32) for level in (0.25, 0.75)])
    found = model.judge(batch, pictures=True)
    assert found.score.tolist() == [0.25, 0.75]
    assert found.map is not None
    assert found.mask is not None
    assert found.map.shape == found.mask.shape == (2, 4, 5)
    assert found.mask.dtype == np.bool_
    assert found.mask[:, 0, 0].tolist() == [False, True]
    bare = model.judge(batch, pictures=False)
    assert (bare.map, bare.mask) == (None, None)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_frozen_batch_is_padded_and_split_and_nobody_sees_it(tmp_path: Path, count: int) -> None:
    model = LoadedModel(bundle(batch=2), tmp_path)
    levels = np.linspace(0, 1, count, dtype=np.float32)
    found = model.judge(np.broadcast_to(levels[:, None, None, None], (count, 3, 4, 5)), pictures=True)
    assert found.score.tolist() == pytest.approx(levels.tolist())
    assert found.map is not None
    assert found.mask is not None
    assert found.map[:, 0, 0].tolist() == pytest.approx(levels.tolist())
    assert len(found.mask) == count


def test_a_model_without_map_and_mask_judges_all_the_same(tmp_path: Path) -> None:
    model = LoadedModel(bundle(outputs={"map": None, "mask": "not_in_the_graph"}), tmp_path)
    found = model.judge(np.zeros((1, 3, 4, 5), dtype=np.float32), pictures=True)
    assert (found.score.tolist(), found.map, found.mask) == ([0], None, None)


def test_parity_that_holds_is_reported(tmp_path: Path) -> None:
    (sample,) = LoadedModel(bundle(parity=0.2), tmp_path).parity
    assert sample.passed
    assert sample.actual == pytest.approx(0.2)


def test_parity_that_fails_refuses_the_bundle(tmp_path: Path) -> None:
    assert refused(lambda: LoadedModel(bundle(parity=0.3), tmp_path)) == "PARITY_FAILED"


def test_another_digest_is_refused(tmp_path: Path) -> None:
    digest = f"sha256:{'0' * 64}"
    assert refused(lambda: LoadedModel(bundle(), tmp_path, expected_digest=digest)) == "DIGEST_MISMATCH"


def test_an_engine_that_the_bundle_has_nothing_for_is_refused(tmp_path: Path) -> None:
    assert refused(lambda: LoadedModel(bundle(), tmp_path, engine="openvino")) == "ENGINE_MISSING"


def test_a_graph_that_does_not_load_is_refused(tmp_path: Path) -> None:
    assert refused(lambda: LoadedModel(bundle(content=b"rubbish"), tmp_path)) == "MODEL_UNLOADABLE"


def test_a_score_that_the_graph_does_not_give_is_refused(tmp_path: Path) -> None:
    assert refused(lambda: LoadedModel(bundle(outputs={"score": "other"}), tmp_path)) == "BUNDLE_OUTPUT_MISSING"


@pytest.fixture
async def pipeline(tmp_path: Path) -> AsyncIterator[Pipeline]:
    made = Pipeline(LoadedModel(bundle(), tmp_path), max_pixels=10_000, batch_size=4, runs=RUNS)
    made.start()
    yield made
    await made.close()


async def judge_all(pipeline: Pipeline, images: list[bytes], *, pictures: bool = False) -> list[Judged]:
    calls = (pipeline.judge(image, pictures=pictures) for image in images)
    return await asyncio.wait_for(asyncio.gather(*calls), DEADLINE_S)


async def test_every_image_gets_its_own_score_though_shapes_mix(pipeline: Pipeline) -> None:
    levels = [round(index * 255 / 39) for index in range(40)]
    sizes = [(8, 6) if index % 3 else (10, 4) for index in range(40)]
    found = await judge_all(pipeline, [png(level, size) for level, size in zip(levels, sizes, strict=True)])
    assert [one.score for one in found] == pytest.approx([level / 255 for level in levels])
    assert all(one.pixels is None and one.map is None and one.decode_s > 0 and one.inference_s > 0 for one in found)


async def test_pictures_go_to_who_asked_for_them_only(pipeline: Pipeline) -> None:
    plain, drawn = await asyncio.gather(
        pipeline.judge(png(200), pictures=False), pipeline.judge(png(200), pictures=True)
    )
    assert (plain.pixels, plain.map, plain.mask) == (None, None, None)
    assert drawn.pixels is not None
    assert drawn.map is not None
    assert drawn.mask is not None
    assert drawn.pixels.shape == drawn.map.shape == (6, 8)
    assert drawn.mask.all()


async def test_a_bad_image_fails_alone(pipeline: Pipeline) -> None:
    calls = (pipeline.judge(image, pictures=False) for image in (png(0), b"rubbish", png(255)))
    first, bad, last = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), DEADLINE_S)
    assert isinstance(first, Judged)
    assert isinstance(last, Judged)
    assert isinstance(bad, InvalidInput)
    assert bad.reason == "IMAGE_UNREADABLE"


def test_a_graph_that_is_frozen_at_one_or_scores_a_batch_as_one_takes_no_several(tmp_path: Path) -> None:
    assert LoadedModel(bundle(), tmp_path / "any").takes(3)
    assert LoadedModel(bundle(batch=2), tmp_path / "two").takes(3)
    assert not LoadedModel(bundle(content=graph(batch=1)), tmp_path / "one").takes(2)
    assert not LoadedModel(bundle(content=graph(axes=(0, 1, 2, 3))), tmp_path / "all").takes(2)


class Picky:
    """A model that fails with several images, or says too little of them; begins when let."""

    def __init__(self, model: LoadedModel, *, fails: bool) -> None:
        self.manifest = model.manifest
        self._model = model
        self._fails = fails
        self.let = threading.Event()
        self.began: list[int] = []

    def judge(self, batch: Tensor, *, pictures: bool) -> Outputs:
        self.began.append(len(batch))
        assert self.let.wait(DEADLINE_S)
        if len(batch) > 1 and self._fails:
            raise RuntimeError("Got: 4 Expected: 1")
        return self._model.judge(batch[:1], pictures=pictures)


@pytest.mark.parametrize("fails", [True, False])
async def test_what_fails_together_is_judged_one_by_one(tmp_path: Path, fails: bool) -> None:  # noqa: FBT001
    model = Picky(LoadedModel(bundle(), tmp_path), fails=fails)
    made = Pipeline(model, max_pixels=10_000, batch_size=4)  # type: ignore[arg-type]
    made.start()
    first = asyncio.create_task(made.judge(png(1), pictures=False))
    await until(lambda: model.began == [1])
    rest = asyncio.ensure_future(judge_all(made, [png(level) for level in (0, 51, 204, 255)]))
    await asyncio.sleep(0)
    model.let.set()
    found = await rest
    await first
    await made.close()
    assert model.began == [1, 4, 1, 1, 1, 1]
    assert [one.score for one in found] == pytest.approx([0, 0.2, 0.8, 1])


class Held:
    """A model that runs only when let, and tells what it was given."""

    def __init__(self, model: LoadedModel) -> None:
        self.manifest = model.manifest
        self._model = model
        self.let = threading.Semaphore(0)
        self.began: list[int] = []
        self.fail = False

    def judge(self, batch: Tensor, *, pictures: bool) -> Outputs:
        self.began.append(len(batch))
        assert self.let.acquire(timeout=DEADLINE_S)
        if self.fail:
            raise RuntimeError("the runtime broke")
        return self._model.judge(batch, pictures=pictures)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[tuple[Pipeline, Held]]:
    model = Held(LoadedModel(bundle(), tmp_path))
    made = Pipeline(model, max_pixels=10_000, batch_size=2, runs=RUNS)  # type: ignore[arg-type]
    made.start()
    yield made, model
    model.let.release(100)
    await made.close()


async def test_so_many_runs_go_on_at_a_time_and_nothing_is_decoded_ahead_of_them(
    held: tuple[Pipeline, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, model = held
    decoded: list[object] = []

    def counted(pixels: Any, spec: ModelInput, *, out: Any) -> Any:
        decoded.append(pixels)
        return to_tensor(pixels, spec, out=out)

    monkeypatch.setattr("vigil_inference.pipeline.to_tensor", counted)
    calls = asyncio.ensure_future(judge_all(pipeline, [png(1)] * 12))
    await until(lambda: len(model.began) == RUNS)
    # That no more begin, and none is decoded that has to wait, shows only by waiting a moment.
    await asyncio.sleep(0.05)
    assert len(model.began) == RUNS
    assert len(decoded) == sum(model.began)
    model.let.release(100)
    assert len(await calls) == 12
    assert max(model.began) == 2


async def second_run(tmp_path: Path, *, frozen: int | None, runs: int) -> tuple[int, list[Judged]]:
    """How many images it takes after each thread began with one and four more came, and what came of these four."""
    model = Held(LoadedModel(bundle(batch=frozen), tmp_path / str(frozen)))
    made = Pipeline(model, max_pixels=10_000, batch_size=4, runs=runs)  # type: ignore[arg-type]
    made.start()
    first = []
    for count in range(1, runs + 1):
        first.append(asyncio.create_task(made.judge(png(1), pictures=False)))
        await until(lambda count=count: sum(model.began) == count)  # type: ignore[misc]
    rest = asyncio.ensure_future(judge_all(made, [png(1)] * 4))
    await asyncio.sleep(0)
    model.let.release()
    await until(lambda: len(model.began) > runs)
    began = model.began[-1]
    await asyncio.sleep(RUN_S)
    model.let.release(100)
    found = await rest
    await asyncio.wait(first)
    await made.close()
    return began, found


async def test_a_thread_takes_its_share_of_what_waits_but_all_for_a_frozen_batch(tmp_path: Path) -> None:
    began, _ = await second_run(tmp_path, frozen=None, runs=2)
    assert began == 2  # the first, and half of the three behind it
    began, _ = await second_run(tmp_path, frozen=4, runs=2)
    assert began == 4


async def test_the_time_of_a_run_is_shared_by_its_images_unless_the_batch_is_frozen(tmp_path: Path) -> None:
    began, found = await second_run(tmp_path, frozen=None, runs=1)
    assert began == 4
    assert all(RUN_S / 4 <= one.inference_s < RUN_S for one in found)
    _, found = await second_run(tmp_path, frozen=4, runs=1)
    assert all(one.inference_s >= RUN_S for one in found)


async def test_the_run_of_others_is_no_part_of_an_images_decoding(tmp_path: Path) -> None:
    model = Held(LoadedModel(bundle(), tmp_path))
    made = Pipeline(model, max_pixels=10_000, batch_size=4)  # type: ignore[arg-type]
    made.start()
    first = asyncio.create_task(made.judge(png(1), pictures=False))
    await until(lambda: len(model.began) == 1)
    rest = asyncio.ensure_future(judge_all(made, [png(1), png(1, (10, 4))]))
    await asyncio.sleep(0)
    model.let.release()
    await until(lambda: len(model.began) == 2)
    await asyncio.sleep(RUN_S)
    model.let.release(100)
    _, other_size = await rest
    await first
    await made.close()
    assert model.began == [1, 1, 1]
    assert other_size.decode_s < RUN_S


async def test_one_that_stands_aside_has_one_run_at_a_time(held: tuple[Pipeline, Held]) -> None:
    pipeline, model = held
    first = []
    for count in range(1, RUNS + 1):
        first.append(asyncio.create_task(pipeline.judge(png(1), pictures=False)))
        await until(lambda count=count: len(model.began) == count)  # type: ignore[misc]
    pipeline.stand_aside(aside=True)
    # Before more comes: a thread that is done at once could take the other's leave to end its run.
    model.let.release(RUNS)
    await asyncio.wait(first)
    rest = asyncio.ensure_future(judge_all(pipeline, [png(1)] * 8))
    # That the other thread takes nothing shows only by waiting a moment.
    await until(lambda: len(model.began) > RUNS)
    await asyncio.sleep(0.05)
    assert len(model.began) == RUNS + 1
    pipeline.stand_aside(aside=False)
    await until(lambda: len(model.began) == RUNS + 2)
    model.let.release(100)
    assert len(await rest) == 8


async def test_a_run_that_breaks_is_told_to_who_asked_and_the_next_one_works(held: tuple[Pipeline, Held]) -> None:
    pipeline, model = held
    model.fail = True
    model.let.release()
    with pytest.raises(RuntimeError, match="the runtime broke"):
        await pipeline.judge(png(1), pictures=False)
    model.fail = False
    model.let.release()
    assert (await pipeline.judge(png(51), pictures=False)).score == pytest.approx(0.2)


async def test_who_has_gone_is_not_judged(held: tuple[Pipeline, Held]) -> None:
    pipeline, model = held
    first = [asyncio.create_task(pipeline.judge(png(1), pictures=False)) for _ in range(RUNS)]
    await until(lambda: sum(model.began) == RUNS)
    waiting = [asyncio.create_task(pipeline.judge(png(1), pictures=False)) for _ in range(10)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    model.let.release(100)
    await asyncio.wait_for(asyncio.gather(*first), DEADLINE_S)
    assert (await pipeline.judge(png(51), pictures=False)).score == pytest.approx(0.2)
    assert sum(model.began) == RUNS + 1


def slower(*, score: float) -> bytes:
    """As `graph`, with work that changes nothing, and the mean raised."""
    model = onnx.load_from_string(graph())
    nodes, last = [], "input"
    for index in range(200):
        nodes.append(helper.make_node("Sigmoid", [last], [f"work{index}"]))
        last = f"work{index}"
    model.graph.node[0].output[0] = "plain"
    kept = [
        helper.make_node("ReduceMean", [last, "axes"], ["worked"], keepdims=0),
        helper.make_node("Mul", ["worked", "nothing"], ["gone"]),
        helper.make_node("Sum", ["plain", "gone", "raised"], ["mean"]),
    ]
    model.graph.initializer.extend(
        helper.make_tensor(name, TensorProto.FLOAT, [1], [value]) for name, value in (("nothing", 0), ("raised", score))
    )
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([rest[0], *nodes, *kept, *rest[1:]])
    data: bytes = model.SerializeToString()
    return data


def with_variant(*, main: bytes, variant: bytes, threshold: float, score: float) -> bytes:
    files = {"model.onnx": main, "fast.onnx": variant, "sample.png": png(51)}
    outputs = ModelOutputs(score="pred_score", map="anomaly_map", mask="pred_mask")
    fast = Variant(
        runtime="onnxruntime",
        artefact=Artefact(path="fast.onnx", files=("fast.onnx",)),
        precision="int8",
        threshold=threshold,
        scores=(score,),
    )
    manifest = Manifest(
        name="cells",
        artefacts={"onnxruntime": Artefact(path="model.onnx", files=("model.onnx",))},
        outputs=outputs,
        parity=(ParitySample(image="sample.png", score=0.2),),
        variants={"fast": fast},
    )
    return pack(manifest, files)


def test_auto_takes_the_fastest_artefact_and_says_so_on_the_bundles_scale(tmp_path: Path) -> None:
    # The variant draws the line at 0.4 where the bundle's threshold is 0.5.
    model = LoadedModel(with_variant(main=slower(score=0.0), variant=graph(), threshold=0.4, score=0.25), tmp_path)
    assert (model.artefact, model.engine.precision) == ("fast", "int8")
    assert model.choice.startswith("fast is the fastest here that holds its parity: onnxruntime ")
    judged = model.judge(to_tensor(np.full((8, 8), 102, dtype=np.uint8), ModelInput()), pictures=False)
    assert judged.score[0] == pytest.approx(0.5)


def test_auto_leaves_out_a_variant_that_does_not_hold_its_parity_here(tmp_path: Path) -> None:
    model = LoadedModel(with_variant(main=slower(score=0.0), variant=graph(), threshold=0.5, score=0.9), tmp_path)
    assert model.artefact == "onnxruntime"
    assert "fast PARITY_FAILED" in model.choice


def test_a_runtime_asked_for_is_taken_though_a_variant_is_faster(tmp_path: Path) -> None:
    content = with_variant(main=slower(score=0.0), variant=graph(), threshold=0.5, score=0.2)
    model = LoadedModel(content, tmp_path, engine="onnxruntime")
    assert (model.artefact, model.choice) == ("onnxruntime", "")


def test_a_variant_has_a_score_for_each_parity_sample() -> None:
    plain = with_variant(main=graph(), variant=graph(), threshold=0.5, score=0.2)
    manifest = open_bundle(plain).manifest
    fields = manifest.model_dump(mode="json")
    fields["variants"]["fast"]["scores"] = []
    with pytest.raises(ValueError, match="0 scores for 1 parity samples"):
        Manifest.model_validate(fields)
