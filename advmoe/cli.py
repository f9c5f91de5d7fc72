"""The command line: wiring, no behaviour. Torch is imported inside commands only, so that `--help` is quick."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from advmoe.core import console, files, paths
from advmoe.core.errors import UserError
from advmoe.runtime import signals

_last: list[Callable[[], None]] = []  # what is to be done when the command has ended well


def _done(*_: object, **__: object) -> None:
    for each in _last:
        each()


app = typer.Typer(
    result_callback=_done,
    help="Robust image classifiers from a mixture of adversarially trained experts, and the evidence for them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
STAGES, QUESTIONS = "Stages (dvc repro runs them)", "Questions and tools"
EXIT_MISTAKE = 2


def main() -> None:
    """Run the command line; a user's mistake ends with one sentence and code 2, a signal with 128 and its number."""
    _last.clear()
    try:
        with signals.handle_signals():
            app()
    except UserError as error:
        console.fail(f"error: {error}")
        sys.exit(EXIT_MISTAKE)
    except signals.Interrupted as signalled:
        console.err.print(f"interrupted; {signals.RESUME_HINT}", style="red")
        sys.exit(signalled.exit_code)


def _stage() -> None:
    """What every stage does first: the whole of params.yaml must be sound, then threads and determinism are set."""
    _check()
    _torch()


@contextmanager
def _shared_stage() -> Iterator[None]:
    """A stage that the processes of torchrun work at together."""
    _check()
    from advmoe.runtime import distributed, machine

    machine.prepare_torch()
    with distributed.process_group():
        yield


def _check() -> None:
    from advmoe.config import schema, validation
    from advmoe.core import settings
    from advmoe.runtime import machine

    _last.append(settings.watched())
    machine.refuse_unknown_launchers()
    validation.check_dvc_file(schema.load_params())


def _torch() -> None:
    """For work that one process does; where torchrun has started several, the others leave it to the first."""
    from advmoe.runtime import distributed, machine

    if distributed.is_secondary_process():
        raise typer.Exit
    machine.prepare_torch()


@app.command(rich_help_panel=STAGES)
def prepare() -> None:
    """Images of one source to fixed splits."""
    _stage()
    from stages import prepare as stage

    stage.run()


@app.command(rich_help_panel=STAGES)
def pretrain(name: Annotated[str, typer.Argument(help="An expert of params.yaml, e.g. fgsm-1.")]) -> None:
    """Train one expert on its own."""
    with _shared_stage():
        from stages import pretrain as stage

        stage.run(name)


@app.command(rich_help_panel=STAGES)
def train() -> None:
    """Train gate and experts jointly."""
    with _shared_stage():
        from stages import train as stage

        stage.run()


@app.command(rich_help_panel=STAGES)
def baseline(name: Annotated[str, typer.Argument(help="A baseline of params.yaml, e.g. adversarial.")]) -> None:
    """Train one plain network to compare with."""
    with _shared_stage():
        from stages import baseline as stage

        stage.run(name)


