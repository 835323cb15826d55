"""The ways to run a model that the latency suite compares: eager, compiled, and other runtimes.

Each takes a model and a batch, both on the device and in the precision, and gives a function of the
batch; or says, in one sentence, why it is not to be had here.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], object]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class NotHere(Exception):
    """Why a runtime cannot be had on this machine, device or precision."""


def make(runtime: str, model: nn.Module, images: Tensor) -> Forward:
    """The model in a runtime, warm.

    Parameters
    ----------
    runtime : str
        One of `RUNTIMES`.
    model : nn.Module
        In eval mode, on the device of the images and in their dtype.
    images : Tensor

    Raises
    ------
    NotHere
        With the reason.
    """
    run = RUNTIMES[runtime](model, images)
    run(images)
    return run


def _eager(model: nn.Module, images: Tensor) -> Forward:
    return model


def check_compiler(images: Tensor) -> None:
    """Raise `NotHere` where ``torch.compile`` finds no compiler."""
    if images.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise NotHere("torch.compile needs a C++ compiler for the CPU, and there is none")


def _compile(model: nn.Module, images: Tensor) -> Forward:
    check_compiler(images)
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def _cuda_graph(model: nn.Module, images: Tensor) -> Forward:
    if images.device.type != "cuda":
        raise NotHere("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the weights and images
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(images)
    # the graph reads them where they are: they have to live as long as it
    read = (model, images)

    def replay(_: Tensor) -> object:
        graph.replay()
        return result, read

    return replay


def _onnxruntime(model: nn.Module, images: Tensor) -> Forward:
    if not all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        raise NotHere("onnxruntime is not installed; pip install -e '.[export]'")
    if images.dtype == torch.bfloat16:
        raise NotHere("numpy, which onnxruntime takes, has no bfloat16")
    import onnxruntime

    provider = "CUDAExecutionProvider" if images.is_cuda else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise NotHere(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # else the threads of one model wait busily while the other, in its turn, needs the cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    (name,) = (value.name for value in session.get_inputs())
    return lambda x: session.run(None, {name: x.cpu().numpy()})


def _openvino(model: nn.Module, images: Tensor) -> Forward:
    if not find_spec("openvino"):
        raise NotHere("OpenVINO is not installed; pip install openvino")
    if images.is_cuda:
        raise NotHere("OpenVINO does not run on CUDA devices")
    if images.dtype != torch.float32:
        raise NotHere("OpenVINO chooses its own precision for a float32 model")
    import openvino

    with warnings.catch_warnings():
        # OpenVINO reads models through torch.jit, which newer versions of torch advise against
        warnings.simplefilter("ignore")
        made = openvino.convert_model(model, example_input=images)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(made, "CPU", config)
    return lambda x: compiled(x.numpy())


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Forward]] = {
    "eager": _eager,
    "compile": _compile,
    "cudagraph": _cuda_graph,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
