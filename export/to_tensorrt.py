"""An exported graph -> a plan, with TensorRT 10 and 11 and TensorRT for RTX by the same calls.

Networks are strongly typed: what runs in which precision is what the ONNX file says, never a flag's
or a tactic's choice, and float32 is float32, because TF32 is switched off. The class matrix is an
input, so that classes change without another build.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError
from microclip_deploy.export.layer_listing import Layer, read_layers
from microclip_deploy.serving.engines import BuildOptions, Hardware, Span
from microclip_deploy.serving.flavour import RTX
from microclip_deploy.serving.tensorrt_library import FLAVOUR, LOG, NAME, trt

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps, what is done); from threads of TensorRT's."""

_HARDWARE: dict[Hardware, str] = {
    "none": "NONE",
    "ampere+": "AMPERE_PLUS",
    "same-cc": "SAME_COMPUTE_CAPABILITY",
}
"""Our names -> members of TensorRT's HardwareCompatibilityLevel."""

_POLL_S = 0.1


class Built(NamedTuple):
    """A plan as TensorRT returned it."""

    plan: bytes
    products: Counter[str]
    """Matrix products of the typed network by the type of their factors, such as "HALF"."""
    layers: tuple[Layer, ...]
    """Of the plan, as the builder listed them; TensorRT for RTX does."""


class GraphRefused(CheckpointError):
    """The parser knows no way to compute some nodes."""


def build_plan(
    graph: Path,
    options: BuildOptions,
    classes: Span,
    *,
    timing_cache: Path,
    progress: Progress = lambda *_: None,
) -> Built:
    """Build a plan: for the current CUDA device, or with TensorRT for RTX for any; takes minutes.

    The build runs on a thread of its own, so that a signal reaches this one and cancels it.

    Args:
        graph: full.onnx or backbone.onnx.
        options: profiles and how to build.
        classes: rows of a class matrix, where the graph takes one.
        timing_cache: file of measured kernels, read if it fits and written after the build.
        progress: told of each step.

    Raises:
        UsageError: a compute capability that TensorRT for RTX does not build for.
        GraphRefused: TensorRT's parser refuses the graph.
        CheckpointError: no ONNX graph.
        EnvironmentProblem: the build fails; says what TensorRT complained of.
    """
    monitor = Monitor(progress)
    with ThreadPoolExecutor(1, thread_name_prefix="build") as pool:
        build = pool.submit(_build, graph, options, classes, timing_cache, monitor)
        try:
            while not wait([build], timeout=_POLL_S).done:
                pass  # here a signal is raised, as no other wait lets it
        except BaseException:
            monitor.cancel()
            raise
        return build.result()


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings have no types
    """Tells of the outermost phase, and stops the build when it is cancelled.

    TensorRT calls it from threads of its own, and swallows what it raises.
    """

    def __init__(self, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self.failure: Exception | None = None
        self._progress = progress
        self._cancelled = threading.Event()
        self._steps: dict[str, int] = {}
        """Steps of the outermost phases."""

    def cancel(self) -> None:
        """Stop the build at its next step."""
        self._cancelled.set()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Take note of a phase."""
        if not parent_phase:
            self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Return whether to go on."""
        if phase_name in self._steps:
            self._tell(step + 1, phase_name)
        return self.failure is None and not self._cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """Forget a phase."""
        self._steps.pop(phase_name, None)

    def _tell(self, done: int, phase: str) -> None:
        try:
            self._progress(min(done, self._steps[phase]), self._steps[phase], phase)
        except Exception as error:  # raised where the build was called
            self.failure = error


def network_source(graph: Path) -> bytes:
    """Return an ONNX file as TensorRT is to read it: the class matrix is an input without default.

    TensorRT takes an input with a default for a constant. Weights outside of the file stay there.

    Raises:
        CheckpointError: no ONNX file.
    """
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's own, which differ between its implementations
        raise CheckpointError(f"{graph}: expected an ONNX graph, found: {error}") from error
    inputs = {value.name for value in model.graph.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    source: bytes = model.SerializeToString()
    return source


def _build(
    graph: Path, options: BuildOptions, classes: Span, timing_cache: Path, monitor: Monitor
) -> Built:
    builder = trt.Builder(LOG)
    network = _network(builder, graph)
    config = builder.create_builder_config()
    _configure(config, options)
    _add_profiles(builder, network, config, options.batches(), classes)
    if FLAVOUR == RTX:  # has neither timing caches nor levels of compatibility
        _set_capabilities(config, options.compute)
    else:
        level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE[options.hardware])
        config.hardware_compatibility_level = level
        _use_timing_cache(config, timing_cache)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise EnvironmentProblem(
            f"{graph.name}: {NAME} built no engine: {LOG.last_error()}; give another "
            "--workspace, or a smaller largest --batch where memory is short"
        )
    if FLAVOUR != RTX:
        artifact.write_bytes(timing_cache, bytes(config.get_timing_cache().serialize()))
    return Built(bytes(plan), _products(network), read_layers(LOG.listing()))


def _network(builder: Any, graph: Path) -> Any:
    # TensorRT 11 knows no other networks and gives the flag another number: never a literal.
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, LOG)
    # The path says where weights outside of the file are.
    if not parser.parse(network_source(graph), str(graph)):
        reasons = "; ".join(_refusals(parser))
        raise GraphRefused(
            f"{graph}: expected a graph that {NAME} can read, found: "
            f"{reasons or LOG.last_error()}; export again with this version, in fp32, fp16 or "
            "bf16, or update TensorRT"
        )
    return network