@app.command(rich_help_panel=STAGES)
def evaluate(
    attack: Annotated[
        list[str] | None,
        typer.Option(help="An attack or preset (`advmoe attacks`), or path/to/file.py:function; may be repeated."),
    ] = None,
    epsilon: Annotated[str | None, typer.Option(help="Radius, 8/255 or 0.03.")] = None,
    norm: Annotated[Literal["linf", "l2"] | None, typer.Option(help="Norm of the radius; linf by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of iterative attacks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A classifier artifact, or path/to/model.py:factory (runs that file). Default: the mixture."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, .pt, .pth.")] = None,
    expert: Annotated[str | None, typer.Option(help="Only this expert of the model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Images and labels as .npz. Default: the test split.")] = None,
    training_data: Annotated[Path | None, typer.Option(help="What the model was trained on, .npz.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once; default: what fits.")] = None,
    checks: Annotated[bool, typer.Option(help="Ask the ten checks whether the numbers may be believed.")] = True,
) -> None:
    """Without options the stage: everything, for the record. With any option a quick question about one model."""
    asked = (attack, epsilon, norm, steps, limit, model, weights, expert, data, training_data, batch_size)
    if all(option is None or option == [] for option in asked) and checks:
        with _shared_stage():
            from stages import evaluate as stage

            return stage.run()
    _torch()
    from advmoe.evaluation.adhoc import run_request
    from advmoe.evaluation.request import EvaluationRequest

    question = EvaluationRequest(
        model=model or str(paths.MIXTURE),
        attacks=attack or (),
        epsilon=epsilon,
        norm=norm or "linf",
        steps=steps,
        limit=limit,
        weights=weights,
        expert=expert,
        data=data,
        training_data=training_data,
        batch_size=batch_size,
        checks=checks,
    )
    run_request(question)
    return None


@app.command(rich_help_panel=STAGES)
def poison(
    name: Annotated[str, typer.Argument(help="An attack of params.yaml, poison.attacks, e.g. badnets.")],
    rate: Annotated[list[float] | None, typer.Option(help="Share of poison, e.g. 0.1; may be repeated.")] = None,
    target: Annotated[int | None, typer.Option(min=0, help="The class that the attacker wants.")] = None,
    victim: Annotated[
        list[str] | None,
        typer.Option(help="mixture, mixture-joint (only the joint phase is poisoned), a baseline; may be repeated."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Added to the project's seed; may be repeated.")] = None,
    defence: Annotated[list[str] | None, typer.Option(help="A detector of poison.defence; may be repeated.")] = None,
) -> None:
    """Without options the stage: one attack on the training data, for the record. With any option a quick question."""
    if all(option is None or option == [] for option in (rate, target, victim, seed, defence)):
        _stage()
        from stages import poison as stage

        return stage.run(name)
    _stage()
    from advmoe.threats.poisoning.adhoc import PoisonRequest, run_request

    run_request(PoisonRequest(name, rate or (), target, victim or (), seed or (), defence or ()))
    return None


@app.command(rich_help_panel=STAGES)
def extract(
    name: Annotated[str, typer.Argument(help="An attack of params.yaml, extract.attacks, e.g. knockoff.")],
    budget: Annotated[list[int] | None, typer.Option(help="Queries, one an image; may be repeated.")] = None,
    answers: Annotated[list[str] | None, typer.Option(help="soft, top1 or rounded-2; may be repeated.")] = None,
    victim: Annotated[
        list[str] | None,
        typer.Option(
            help="mixture, a baseline, expert/NAME, an artifact, or path/to/file.py:factory (runs that file); "
            "may be repeated."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, .pt, .pth.")] = None,
    surrogate: Annotated[list[str] | None, typer.Option(help="Of extract.surrogates; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Added to the project's seed; may be repeated.")] = None,
) -> None:
    """Without options the stage: one attack by queries alone, for the record. With any option a quick question."""
    _stage()
    if all(option is None or option == [] for option in (budget, answers, victim, weights, surrogate, seed)):
        from stages import extract as stage

        return stage.run(name)
    from advmoe.threats.extraction.adhoc import ExtractionRequest, run_request

    run_request(
        ExtractionRequest(name, budget or (), answers or (), victim or (), surrogate or (), seed or (), weights)
    )
    return None


@app.command(rich_help_panel=STAGES)
def membership() -> None:
    """Find out which training images the networks give away."""
    _stage()
    from stages import membership as stage

    stage.run()


@app.command(rich_help_panel=STAGES)
def report(
    records: Annotated[
        list[str] | None,
        typer.Argument(help="Two git revisions, DVC experiments or folders to compare; none for the report itself."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write the report, or compare two experiments side by side."""
    if records:
        from advmoe.reporting.report import comparison_files

        page = comparison_files.compare_and_write(records)
    else:
        _stage()
        from stages import report as stage

        page = stage.run()
    if show:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command(rich_help_panel=QUESTIONS)
def findings(
    record: Annotated[str, typer.Argument(help="A git revision, a DVC experiment or a folder.")] = ".",
) -> None:
    """Judge a record's claims again, from its decisions image by image."""
    from advmoe.reporting import recheck

    recheck.show(record)


@app.command(rich_help_panel=QUESTIONS)
def aggregate(
    records: Annotated[
        list[str] | None,
        typer.Argument(help="Git revisions, DVC experiments or folders; default: all experiments and this folder."),
    ] = None,
) -> None:
    """Test the report's claims over at least three seeds: about methods, not about one set of weights."""
    from advmoe.config import schema
    from advmoe.core.snapshots import open_snapshot
    from advmoe.statistics import aggregation

    claims = schema.load_params().report.claims
    chosen = [open_snapshot(name) for name in records or ()]
    found = aggregation.aggregate(chosen or aggregation.available(), claims, chosen=bool(chosen))
    aggregation.write(found, paths.AGGREGATE)
    aggregation.show(found)
    console.say(f"written to {paths.AGGREGATE}; `dvc repro report` takes it into the report")


@app.command(rich_help_panel=QUESTIONS)
def export(
    model: Annotated[Path, typer.Option(help="A classifier artifact.")] = paths.MIXTURE,
    hub: Annotated[Path | None, typer.Option(help="A folder for huggingface_hub: weights, config, model card.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="An ONNX file, checked against PyTorch.")] = None,
) -> None:
    """Write a classifier in a form that others load, with all that is known of its origin."""
    if hub is None and onnx is None:
        raise UserError("nothing to export to: say --hub FOLDER, --onnx FILE, or both")
    _torch()
    if hub is not None:
        from advmoe.reporting.export.hub import card_beside, export_hub

        export_hub(model, hub, card_beside(model))
        console.say(f"{hub}: RobustClassifier.from_pretrained({str(hub)!r}) loads it; `hf upload` publishes it")
    if onnx is not None:
        from advmoe.reporting.export.onnx import export_onnx

        checked = export_onnx(model, onnx)
        console.say(
            f"{onnx}: onnxruntime decides as PyTorch does on {checked.images} images, "
            f"log-probabilities differ by {checked.difference:.1g} at most"
        )


@app.command(rich_help_panel=QUESTIONS)
def attacks() -> None:
    """List the attacks: norms, access, cost, source."""
    from advmoe.attacks import presets

    console.listing("attacks, with their standard settings", presets.COLUMNS, presets.rows())
    console.say("params.yaml sets their numbers for the pipeline; --steps sets the steps of one question")


@app.command(rich_help_panel=QUESTIONS)
def results() -> None:
    """Show the results of the last `dvc repro` and where they lie."""
    from advmoe.evaluation import summary as shown
    from advmoe.threats.extraction import report as extraction
    from advmoe.threats.membership import report as membership_audit
    from advmoe.threats.poisoning import report as poisoning

    poisoning.show_record()
    extraction.show_record()
    membership_audit.show_record()
    shown.show()


@app.command(rich_help_panel=QUESTIONS)
def use(
    profile: Annotated[
        list[str], typer.Argument(help="A file of profiles/, without .yaml; more: laid over it in turn.")
    ],
) -> None:
    """Lay a profile over params.yaml, comments kept."""
    from advmoe.config import profiles

    changed = profiles.use(*profile)
    agrees = f"params.yaml already agrees with {files.names(profile)}"
    console.say(f"params.yaml: {files.names(changed)}" if changed else agrees)


@app.command(rich_help_panel=QUESTIONS)
def check() -> None:
    """Validate params.yaml, dvc.yaml and the environment, and say what would run."""
    from advmoe.config import validation

    pending = validation.check()
    console.say("params.yaml, dvc.yaml and the environment are sound")
    console.say(f"dvc repro would run: {files.names(pending)}" if pending else "dvc repro has nothing to do")


@app.command(rich_help_panel=QUESTIONS)
def cost(
    flops: Annotated[
        float | None, typer.Option(min=1.0, help="Operations a second, e.g. 300e12; default: measured here.")
    ] = None,
) -> None:
    """Forecast what params.yaml costs: operations and hours of each stage."""
    from advmoe.config import schema

    params = schema.load_params()
    _torch()
    from advmoe.config import cost_forecast

    cost_forecast.show(params, flops)


@app.command(rich_help_panel=QUESTIONS)
def inspect(file: Annotated[Path, typer.Argument(help="An artifact of this project.")]) -> None:
    """Print what an artifact says of itself; its content is checked against its hash."""
    from advmoe.core import artifacts

    console.out.print_json(artifacts.load(file).header.model_dump_json())


@app.command(rich_help_panel=QUESTIONS)
def predict(
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files.")],
    model: Annotated[Path, typer.Option(help="A classifier artifact.")] = paths.MIXTURE,
) -> None:
    """Classify image files: class, probability, gate weights, each expert's vote."""
    _torch()
    from advmoe.models import classifiers, prediction

    for found in prediction.predict(classifiers.load(model), images):
        console.say(f"{found.path}: {found.label} ({found.probability:.1%})")
        if found.votes:
            rows = [[vote.expert, f"{vote.weight:.3f}", vote.label, f"{vote.probability:.1%}"] for vote in found.votes]
            console.table("", ["expert", "gate weight", "votes for", "probability"], rows)


@app.command(rich_help_panel=QUESTIONS)
def clean(
    everything: Annotated[bool, typer.Option("--all", help="What could still go on, too.")] = False,
) -> None:
    """Remove what killed work of other versions left behind; never what is in use."""
    from advmoe.runtime.checkpoints import workdir

    found = workdir.clean(everything=everything)
    console.say(f"{found.removed} pieces of unfinished work removed, {found.freed / 1e6:.1f} MB")
    if found.resumable:
        console.say(f"{found.resumable} can go on where they were; `advmoe clean --all` removes them too")
    if found.in_use:
        console.say(f"{found.in_use} left alone: a process is at work on them")


@app.command(rich_help_panel=QUESTIONS)
def info() -> None:
    """Show this machine: device, threads, folders, versions."""
    _torch()
    from advmoe.runtime import machine

    console.table("this machine", ["what", "value"], machine.describe())
