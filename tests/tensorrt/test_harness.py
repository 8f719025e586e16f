"""The harness itself: bindings can be had or say why not, and both checks catch mistakes."""

import re
from pathlib import Path

import pytest

from tests.tensorrt.api import Api
from tests.tensorrt.bindings import VERSIONS, Unavailable, bindings, run, run_cases
from tests.tensorrt.usage import check

HERE = Path(__file__).parent
TEN, ELEVEN = VERSIONS

PRELUDE = """
import tensorrt as trt
log = trt.Logger()
builder = trt.Builder(log)
network = builder.create_network()
config = builder.create_builder_config()
engine = trt.Runtime(log).deserialize_cuda_engine(b"")
context = engine.create_execution_context()
"""
MISTAKES = {
    "trt.Bulider": "tensorrt.Bulider does not exist",
    "from tensorrt import Bulider": "tensorrt.Bulider does not exist",
    "trt.BuilderFlag.FP61": "BuilderFlag.FP61 does not exist",
    "trt.ILogger.Severity.LOUD": "ILogger.Severity.LOUD does not exist",
    "builder.create_network(1 << 1)": "Builder.create_network: a flag's number",
    "builder.create_network(flags=2)": "Builder.create_network: a flag's number",
    "builder.create_network(flag=0)": "Builder.create_network(flag=_) fits no",
    "config.set_timing_cache(b'')": "IBuilderConfig.set_timing_cache(_) fits no",
    "config.max_workspace_size = 1": "IBuilderConfig.max_workspace_size does not",
    "network.num_layers = 1": "INetworkDefinition.num_layers is read-only",
    "network.num_layers += 1": "INetworkDefinition.num_layers is read-only",
    "trt.Runtime()": "Runtime() fits no signature",
    "trt.ICudaEngine()": "ICudaEngine() fits no signature",
    "getattr(engine, 'num_bindings')": "ICudaEngine.num_bindings does not exist",
    "if (e := engine).bindings: pass": "ICudaEngine.bindings does not exist",
    "x = (engine if x else None).bindings": "ICudaEngine.bindings does not exist",
    "for layer in network: layer.nmae": "ILayer.nmae does not exist",
    "[layer.nmae for layer in network]": "ILayer.nmae does not exist",
    "[t.nmae for t in map(network.get_input, ())]": "ITensor.nmae does not exist",
    "network[0].nmae": "ILayer.nmae does not exist",
    "with open('x'), builder as b: b.build()": "Builder.build does not exist",
    "def f(c: trt.IBuilderConfig | None): c.x": "IBuilderConfig.x does not exist",
    "def f(c: 'trt.IBuilderConfig'): c.x": "IBuilderConfig.x does not exist",
    "def f(trt: Any): trt.x": "tensorrt.x does not exist",
    "def f(c): c.x\nf(config)": "IBuilderConfig.x does not exist",
    "def f(*, c): c.x\ng = lambda: f(c=config)": "IBuilderConfig.x does not exist",
    "def f(): return later().x\ndef later(): return config": "IBuilderConfig.x does not exist",
    "class A:\n e: trt.ICudaEngine\n def f(self): self.e.x": "ICudaEngine.x does not exist",
    "class A:\n def f(self): self.e.x\n def __init__(self): self.e = engine": "ICudaEngine.x does",
    "class A:\n def __init__(self, e): self.e = e\nA(engine).e.x": "ICudaEngine.x does not exist",
    "class A:\n @property\n def e(self): return engine\nA().e.x": "ICudaEngine.x does not exist",
    "class A(trt.ILogger):\n def __init__(self): pass": "ILogger.__init__ is not called",
    "class A(trt.ILogger):\n def log(self, msg): pass": "ILogger.log is called with 2 arguments",
    "class A(trt.IStreamWriter):\n def write(self, data, size): pass": "is called with 1 arguments",
    "if not hasattr(trt, 'Builder') or trt.x: pass": "tensorrt.x does not exist",
}
ONLY_IN_TEN = {
    "trt.BuilderFlag.FP16": "BuilderFlag.FP16 does not exist",
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH": "EXPLICIT_BATCH does not exist",
    "engine.device_memory_size": "ICudaEngine.device_memory_size does not exist",
    "network.get_input(0).dtype = trt.float16": "ITensor.dtype is read-only",
    "trt.OnnxParser(network, log).supports_model(b'')": "OnnxParser.supports_model does not exist",
}
CORRECT = [
    "if hasattr(trt.BuilderFlag, 'FP16'): config.set_flag(trt.BuilderFlag.FP16)",
    "if not hasattr(trt.BuilderFlag, 'FP16'): pass\nelse: trt.BuilderFlag.FP16",
    "hasattr(engine, 'weights_loaded') and engine.weights_loaded",
    "x = engine.device_memory_size if hasattr(engine, 'device_memory_size') else 0",
    "getattr(engine, 'device_memory_size', 0)",
    "engine = object()\nengine.bindings",
    "def f(engine): engine.bindings",
    "[engine.bindings for engine in ()]",
    "g = lambda engine: engine.bindings",
    "config.flags |= 1 << int(trt.BuilderFlag.TF32)",
    "builder.create_network(*flags)",
    "class A(trt.ILogger):\n def log(self, *args): self.mine = args",
]


