"""A classifier as an ONNX file, compared with PyTorch before it is written.

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

from advmoe.core.errors import UserError, first_line
from advmoe.core.files import canonical_json, write_bytes
from advmoe.data.dataset import Facts
from advmoe.models import classifiers
from advmoe.reporting.export import extra
from advmoe.reporting.export.provenance import Description, describe
from advmoe.runtime.machine import generator

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (what torch.onnx translates with)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
except ImportError as error:
    raise extra.missing(error) from error

INPUT, OUTPUT = "pixels", "log_probabilities"
OPSET = 18  # the lowest that the translator writes without converting: the more runtimes can read it
TOLERANCE = 1e-4  # of a log-probability; float32 sums in another order differ by 1e-6
BATCHES = (1, 2, 7)
LARGEST = 2**31 - 1  # bytes; protobuf's limit for one message


@dataclass(frozen=True)
class Checked:
    """How an ONNX model compares with PyTorch: the largest difference of a log-probability over so many images.

    On each of the images the two decide for the same class, otherwise there is no file.
    """

    images: int
    difference: float


def export_onnx(artifact: Path, file: Path) -> Checked:
    """Write the classifier in `artifact` as an ONNX `file`, if onnxruntime computes with it what PyTorch does.

    Input "pixels", float32 (B, C, H, W) in [0, 1] for any B; output "log_probabilities" (B, K). The model's metadata
    holds `class_names` (a JSON list) and `advmoe` (the description, as in config.json of an export for the Hub).
    Raises UserError, and writes nothing, when the artifact is missing or damaged, the network cannot be translated, a
    log-probability differs by more than TOLERANCE, or a decision differs.
    """
    if file.suffix != ".onnx":
        raise UserError(f"{file}: the name of an ONNX file must end with .onnx")
    classifier = classifiers.load(artifact)
    model, facts = classifiers.with_log_softmax(classifier), classifier.about.facts
    content = _serialised(_labelled(translate(model, facts), describe(artifact, classifier)))
    checked = compare(content, model, probes(facts))
    write_bytes(file, content)
    return checked


def translate(model: nn.Module, facts: Facts) -> onnx.ModelProto:
    """The network as ONNX, valid and without traces of this machine. Raises UserError if it has no translation."""
    # two images: a batch of one would be taken for a constant
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
        raise UserError(f"the network cannot be translated to ONNX ({first_line(error)})") from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # every node tells the path of the source file that it came from
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError("the network cannot be translated to ONNX (it ties itself to the number of images in a batch)")
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """The translator thinks aloud, over several pages; what matters of it is in the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _labelled(proto: onnx.ModelProto, description: Description) -> onnx.ModelProto:
    labels = {
        "class_names": json.dumps(description.facts.class_names),
        "advmoe": canonical_json(description.model_dump(mode="json")),
    }
    onnx.helper.set_model_props(proto, labels)
    return proto


def _serialised(proto: onnx.ModelProto) -> bytes:
    size = proto.ByteSize()
    if size > LARGEST:
        raise UserError(f"the network takes {size / 2**30:.1f} GiB, but one ONNX file holds 2 GiB at most")
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


def probes(facts: Facts) -> list[Tensor]:
    """Batches of several sizes to compare on: noise, and images of nothing but black and white."""
    stream = generator("export", "probes")
    shape = (facts.channels, facts.height, facts.width)
    noise = [torch.rand(size, *shape, generator=stream) for size in BATCHES]
    return [*noise, torch.zeros(1, *shape), torch.ones(1, *shape), torch.rand(7, *shape, generator=stream).round()]


def compare(content: bytes, model: nn.Module, batches: Sequence[Tensor]) -> Checked:
    """Run a serialised ONNX model and the PyTorch `model` on the same batches of pixels (B, C, H, W).

    Raises UserError when a log-probability differs by more than TOLERANCE, or a decision differs.
    """
    session = _session(content)
    with torch.no_grad():
        ours_BK = torch.cat([model(images_BCHW) for images_BCHW in batches]).numpy()
    theirs_BK = np.concatenate([session.run([OUTPUT], {INPUT: batch_BCHW.numpy()})[0] for batch_BCHW in batches])
    images, difference = len(ours_BK), float(np.abs(ours_BK - theirs_BK).max())
    disagreed = int((ours_BK.argmax(1) != theirs_BK.argmax(1)).sum())
    if not difference <= TOLERANCE or disagreed:  # so asked, NaN is refused
        raise UserError(
            f"onnxruntime and PyTorch differ by {difference:.1e} in a log-probability and decide differently on "
            f"{disagreed} of {images} images; nothing was written"
        )
    return Checked(images, difference)


def _session(content: bytes) -> "onnxruntime.InferenceSession":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; remarks on the machine's devices are of no use here
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