def _refusals(parser: Any) -> Iterator[str]:
    """Say why nodes are refused, once for each operator: every node of it is, one by one."""
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    nodes = Counter((error.node_operator(), error.desc()) for error in errors)
    first = {(e.node_operator(), e.desc()): e.node_name() for e in reversed(errors)}
    for (operator, reason), count in nodes.items():
        others = f", and {count - 1} more nodes" if count > 1 else ""
        # "false" is all that the parser says of an operator that it does not have.
        told = "no such operator" if reason == "false" else reason
        yield f"{first[operator, reason]} ({operator}{others}): {told}"


def _configure(config: Any, options: BuildOptions) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; would move edges of the cut's graph
    config.builder_optimization_level = options.opt_level
    # The inspector tells types only in this one: they are what is proven.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0  # one stream, one chain of nodes in the CUDA graph
    if options.workspace_gib is not None:
        size = int(options.workspace_gib * 2**30)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Otherwise the plan would hold code for the host, which a reader has to allow.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)


def _set_capabilities(config: Any, capabilities: Sequence[str]) -> None:
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(capabilities)
    for number, capability in enumerate(capabilities):
        kind = known.get(f"SM{capability.replace('.', '')}")
        if kind is None or not config.set_compute_capability(kind, number):
            raise UsageError(
                f"--compute {capability}: expected compute capabilities that {NAME} builds for, "
                f"which are {', '.join(buildable_capabilities())}; other GPUs, such as those of "
                "data centres, need TensorRT on the GPU itself"
            )


def buildable_capabilities() -> list[str]:
    """Return what TensorRT for RTX builds for, such as "8.9"."""
    names = (name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    return [f"{name[2:-1]}.{name[-1]}" for name in names]


def _add_profiles(
    builder: Any, network: Any, config: Any, batches: Sequence[Span], classes: Span
) -> None:
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    for batch in batches:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            span = classes if tensor.name == "classifier" else batch
            fixed = tuple(tensor.shape)[1:]
            sizes = ((size, *fixed) for size in (span.least, span.opt, span.most))
            profile.set_shape(tensor.name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise EnvironmentProblem(
                f"batch {batch}: expected a profile that {NAME} takes, found "
                f"that it refuses it: {LOG.last_error()}; choose another --batch"
            )


def _use_timing_cache(config: Any, path: Path) -> None:
    """Start from the file's measurements if they are of this version and GPU, or from none."""
    for known in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, False):
            return
    raise EnvironmentProblem(
        f"{NAME} takes no timing cache, not even an empty one: {LOG.last_error()}; reinstall it"
    )


def _products(network: Any) -> Counter[str]:
    layers = map(network.get_layer, range(network.num_layers))
    products = (layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY)
    return Counter(layer.get_input(0).dtype.name for layer in products)