def messages(tmp_path: Path, source: str, apis: list[Api]) -> dict[str, list[str]]:
    path = tmp_path / "product.py"
    path.write_text(PRELUDE + source)
    found = check([tmp_path], apis)
    return {
        each["version"]: [f.message for f in found if f.version == each["version"]] for each in apis
    }


def test_fakes_take_what_tensorrt_takes(trt_folder: Path) -> None:
    run_cases(trt_folder, HERE / "fake_cases.py")


def test_apis_are_of_their_versions(apis: list[Api]) -> None:
    assert tuple(api["version"] for api in apis) == VERSIONS
    assert ["FP16" in api["enums"]["BuilderFlag"] for api in apis] == [True, False]
    signature = "(pool: MemoryPoolType, pool_size: int) -> None"
    for api in apis:
        config = api["classes"]["IBuilderConfig"]
        assert config["methods"]["set_memory_pool_limit"] == [signature]
        assert config["properties"]["flags"] == {"type": "int", "writable": True}
        assert api["classes"]["Logger"]["bases"] == ["ILogger"]


@pytest.mark.parametrize("source", MISTAKES)
def test_mistakes_are_found(source: str, tmp_path: Path, apis: list[Api]) -> None:
    for found in messages(tmp_path, source, apis).values():
        assert len(found) == 1
        assert MISTAKES[source] in found[0]


@pytest.mark.parametrize("source", ONLY_IN_TEN)
def test_what_is_gone_is_found(source: str, tmp_path: Path, apis: list[Api]) -> None:
    found = messages(tmp_path, source, apis)
    assert found[TEN] == []
    assert len(found[ELEVEN]) == 1
    assert ONLY_IN_TEN[source] in found[ELEVEN][0]


@pytest.mark.parametrize("source", CORRECT)
def test_correct_lines_pass(source: str, tmp_path: Path, apis: list[Api]) -> None:
    assert messages(tmp_path, source, apis) == {TEN: [], ELEVEN: []}


def test_correct_code_passes(apis: list[Api]) -> None:
    assert check([HERE / "example.py"], apis) == []


def test_a_version_that_cannot_be_had_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"pip cannot download tensorrt-cu13-bindings==0\.0\.1: .+"
    ):
        bindings("0.0.1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="needs gcc and readelf"):
        bindings(TEN, tmp_path / "cache")


def test_a_finished_folder_is_taken_as_it_is(
    trt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    version = trt_folder.name.partition("-")[0]
    assert bindings(version, trt_folder.parent) == trt_folder


def test_a_failing_script_shows_what_it_printed(trt_folder: Path) -> None:
    code = "import tensorrt; print(tensorrt.__version__); 1 / 0"
    version = re.escape(trt_folder.name.partition("-")[0])
    with pytest.raises(AssertionError, match=rf"(?s)exit status 1\n{version}.*ZeroDivisionError"):
        run(trt_folder, "-c", code)
