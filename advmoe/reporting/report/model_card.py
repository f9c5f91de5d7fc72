"""The model card: Markdown with the front matter of the Hugging Face Hub, to lie beside the mixture's artifact."""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML

from advmoe import __version__
from advmoe.core import paths
from advmoe.core.artifacts import Header
from advmoe.core.snapshots import Snapshot, commit_of
from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report import overview, paper_comparison, threats
from advmoe.reporting.report.document import Section
from advmoe.reporting.report.formats import count, large, radius
from advmoe.reporting.report.markdown import blocks, escape, fenced
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.decisions import CLEAN, WORST

LICENSE = "mit"
TAGS = ("adversarial-robustness", "adversarial-training", "mixture-of-experts", "pytorch", "safetensors")
HUB = {  # what the Hub calls our sources; it knows no scikit-learn digits
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}
CITATION = """@misc{arxiv2512.20821,
  title = {Divided We Fall: Defending Against Adversarial Attacks via Soft-Gated Fractional Mixture-of-Experts with
           Randomized Adversarial Training},
  author = {Meymani, Mohammad and Razavi-Far, Roozbeh},
  year = {2025},
  eprint = {2512.20821},
  archivePrefix = {arXiv},
}"""


def card(record: Snapshot, header: Header | None = None, name: str = "mixture of experts") -> str:
    """The card of a record's mixture. `header`: of its artifact, where it is at hand: hashes and PyTorch's version.

    A headline that a failed check withholds is withheld here too. Raises UserError for files of another schema.
    """
    sources = Sources(record)
    parts = [
        f"---\n{_front(sources, name)}---",
        f"# {escape(name)}",
        *_intended(sources),
        *_training(sources),
        *_evaluation(sources),
        *_limitations(sources),
        *_loading(),
        *_provenance(sources, header),
        "## Citation",
        f"The method:\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front(sources: Sources, name: str) -> str:
    source = _source(sources)
    front: dict[str, Any] = {
        "license": LICENSE,
        "library_name": "advmoe",
        "pipeline_tag": "image-classification",
        "tags": list(TAGS),
    }
    if source in HUB:
        front["datasets"] = [HUB[source]]
    results = list(_results(sources))
    if results:
        dataset = {"name": source, "type": HUB.get(source, source), "split": "test"}
        task = {"type": "image-classification"}
        front["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": results}]}]
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.dump(front, text)
    return text.getvalue()


def _source(sources: Sources) -> str:
    return str(sources.params.get("prepare", {}).get("source", {}).get("kind", "unknown"))


def _results(sources: Sources) -> Iterator[dict[str, Any]]:
    """Accuracies of the mixture that may be printed."""
    mixture = sources.models.get(MIXTURE)
    if mixture is None:
        return
    for kind, share in mixture["accuracy"].items():
        if share is not None:
            yield {"type": "accuracy", "value": share["accuracy"], "name": _metric(kind, mixture["epsilon"])}


def _metric(kind: str, epsilon: float) -> str:
    what = {CLEAN: "clean accuracy", WORST: "worst case over all attacks"}.get(kind, f"accuracy under {kind}")
    return what if kind == CLEAN else f"{what}, L-inf {epsilon:g}"


def _intended(sources: Sources) -> Iterable[str]:
    yield "## Intended use"
    yield (
        f"A classifier of images like those in {escape(_source(sources))}, made to study how far a mixture of "
        "adversarially trained experts withstands small perturbations, and to be attacked. It is no safeguard: nobody "
        "should rely on its robustness where a wrong answer does harm, nor on images of another kind or size."
    )


def _training(sources: Sources) -> Iterable[str]:
    params, prepared = sources.params, sources.prepared
    yield "## Training"
    if prepared:
        sizes = f"{count(prepared['train_images'])} training and {count(prepared['test_images'])} test images"
        yield f"Data: {escape(_source(sources))}, {sizes}, {prepared['classes']} classes."
    if params:
        yield from blocks(paper_comparison.section(sources).blocks)
    cost = sources.trained("train").get(MIXTURE, {}).get("cost")
    if cost:
        spent = f"{large(cost['total_training_flops'])} FLOPs for all of its training"
        yield f"It has {large(cost['parameters'])} parameters and took {spent}."


def _evaluation(sources: Sources) -> Iterable[str]:
    head = overview.head(sources)
    yield "## Evaluation"
    yield f"**Verdict of the checks: {escape(head.verdict)}.** {escape(head.meaning)}"
    if head.number:
        yield f"**{head.number} %** (95 % interval {head.interval}) {escape(head.caption)}."
    if head.reasons:
        yield "\n".join(f"- withheld: {escape(reason)}" for reason in head.reasons)
    yield from blocks(overview.section(sources).blocks)


def _limitations(sources: Sources) -> Iterable[str]:
    head = overview.head(sources)
    yield "## Limitations"
    yield overview.BOUND
    if sources.summary:
        yield f"Nothing is known of perturbations beyond L-inf {radius(sources.summary['epsilon'])} or of other kinds."
    if head.findings:
        yield "\n".join(f"- {escape(f'{each.claim}: {each.status}. {each.sentence}')}" for each in head.findings)
    yield from map(escape, head.notes)
    for section in (threats.poisoning(sources), threats.extraction(sources), threats.membership(sources)):
        yield from _part(section)


def _part(section: Section) -> Iterable[str]:
    yield f"### {escape(section.title)}"
    yield from blocks(section.blocks)


def _loading() -> Iterable[str]:
    yield "## How to load it"
    yield f'```python\nimport advmoe\n\nmodel = advmoe.load_model("{paths.MIXTURE.name}")\n```'
    yield (
        "An `nn.Module` in eval mode: pixels in [0, 1], (B, C, H, W), in, log-probabilities (B, K) out; normalisation "
        "is inside. The file is safetensors; nothing in it is run."
    )


def _provenance(sources: Sources, header: Header | None) -> Iterable[str]:
    facts = {"made by": f"advmoe {__version__}", "record": sources.record.name, "commit": commit_of(sources.record)}
    output = sources.outputs.get(str(paths.MIXTURE))
    facts |= {"md5 of the file (dvc.lock)": output}
    if header is not None:
        facts |= {
            "PyTorch": header.torch,
            "sha256 of the tensors": header.sha256,
            "sha256 of the header": header.header_sha256,
        }
    yield "## Provenance"
    yield _facts(facts)
    if sources.params_text:
        yield f"<details><summary>params.yaml</summary>\n\n{fenced(sources.params_text, 'yaml')}\n\n</details>"


def _facts(facts: Mapping[str, str | None]) -> str:
    return "\n".join(f"- {escape(what)}: {escape(value)}" for what, value in facts.items() if value)
