"""Commands that are stages of the pipeline; evaluate, poison, extract and membership also run on request."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from advmoe.cli.application import STAGES, app, distributed_stage, refuse_options, start_single_process, start_stage
from advmoe.core import paths

Record = Annotated[
    bool, typer.Option("--record", help="Use the settings of params.yaml and write the tracked results (dvc.yaml).")
]


@app.command(rich_help_panel=STAGES)
def code() -> None:
    """Write a fingerprint of the code of every stage."""
    from stages import code as stage

    stage.run()


@app.command(rich_help_panel=STAGES)
def inputs() -> None:
    """Write the parameters that every stage reads."""
    start_stage("inputs")
    from stages import inputs as stage

    stage.run()


@app.command(rich_help_panel=STAGES)
def prepare() -> None:
    """Read the images of one source and write fixed splits."""
    start_stage("prepare")
    from stages import prepare as stage

    stage.run()


@app.command(rich_help_panel=STAGES)
def pretrain(name: Annotated[str, typer.Argument(help="An expert of params.yaml, e.g. fgsm-1.")]) -> None:
    """Train one expert on its own."""
    with distributed_stage("pretrain"):
        from stages import pretrain as stage

        stage.run(name)


@app.command(rich_help_panel=STAGES)
def experts() -> None:
    """Write which pre-trained experts mixtures start from."""
    start_stage("experts")
    from stages import experts as stage

    stage.run()


@app.command(rich_help_panel=STAGES)
def train() -> None:
    """Train gate and experts jointly."""
    with distributed_stage("train"):
        from stages import train as stage

        stage.run()


@app.command(rich_help_panel=STAGES)
def baseline(name: Annotated[str, typer.Argument(help="A baseline of params.yaml, e.g. adversarial.")]) -> None:
    """Train one network to compare the mixture with."""
    with distributed_stage("baseline"):
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
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images, from the first.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A classifier artifact, or path/to/model.py:factory (runs that file). Default: the mixture."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, .pt, .pth.")] = None,
    expert: Annotated[str | None, typer.Option(help="Only this expert of the model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Images and labels as .npz. Default: the test split.")] = None,
    training_data: Annotated[Path | None, typer.Option(help="The model's training data, .npz.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per batch; default: what fits.")] = None,
    checks: Annotated[bool, typer.Option(help="Run the ten checks of the evaluation.")] = True,
    record: Record = False,
) -> None:
    """Attack a model, check the evaluation, and print and save the result under runs/."""
    options = (attack, epsilon, norm, steps, limit, model, weights, expert, data, training_data, batch_size)
    if record:
        refuse_options((*options, None if checks else "--no-checks"))
        with distributed_stage("evaluate"):
            from stages import evaluate as stage

            return stage.run()
    start_single_process()
    from advmoe.evaluation.adhoc import run_request
    from advmoe.evaluation.request import EvaluationRequest

    request = EvaluationRequest(
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
    run_request(request)
    return None


@app.command(rich_help_panel=STAGES)
def poison(
    name: Annotated[str, typer.Argument(help="An attack of params.yaml, poison.attacks, e.g. badnets.")],
    rate: Annotated[list[float] | None, typer.Option(help="Share of poison, e.g. 0.1; may be repeated.")] = None,
    target: Annotated[int | None, typer.Option(min=0, help="The target class of the attack.")] = None,
    victim: Annotated[
        list[str] | None,
        typer.Option(help="mixture, mixture-joint (only the joint phase is poisoned), a baseline; may be repeated."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Added to the project's seed; may be repeated.")] = None,
    defence: Annotated[list[str] | None, typer.Option(help="A detector of poison.defence; may be repeated.")] = None,
    record: Record = False,
) -> None:
    """Poison the training data, train the victims again, and measure the effect; results go to runs/."""
    if record:
        refuse_options((rate, target, victim, seed, defence))
    start_stage("poison")
    if record:
        from stages import poison as stage

        return stage.run(name)
    from advmoe.threats.poisoning.adhoc import PoisonRequest, run_request

    run_request(PoisonRequest(name, rate or (), target, victim or (), seed or (), defence or ()))
    return None


@app.command(rich_help_panel=STAGES)
def extract(
    name: Annotated[str, typer.Argument(help="An attack of params.yaml, extract.attacks, e.g. knockoff.")],
    budget: Annotated[list[int] | None, typer.Option(help="Queries, one per image; may be repeated.")] = None,
    answers: Annotated[list[str] | None, typer.Option(help="soft, top1 or rounded-2; may be repeated.")] = None,
    victim: Annotated[
        list[str] | None,
        typer.Option(
            help="mixture, a baseline, expert/NAME, an artifact, or path/to/file.py:factory (runs that file); "
            "may be repeated."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, .pt, .pth.")] = None,
    surrogate: Annotated[list[str] | None, typer.Option(help="One of extract.surrogates; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Added to the project's seed; may be repeated.")] = None,
    record: Record = False,
) -> None:
    """Run a model extraction attack by queries; results go to runs/."""
    if record:
        refuse_options((budget, answers, victim, weights, surrogate, seed))
    start_stage("extract")
    if record:
        from stages import extract as stage

        return stage.run(name)
    from advmoe.threats.extraction.adhoc import ExtractionRequest, run_request

    run_request(
        ExtractionRequest(name, budget or (), answers or (), victim or (), surrogate or (), seed or (), weights)
    )
    return None


@app.command(rich_help_panel=STAGES)
def membership(
    victim: Annotated[list[str] | None, typer.Option(help="mixture or a baseline; may be repeated.")] = None,
    record: Record = False,
) -> None:
    """Run membership inference attacks; results go to runs/."""
    if record:
        refuse_options((victim,))
    start_stage("membership")
    if record:
        from stages import membership as stage

        return stage.run()
    from advmoe.threats.membership.adhoc import MembershipRequest, run_request

    run_request(MembershipRequest(victim or ()))
    return None


@app.command(rich_help_panel=STAGES)
def report(
    snapshots: Annotated[
        list[str] | None,
        typer.Argument(help="Two git revisions, DVC experiments or folders to compare; none for the report itself."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write the report, or compare two experiments side by side."""
    if snapshots:
        from advmoe.reporting.report import comparison_files

        page = comparison_files.compare_and_write(snapshots)
    else:
        start_stage("report")
        from stages import report as stage

        page = stage.run()
    if show:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
