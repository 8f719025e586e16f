"""Slips of a pen in the product's TensorRT code, each tried on engine_cases.py or rtx_cases.py.

Run in a process of its own, with the bindings of a version or of TensorRT for RTX, and the numbers
of mistakes; prints the numbers of those that no case noticed, as JSON.
"""

import contextlib
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from microclip_deploy.serving.flavour import RTX, flavour_here

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = "export/to_tensorrt.py"
LIBRARY = "microclip_deploy/serving/tensorrt_library.py"
RUN = "microclip_deploy/serving/tensorrt_engine.py"
ENCODER = "microclip_deploy/serving/tensorrt_encoder.py"
CAPTURE = "microclip_deploy/serving/cuda_pipeline.py"

# What an ended session leaves to the garbage collector is not a mistake of the next one.
OPTIONS = ("-x", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:unraisableexception")

MODULES = {
    CAPTURE: "microclip_deploy.serving.cuda_pipeline",
    LIBRARY: "microclip_deploy.serving.tensorrt_library",
    RUN: "microclip_deploy.serving.tensorrt_engine",
    ENCODER: "microclip_deploy.serving.tensorrt_encoder",
    BUILD: "microclip_deploy.export.to_tensorrt",
}
"""In the order in which they import one another."""


class Mistake(NamedTuple):
    """A line of the product, and what a slip would make of it."""

    file: str
    right: str
    wrong: str


MISTAKES = (
    Mistake(BUILD, "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)", "1 << 1"),
    Mistake(BUILD, "builder.create_network(flag)", "builder.create_network()"),
    Mistake(BUILD, "config.clear_flag(trt.BuilderFlag.TF32)", "pass"),
    Mistake(BUILD, "config.clear_flag(", "config.set_flag("),
    Mistake(BUILD, "ProfilingVerbosity.DETAILED", "ProfilingVerbosity.LAYER_NAMES_ONLY"),
    Mistake(BUILD, "config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)", "pass"),
    Mistake(BUILD, "int(options.workspace_gib * 2**30)", "options.workspace_gib * 2**30"),
    Mistake(BUILD, "config.set_timing_cache(cache, False)", "config.set_timing_cache(cache, True)"),
    Mistake(BUILD, "config.set_timing_cache(cache, False)", "config.set_timing_cache(cache)"),
    Mistake(BUILD, "config.add_optimization_profile(profile) < 0", "not profile"),
    Mistake(BUILD, "if plan is None:", "if False:"),
    Mistake(BUILD, "(span.least, span.opt, span.most)", "(span.least, span.most, span.opt)"),
    Mistake(BUILD, 'if tensor.name == "classifier" else batch', "if False else batch"),
    Mistake(BUILD, "config.progress_monitor = monitor", "config.progress_monitor = None"),
    Mistake(BUILD, "        trt.IProgressMonitor.__init__(self)\n", ""),
    Mistake(BUILD, "return self.failure is None and not self._cancelled.is_set()", "return None"),
    Mistake(BUILD, "        except Exception as error:  #", "        except KeyError as error:  #"),
    Mistake(BUILD, "monitor.cancel()", "pass"),
    Mistake(BUILD, "network_source(graph), str(graph))", "network_source(graph), graph)"),
    Mistake(BUILD, "if tensor.name not in inputs", "if tensor.name"),
    Mistake(BUILD, "    if not parser.parse(", "    if None is parser.parse("),
    Mistake(BUILD, "error.desc()", "error.description()"),
    Mistake(BUILD, "layer.get_input(0).dtype.name", "layer.precision.name"),
    Mistake(BUILD, "config.max_aux_streams = 0", "config.max_aux_streams = 0.0"),
    Mistake(LIBRARY, "        trt.ILogger.__init__(self)\n", ""),
    Mistake(RUN, "if self._engine is None:", "if False:"),
    Mistake(RUN, "if context is None:", "if False:"),
    Mistake(RUN, "device_memory_size_v2", "device_memory_size"),
    Mistake(RUN, "(self._activations.ptr, self._activations.size)", "(0, 0)"),
    Mistake(RUN, "(profile, self._stream.ptr)", "(profile, self._stream)"),
    Mistake(RUN, 'self._require(chosen, f"profile {profile}")', "pass"),
    Mistake(RUN, "context.set_input_shape(name, shape)", "context.set_binding_shape(name, shape)"),
    Mistake(RUN, "self._require(not unknown,", "self._require(True,"),
    Mistake(RUN, "self._require_fit(context, name, buffer)", "pass"),
    Mistake(RUN, "address = buffer.data.ptr", "address = buffer.data"),
    Mistake(RUN, "execute_async_v3(stream.ptr)", "execute_async_v2(stream.ptr)"),
    Mistake(RUN, "if not bound.execute_async_v3(", "if None is bound.execute_async_v3("),
    Mistake(RUN, "LayerInformationFormat.JSON", "LayerInformationFormat.ONELINE"),
    Mistake(ENCODER, "self._manifest.profile_of(len(pixels))", "0"),
    Mistake(ENCODER, "encode()\n            rest()\n", "rest()\n            encode()\n"),
    Mistake(CAPTURE, "    work()  # loads kernels and settles", "    # loads kernels and settles"),
    Mistake(CAPTURE, "    stream.synchronize()\n    stream.begin", "    stream.begin"),
)

RTX_MISTAKES = (
    Mistake(RUN, "set_execution_context_allocation_strategy(strategy)", "__class__"),
    Mistake(RUN, "specialization.EAGER", "specialization.LAZY"),
    Mistake(RUN, "CudaGraphStrategy.DISABLED", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"),
    Mistake(RUN, "config.set_runtime_cache(cache)", "True"),
    Mistake(RUN, "        if kernels:\n", "        if True:\n"),
    Mistake(RUN, "cache.deserialize(kernels)", "cache.deserialize(str(kernels))"),
    Mistake(RUN, "self._runtime_config or trt", "trt"),
    Mistake(RUN, "get_runtime_cache().serialize()", "get_runtime_cache()"),
)
"""Of what TensorRT for RTX wants otherwise; the real builder tries the rest."""

ALL = (*MISTAKES, *RTX_MISTAKES)


def source_of(mistake: Mistake) -> str:
    """Return the file with the mistake in it."""
    source = (ROOT / mistake.file).read_text()
    assert mistake.right in source, mistake
    return source.replace(mistake.right, mistake.wrong)


def unnoticed(numbers: Iterable[int]) -> list[int]:
    """Return the numbers of those mistakes with which every case passes."""
    name = "rtx_cases" if flavour_here() == RTX else "engine_cases"
    cases = importlib.import_module(f"tests.tensorrt.{name}")  # imports the modules

    assert cases.__file__
    assert _pass(cases.__file__), "the product itself fails"
    return [n for n in numbers if _loads(ALL[n]) and _pass(cases.__file__)]


def _loads(mistake: Mistake) -> bool:
    """Run the modules' sources again in their places, one of them with a mistake."""
    for file, name in MODULES.items():
        source = source_of(mistake) if file == mistake.file else (ROOT / file).read_text()
        try:
            exec(compile(source, file, "exec"), vars(sys.modules[name]))
        except Exception:  # a mistake that no import survives is noticed
            return False
    return True


def _pass(cases: str) -> bool:
    told = io.StringIO()
    with (
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
        tempfile.TemporaryDirectory() as folder,
    ):
        # A folder of its own: another session may be tidying up the common one.
        code = pytest.main([*OPTIONS, f"--basetemp={folder}/cases", cases])
    return code == 0


if __name__ == "__main__":
    print(json.dumps(unnoticed(map(int, sys.argv[1:]))))
