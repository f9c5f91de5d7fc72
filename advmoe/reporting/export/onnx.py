"""Exports a classifier as an ONNX file, after comparing its outputs with PyTorch.

Needs the extra `advmoe[export]`. Shapes: B batch, C channel, H/W pixels, K classes.
"""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.core.errors import UserError, error_summary
from advmoe.core.files import canonical_json, write_bytes
from advmoe.data.dataset import DatasetInfo
from advmoe.models import classifiers
from advmoe.reporting.export import extra
from advmoe.reporting.export.provenance import Description, describe
from advmoe.runtime.machine import generator

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (used by torch.onnx)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
except ImportError as error:
    raise extra.missing_package_error(error) from error

INPUT, OUTPUT = "pixels", "log_probabilities"
OPSET = 18  # the lowest that torch.onnx writes without conversion, for the largest number of runtimes
TOLERANCE = 1e-4  # of a log-probability; float32 sums in another order differ by about 1e-6
BATCH_SIZES = (1, 2, 7)
MAX_BYTES = 2**31 - 1  # protobuf's limit for one message


@dataclass(frozen=True)
class OnnxComparison:
    """The largest `difference` of a log-probability between ONNX and PyTorch; `images`: number of images compared.

    The predicted classes are equal on all of them.
    """

    images: int
    difference: float


def export_onnx(artifact: Path, file: Path) -> OnnxComparison:
    """Exports the classifier in `artifact` as an ONNX `file`, if onnxruntime and PyTorch agree on it.

    Input "pixels", float32 (B, C, H, W) in [0, 1] for any B; output "log_probabilities" (B, K). The model's metadata
    holds `class_names` (a JSON list) and `advmoe` (the description, as in config.json of an export for the Hub).
    Raises UserError, and writes nothing, when the artifact is missing or damaged, the network cannot be converted, a
    log-probability differs by more than TOLERANCE, or a predicted class differs.
    """
    if file.suffix != ".onnx":
        raise UserError(f"{file}: the name of an ONNX file must end with .onnx")
    classifier = classifiers.load(artifact)
    model, facts = classifiers.with_log_softmax(classifier), classifier.about.facts
    content = _serialise(_with_metadata(to_onnx(model, facts), describe(artifact, classifier)))
    comparison = compare_outputs(content, model, comparison_batches(facts))
    write_bytes(file, content)
    return comparison


def to_onnx(model: nn.Module, facts: DatasetInfo) -> onnx.ModelProto:
    """Converts a network to ONNX, without paths of this machine. Raises UserError if that is impossible."""
    # two images: a batch size of one would become a constant
    example_BCHW = torch.zeros(2, facts.channels, facts.height, facts.width)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example_BCHW,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"the network cannot be converted to ONNX ({error_summary(error)})") from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # every node holds the path of its source file
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError("the network cannot be converted to ONNX (it depends on the number of images in a batch)")
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the output of torch.onnx; its errors are raised as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _with_metadata(proto: onnx.ModelProto, description: Description) -> onnx.ModelProto:
    labels = {
        "class_names": json.dumps(description.facts.class_names),
        "advmoe": canonical_json(description.model_dump(mode="json")),
    }
    onnx.helper.set_model_props(proto, labels)
    return proto


def _serialise(proto: onnx.ModelProto) -> bytes:
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise UserError(f"the network takes {size / 2**30:.1f} GiB, but one ONNX file holds 2 GiB at most")
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


def comparison_batches(facts: DatasetInfo) -> list[Tensor]:
    """Returns batches (B, C, H, W) of several sizes to compare on: uniform noise, black, white, and binary noise."""
    stream = generator("export", "probes")
    shape = (facts.channels, facts.height, facts.width)
    noise = [torch.rand(size, *shape, generator=stream) for size in BATCH_SIZES]
    return [*noise, torch.zeros(1, *shape), torch.ones(1, *shape), torch.rand(7, *shape, generator=stream).round()]


def compare_outputs(content: bytes, model: nn.Module, batches: Sequence[Tensor]) -> OnnxComparison:
    """Runs a serialised ONNX model and the PyTorch `model` on the same batches of pixels (B, C, H, W).

    Raises UserError when a log-probability differs by more than TOLERANCE, or a predicted class differs.
    """
    session = _session(content)
    with torch.no_grad():
        torch_BK = torch.cat([model(images_BCHW) for images_BCHW in batches]).numpy()
    onnx_BK = np.concatenate([session.run([OUTPUT], {INPUT: batch_BCHW.numpy()})[0] for batch_BCHW in batches])
    images, difference = len(torch_BK), float(np.abs(torch_BK - onnx_BK).max())
    different = int((torch_BK.argmax(1) != onnx_BK.argmax(1)).sum())
    if not difference <= TOLERANCE or different:  # also true for NaN
        raise UserError(
            f"onnxruntime and PyTorch differ by {difference:.1e} in a log-probability and predict different classes on "
            f"{different} of {images} images; nothing was written"
        )
    return OnnxComparison(images, difference)


def _session(content: bytes) -> "onnxruntime.InferenceSession":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
