"""Renders the model card: Markdown with front matter for the Hugging Face Hub, next to the mixture's artifact."""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML

from advmoe import __version__
from advmoe.core import paths
from advmoe.core.artifacts import Header
from advmoe.core.snapshots import Snapshot, commit_hash
from advmoe.evaluation.summary import MIXTURE
from advmoe.reporting.report import overview, paper_comparison, threats
from advmoe.reporting.report.document import Section
from advmoe.reporting.report.formats import count, large_number, radius
from advmoe.reporting.report.markdown import blocks, escape, fenced
from advmoe.reporting.report.sources import Sources
from advmoe.statistics.decisions import CLEAN, WORST

LICENSE = "mit"
TAGS = ("adversarial-robustness", "adversarial-training", "mixture-of-experts", "pytorch", "safetensors")
HUB = {  # ids of the data sets on the Hub; it has no scikit-learn digits
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


def render_model_card(snapshot: Snapshot, header: Header | None = None, name: str = "mixture of experts") -> str:
    """Renders the model card of the mixture. `header`: of its artifact, if available, for hashes and PyTorch version.

    Withheld accuracies are left out. Raises UserError for files of another schema.
    """
    sources = Sources(snapshot)
    parts = [
        f"---\n{_front_matter(sources, name)}---",
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


def _front_matter(sources: Sources, name: str) -> str:
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
    """Yields the accuracies of the mixture that are not withheld."""
    mixture = sources.models.get(MIXTURE)
    if mixture is None:
        return
    for kind, proportion in mixture["accuracy"].items():
        if proportion is not None:
            yield {"type": "accuracy", "value": proportion["accuracy"], "name": _metric(kind, mixture["epsilon"])}


def _metric(kind: str, epsilon: float) -> str:
    what = {CLEAN: "clean accuracy", WORST: "worst case over all attacks"}.get(kind, f"accuracy under {kind}")
    return what if kind == CLEAN else f"{what}, L-inf {epsilon:g}"


def _intended(sources: Sources) -> Iterable[str]:
    yield "## Intended use"
    yield (
        f"A classifier of images like those in {escape(_source(sources))}, for research on the adversarial "
        "robustness of mixtures of experts. Its robustness is not a security guarantee: do not rely on it where wrong "
        "predictions cause harm, or on images of another kind or size."
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
        training = f"{large_number(cost['total_training_flops'])} FLOPs for training, including its experts"
        yield f"It has {large_number(cost['parameters'])} parameters and took {training}."


def _evaluation(sources: Sources) -> Iterable[str]:
    headline = overview.headline(sources)
    yield "## Evaluation"
    yield f"**Verdict of the checks: {escape(headline.verdict)}.** {escape(headline.meaning)}"
    if headline.number:
        yield f"**{headline.number} %** (95 % interval {headline.interval}) {escape(headline.caption)}."
    if headline.reasons:
        yield "\n".join(f"- withheld: {escape(reason)}" for reason in headline.reasons)
    yield from blocks(overview.section(sources).blocks)


def _limitations(sources: Sources) -> Iterable[str]:
    headline = overview.headline(sources)
    yield "## Limitations"
    yield overview.UPPER_BOUND_NOTE
    if sources.summary:
        yield f"Larger or other perturbations than L-inf {radius(sources.summary['epsilon'])} were not evaluated."
    if headline.claims:
        yield "\n".join(f"- {escape(f'{each.claim}: {each.status}. {each.sentence}')}" for each in headline.claims)
    yield from map(escape, headline.notes)
    for section in (
        threats.poisoning_section(sources),
        threats.extraction_section(sources),
        threats.membership_section(sources),
    ):
        yield from _part(section)


def _part(section: Section) -> Iterable[str]:
    yield f"### {escape(section.title)}"
    yield from blocks(section.blocks)


def _loading() -> Iterable[str]:
    yield "## Usage"
    yield f'```python\nimport advmoe\n\nmodel = advmoe.load_model("{paths.MIXTURE.name}")\n```'
    yield (
        "An `nn.Module` in eval mode: pixels in [0, 1], (B, C, H, W), in, log-probabilities (B, K) out, "
        "including normalisation. The file is safetensors and contains no code."
    )


def _provenance(sources: Sources, header: Header | None) -> Iterable[str]:
    facts = {
        "created by": f"advmoe {__version__}",
        "snapshot": sources.snapshot.name,
        "commit": commit_hash(sources.snapshot),
    }
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
