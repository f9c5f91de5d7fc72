"""Commands about models and attacks: list, predict, inspect, export."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe.cli.application import MODELS, app, start_single_process
from advmoe.core import console, paths
from advmoe.core.errors import UserError


@app.command(rich_help_panel=MODELS)
def attacks() -> None:
    """List the attacks: norms, access, cost, source."""
    from advmoe.attacks import presets

    console.text_table("attacks, with their standard settings", presets.TABLE_COLUMNS, presets.attack_table())
    console.info("params.yaml sets their numbers for the pipeline; --steps sets the steps of one evaluation")


@app.command(rich_help_panel=MODELS)
def predict(
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files.")],
    model: Annotated[Path, typer.Option(help="A classifier artifact.")] = paths.MIXTURE,
) -> None:
    """Classify image files: class, probability, gate weights, and the prediction of each expert."""
    start_single_process()
    from advmoe.models import classifiers, prediction

    for found in prediction.predict(classifiers.load(model), images):
        console.info(f"{found.path}: {found.label} ({found.probability:.1%})")
        if found.expert_predictions:
            rows = [
                [each.expert, f"{each.weight:.3f}", each.label, f"{each.probability:.1%}"]
                for each in found.expert_predictions
            ]
            console.table("", ["expert", "gate weight", "class", "probability"], rows)


@app.command(rich_help_panel=MODELS)
def inspect(file: Annotated[Path, typer.Argument(help="An artifact of this project.")]) -> None:
    """Print the header of an artifact, after its content is checked against its hash."""
    from advmoe.core import artifacts

    console.out.print_json(artifacts.load(file).header.model_dump_json())


@app.command(rich_help_panel=MODELS)
def export(
    model: Annotated[Path, typer.Option(help="A classifier artifact.")] = paths.MIXTURE,
    hub: Annotated[Path | None, typer.Option(help="A folder for huggingface_hub: weights, config, model card.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="An ONNX file, checked against PyTorch.")] = None,
) -> None:
    """Export a classifier to a Hugging Face Hub folder or to ONNX, with its provenance."""
    if hub is None and onnx is None:
        raise UserError("nothing to export to: give --hub FOLDER, --onnx FILE, or both")
    start_single_process()
    if hub is not None:
        from advmoe.reporting.export.hub import export_hub, find_model_card

        export_hub(model, hub, find_model_card(model))
        console.info(f"{hub}: RobustClassifier.from_pretrained({str(hub)!r}) loads it; `hf upload` publishes it")
    if onnx is not None:
        from advmoe.reporting.export.onnx import export_onnx

        checked = export_onnx(model, onnx)
        console.info(
            f"{onnx}: onnxruntime predicts the same classes as PyTorch on {checked.images} images, "
            f"log-probabilities differ by {checked.difference:.1g} at most"
        )
