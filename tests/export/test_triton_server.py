"""What a real Triton says with a repository that `export --triton` wrote."""

import io
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from tritonclient.utils import InferenceServerException

from microclip_deploy.calibration import softmax
from microclip_deploy.export.class_rows import remove_classes
from microclip_deploy.export.triton.repository import write_repository
from microclip_deploy.serving import Prediction, Session, open_session
from tests.conftest import CALIBRATION, CLASSES
from tests.export.triton_server import Server, Triton, python_for, running, triton
from tests.tensorrt.bindings import Unavailable

pytestmark = pytest.mark.slow
QUIET = Console(quiet=True)
CLIENTS, ROUNDS = 8, 10
ROUNDING = 1e-4
"""Of logits, whose scale is 100: batches of other sizes add up in another order."""
STAND_IN = """
import onnxruntime, triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        self.graph = onnxruntime.InferenceSession(args["model_repository"] + "/1/model.onnx")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = [*request.requested_output_names()]
        image = pb.get_input_tensor_by_name(request, "image").as_numpy()
        found = self.graph.run(names, {"image": image})
        return pb.InferenceResponse([*map(pb.Tensor, names, found)])
"""
"""Runs a graph in place of the backend that this server lacks."""


class Rig(NamedTuple):
    """A server with the model `tiny`, and what it was made of."""

    server: Server
    export: Path
    repository: Path
    session: Session


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Triton:
    kept, name = request.config.cache, "triton"
    try:
        return triton(tmp_path_factory.mktemp(name) if kept is None else kept.mkdir(name))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rig(
    installed: Triton, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    scratch = tmp_path_factory.mktemp("triton")
    export, repository = scratch / "tiny", scratch / "models"
    shutil.copytree(tiny_export, export)
    write_repository(export, repository, QUIET)
    python = python_for(scratch / "python", [installed.numpy])
    with (
        running(installed.home, python, repository, "tiny", scratch) as server,
        open_session(export) as session,
    ):
        yield Rig(server, export, repository, session)


def views(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def file_of(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def ask(
    client: Any,
    module: Any,
    name: str,
    values: NDArray[Any],
    outputs: Any = None,
    model: str = "tiny",
) -> Any:
    """Send one input and return the result."""
    given = module.InferInput(name, values.shape, "BYTES" if values.dtype == object else "UINT8")
    given.set_data_from_numpy(values)
    return client.infer(model, [given], outputs=outputs)


def as_bytes(*files: bytes) -> NDArray[np.object_]:
    return np.array([[file] for file in files], dtype=object)


@pytest.mark.parametrize("module", [over_http, over_grpc], ids=["http", "grpc"])
def test_answers_are_those_of_the_session(rig: Rig, module: Any) -> None:
    address = rig.server.http if module is over_http else rig.server.grpc
    images = views(3)
    told = rig.session.predict(images)
    with module.InferenceServerClient(address) as client:
        answers = [
            ask(client, module, "image", images),
            ask(client, module, "photo", as_bytes(*map(file_of, images))),
        ]
        best = [module.InferRequestedOutput("probabilities", class_count=2)]
        named = ask(client, module, "image", images[:1], best).as_numpy("probabilities")
    for answer in answers:
        for field in Prediction._fields:
            found = answer.as_numpy(field).reshape(getattr(told, field).shape)
            np.testing.assert_allclose(found, getattr(told, field), atol=ROUNDING)
        shares = softmax(told.logits, CALIBRATION["temperature"])
        np.testing.assert_allclose(answer.as_numpy("probabilities"), shares, atol=ROUNDING)
        unknown = shares.max(axis=1) < CALIBRATION["unknown_below"]
        assert (answer.as_numpy("unknown")[:, 0] == unknown).all()
    [score, index, label] = named.ravel()[0].decode().split(":")
    most_probable = answers[0].as_numpy("probabilities")[0]
    assert float(score) == pytest.approx(most_probable.max())
    assert (int(index), label) == (most_probable.argmax(), CLASSES[int(index)])


def test_the_client_of_the_readme_names_classes(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.jpg").write_bytes(file_of(views(1)[0], "JPEG"))
    [code] = re.findall(
        r"```python\n(.*?)```", (rig.repository / "README.md").read_text(), re.DOTALL
    )
    for written, here in (("localhost:8000", rig.server.http), ("1.jpg", str(tmp_path / "1.jpg"))):
        code = code.replace(written, here)
    exec(code, {})
    assert any(name in capsys.readouterr().out for name in CLASSES)


def test_requests_are_put_together_and_a_bad_photo_costs_only_itself(rig: Rig) -> None:
    images = views(CLIENTS)
    told = rig.session.predict(images).logits
    files = [*map(file_of, images[1:]), b"no photo at all"]

    def client(number: int) -> list[Any]:
        with over_grpc.InferenceServerClient(rig.server.grpc) as opened:
            answers: list[Any] = []
            for _ in range(ROUNDS):
                try:
                    found = ask(opened, over_grpc, "photo", as_bytes(files[number]))
                    answers.append(found.as_numpy("logits"))
                except InferenceServerException as error:
                    answers.append(error.message())
            return answers

    with over_grpc.InferenceServerClient(rig.server.grpc) as watching:
        before = watching.get_inference_statistics("tiny").model_stats[0]
        with ThreadPoolExecutor(CLIENTS) as pool:
            *good, bad = pool.map(client, range(CLIENTS))
        after = watching.get_inference_statistics("tiny").model_stats[0]
    for row, answers in enumerate(good, 1):
        for answer in answers:
            np.testing.assert_allclose(answer[0], told[row], atol=ROUNDING)
    assert {answer.partition(" (")[0] for answer in bad} == {
        "photo[0]: expected a readable image, found a file that cannot be used"
    }
    asked = after.inference_count - before.inference_count
    assert asked == CLIENTS * ROUNDS
    assert after.execution_count - before.execution_count < asked / 2


def test_wrong_requests_are_told_what_is_wrong(rig: Rig) -> None:
    with over_http.InferenceServerClient(rig.server.http) as client:
        both = [
            over_http.InferInput("image", [1, 32, 32, 3], "UINT8"),
            over_http.InferInput("photo", [1, 1], "BYTES"),
        ]
        both[0].set_data_from_numpy(views(1))
        both[1].set_data_from_numpy(as_bytes(file_of(views(1)[0])))
        with pytest.raises(InferenceServerException, match=r"^\[400\].*one of image and photo"):
            client.infer("tiny", both)
        with pytest.raises(InferenceServerException, match=r"^\[400\].*shape"):
            ask(client, over_http, "image", views(1)[:, :16])


def test_classes_change_when_the_model_is_loaded_again(rig: Rig, tmp_path: Path) -> None:
    changed, images = tmp_path / "tiny", views(2)
    shutil.copytree(rig.export, changed)
    remove_classes(changed, CLASSES[:1])
    write_repository(changed, rig.repository, QUIET)
    best = [over_http.InferRequestedOutput("logits", class_count=2)]
    with (
        over_http.InferenceServerClient(rig.server.http) as client,
        open_session(changed) as session,
    ):
        assert ask(client, over_http, "image", images).as_numpy("logits").shape == (2, 3)
        client.load_model("tiny")
        found = ask(client, over_http, "image", images).as_numpy("logits")
        np.testing.assert_allclose(found, session.predict(images).logits, atol=ROUNDING)
        named = ask(client, over_http, "image", images, best).as_numpy("logits")
        assert {text.decode().split(":")[2] for text in named.ravel()} == set(CLASSES[1:])
        write_repository(rig.export, rig.repository, QUIET)
        client.load_model("tiny")


def test_the_configuration_of_the_graph_is_one_that_triton_takes(rig: Rig) -> None:
    standing_in, images = rig.repository / "graph", views(3)
    shutil.copytree(rig.repository / "tiny_onnx", standing_in)
    config = (standing_in / "config.pbtxt").read_text().replace("tiny_onnx", "graph")
    (standing_in / "config.pbtxt").write_text(config.replace('"onnxruntime"', '"python"'))
    (standing_in / "1" / "model.py").write_text(STAND_IN)
    with over_http.InferenceServerClient(rig.server.http) as client:
        client.load_model("graph")
        found = ask(client, over_http, "image", images, model="graph")
        best = [over_http.InferRequestedOutput("logits", class_count=1)]
        named = ask(client, over_http, "image", images[:1], best, "graph").as_numpy("logits")
    told = rig.session.predict(images)
    np.testing.assert_allclose(found.as_numpy("logits"), told.logits, atol=ROUNDING)
    assert (found.as_numpy("mask") == told.mask).all()
    assert (found.as_numpy("complete")[:, 0] == told.complete).all()
    assert named.ravel()[0].decode().endswith(f":{CLASSES[told.logits[0].argmax()]}")


def test_health_metrics_and_unloading_tell_the_state(rig: Rig) -> None:
    with over_http.InferenceServerClient(rig.server.http) as client:
        assert client.is_model_ready("tiny")
        with urllib.request.urlopen(f"http://{rig.server.metrics}/metrics") as answer:
            assert 'nv_inference_request_success{model="tiny"' in answer.read().decode()
        # This server has the python backend alone.
        with pytest.raises(InferenceServerException, match="onnxruntime"):
            client.load_model("tiny_onnx")
        client.unload_model("tiny")
        assert not client.is_model_ready("tiny")
        client.load_model("tiny")
        assert client.is_model_ready("tiny")


def test_a_triton_that_reads_garbage_under_numpy_2_is_refused(
    installed: Triton, tiny_export: Path, tmp_path: Path
) -> None:
    write_repository(tiny_export, tmp_path / "models", QUIET)
    python = python_for(tmp_path / "python", [])
    with (
        pytest.raises(RuntimeError, match=r"expected Triton 2\.52 or newer, or NumPy below 2"),
        running(installed.home, python, tmp_path / "models", "tiny", tmp_path),
    ):
        pass
