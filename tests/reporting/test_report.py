"""The report on a made-up snapshot: contents, withheld numbers, unusual names and missing files."""

import html
import json
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure as Drawing

from advmoe import __version__
from advmoe.attacks.registry import KINDS
from advmoe.core.artifacts import Header
from advmoe.core.errors import UserError
from advmoe.core.references import in_current_form
from advmoe.core.settings import read_yaml
from advmoe.evaluation import verdict
from advmoe.reporting.report import glossary
from advmoe.reporting.report.build import write_report
from advmoe.reporting.report.compare import Comparison, ComparisonTable
from advmoe.reporting.report.content import ReportContent, build_content
from advmoe.reporting.report.figures import (
    MAX_POINTS,
    Bubble,
    IntervalPoint,
    Line,
    _draw_line,
    bubble_chart,
    interval_plot,
)
from advmoe.reporting.report.html import render_comparison, render_html
from advmoe.reporting.report.markdown import render_markdown
from advmoe.statistics.intervals import Proportion
from advmoe.statistics.paired_tests import PairedDifference

EVIL = '<script>alert(1)</script>|&"'
ATTACKS = {"pgd": 150, "fgsm": 160, "rays": 40}  # correctly classified images; RayS is run on fewer
EXPERTS = ("clean", "pgd-1")
BASELINES = ("standard", "adversarial", "trades")


class Files:
    """A snapshot in memory."""

    name = "made up"

    def __init__(self, content: Mapping[str, bytes]) -> None:
        self.content = dict(content)

    def read(self, path: Path) -> bytes | None:
        return self.content.get(path.as_posix())

    def files(self, folder: Path) -> list[str]:
        return sorted(Path(path).name for path in self.content if Path(path).parent == folder)

    def without(self, start: str) -> "Files":
        return Files({path: raw for path, raw in self.content.items() if not path.startswith(start)})

    def changed(self, path: str, **values: Any) -> "Files":
        return self.replaced(path, json.loads(self.content[path]) | values)

    def replaced(self, path: str, value: Any) -> "Files":
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return Files(self.content | {path: raw})


def share(correct: int, total: int = 200) -> dict[str, Any]:
    return Proportion.from_counts(correct, total).as_dict()


def paired(difference: float) -> dict[str, Any]:
    return PairedDifference(difference, difference - 0.03, difference + 0.03, 6, 4, 0.754).as_dict()


def model(name: str, worst: int, *, judged: bool = True, **extra: Any) -> dict[str, Any]:
    attacks = ATTACKS if judged else {"pgd": ATTACKS["pgd"]}
    accuracy = {
        "clean": share(190),
        **{kind: share(right, 50 if kind == "rays" else 200) for kind, right in attacks.items()},
    }
    spent = {"images": 200, "attacked": 190, "fell": 40, "forward": 9000, "backward": 8000}
    return {
        "schema_version": 2,
        "model": name,
        "epsilon": 0.1,
        "accuracy": accuracy | {"worst": share(worst)},
        "verdict": "pass" if judged else "not asked",
        "withheld": [],
        "terms": {},
        "attacks": {
            kind: {"settings": {"kind": kind}, **spent, "images": 50 if kind == "rays" else 200} for kind in attacks
        },
        "per_class": {EVIL: {"clean": share(19, 20), "worst": share(14, 20)}},
        **({"grid": {"12.75/255": share(180), "25.5/255": share(worst)}} if judged else {}),
        **({"median_minimal_epsilon": 0.2} if judged else {}),
        **extra,
    }


def evaluation() -> dict[str, Any]:
    weights = {"mean_weight": dict.fromkeys(EXPERTS, 0.5), "entropy": 0.693, "shift": 0.01}
    others = ["uniform-average", *(f"baseline/{name}" for name in BASELINES)]
    mixture = model(
        "mixture",
        147,
        gate={"clean": weights, "pgd": weights},
        oracle_routing={"clean": share(195), "pgd": share(180)},
        against={name: paired(0.0123) for name in others},
    )
    found = [mixture, model("uniform-average", 149, judged=False)]
    found += [model(f"baseline/{name}", 131 + place) for place, name in enumerate(BASELINES)]
    found += [model(f"{kind}/{name}", 99, judged=False) for kind in ("expert", "joint-expert") for name in EXPERTS]
    files = {f"metrics/evaluate/{each['model'].replace('/', '-')}.json": each for each in found}
    summary: dict[str, Any] = {name: {} for name in ("mixture", *others)}
    files["metrics/evaluate.json"] = {
        "schema_version": 2,
        "epsilon": 0.1,
        "images": 200,
        "best-expert": {"name": "pgd-1"},
    }
    files["metrics/evaluate.json"] |= summary
    check = {
        "check": "iterations",
        "status": "pass",
        "sentence": "PGD is no weaker than one step",
        "evidence": {"pgd": 0.7},
    }
    judged = ("mixture", *(f"baseline/{name}" for name in BASELINES))
    files["metrics/verdict.json"] = {name: {"verdict": "pass", "checks": [check]} for name in judged}
    return files


def training() -> dict[str, Any]:
    cost = {"parameters": 1234567, "flops_per_image": 2.5e9, "crafting_forward": 10, "crafting_backward": 9}
    cost |= {"learning": 7896, "training_flops": 3.2e13, "total_training_flops": 9.1e13}
    metrics = {"validation": {}, "alarms": [], "cost": cost}
    names = [
        ("train", "mixture"),
        *(("baseline", name) for name in BASELINES),
        *(("pretrain", name) for name in EXPERTS),
    ]
    files: dict[str, Any] = {f"metrics/{stage}/{name}.json": metrics for stage, name in names}
    rows = "epoch,loss,clean,fgsm,pgd\n1,1.0,0.5,0.3,0.2\n2,0.5,0.9,0.7,0.6\n"
    files |= {f"plots/{stage}/{name}.csv": rows.encode() for stage, name in names}
    load = "epoch,clean,fgsm,pgd,load_clean,load_pgd-1\n1,0.9,0.7,0.6,0.5,0.5\n2,0.9,0.7,0.6,0.4,0.6\n"
    files["plots/train/mixture.csv"] = load.encode()
    files["artifacts/train/mixture.run.json"] = {"seconds": 4321.0, "peak_memory": 512 * 2**20, "python": "3.11.9"}
    return files


def threats() -> dict[str, Any]:
    poisoned = {"seed": 0, "trial": 0, "defence": "", "rate_of": "the training set", "clean_acc": share(190)}
    poisoned |= {"d_clean_acc": paired(0.0), "asr": share(170, 180), "asr_clean_twin": share(2, 180)}
    about = {"schema_version": 1, "attack": "badnets", "epsilon": 0.1, "images": 200}
    runs = [{"victim": victim, "rate": 0.1, **poisoned} for victim in ("mixture", "adversarial")]
    stolen = {
        "surrogate": "same",
        "seed": 0,
        "task_acc": share(180),
        "fidelity": share(185),
        "transfer_asr": share(9, 190),
    }
    asked = [
        {"victim": "mixture", "answers": "none", "budget": 0, **stolen},
        {
            "victim": "mixture",
            "answers": "soft",
            "budget": 1600,
            "alarm_after": 110,
            "d_fidelity": paired(-0.11),
            **stolen,
        },
    ]
    estimate = {"value": 0.562, "low": 0.532, "high": 0.593}
    leak = {"auc": estimate, "balanced_accuracy": 0.55, "tpr": {"0.01": estimate}}
    leaks = [
        {"victim": victim, "score": "loss", "queries": "clean", "shadows": 0, "leak": leak, "beyond": None}
        for victim in ("mixture", "standard")
    ]
    return {
        "metrics/poison-runs/badnets.json": about | {"runs": runs},
        "metrics/poison-runs/of-an-old-profile.json": about | {"runs": runs},
        "metrics/extract-runs/knockoff.json": about | {"attack": "knockoff", "runs": asked},
        "metrics/membership/all.json": {
            "schema_version": 1,
            "members": 630,
            "others": 630,
            "epsilon": 0.1,
            "rows": leaks,
        },
        "plots/poison/badnets/examples.png": b"\x89PNG made up",
    }


def claims() -> dict[str, Any]:
    def claim(over: str, status: str) -> dict[str, Any]:
        about = {"model": "mixture", "over": over, "under": "worst"}
        return {"claim": about, "status": status, "sentence": f"the evidence against {over}"}

    named = {"one": claim("baseline/adversarial", "contradicted"), "two": claim("baseline/standard", "supported")}
    over_seeds = claim("baseline/trades", "not supported") | {"seeds": [{"seed": 0}, {"seed": 1}, {"seed": 2}]}
    return {
        "metrics/findings.json": {"schema_version": 1, "claims": named},
        "metrics/aggregate.json": {"schema_version": 1, "groups": [{"claims": {"one": over_seeds}}]},
    }


def params() -> bytes:
    """The project's params, with the experts and baselines of the made-up snapshot."""
    content = in_current_form(read_yaml(ROOT / "params.yaml"), "params.yaml")
    content["experts"] = {name: content["experts"][name] for name in EXPERTS}
    content["train"]["experts"] = list(EXPERTS)
    content["baseline"] = dict.fromkeys(BASELINES, content["baseline"]["adversarial"])
    content["poison"]["attacks"] = {"badnets": {}, "blended": {}}
    content["extract"]["attacks"] = {"knockoff": {}}
    return json.dumps(content, default=str).encode()  # JSON is YAML


def made_up() -> Files:
    """A complete snapshot of a small pipeline."""
    files: dict[str, Any] = evaluation() | training() | threats() | claims()
    names = ["mixture", *(f"baseline/{name}" for name in BASELINES)]
    grid = f"epsilon,{','.join(names)}\n0.05{',0.9' * len(names)}\n0.1{',0.7' * len(names)}\n"
    minimal = "model,epsilon,accuracy\n" + "".join(
        f"{name},0.0{step},0.{9 - step}\n" for name in names for step in (1, 2)
    )
    files |= {"plots/evaluate/robustness.csv": grid.encode(), "plots/evaluate/minimal-epsilon.csv": minimal.encode()}
    files["metrics/prepare.json"] = {"train_images": 987, "test_images": 360, "classes": 10, "leaked": 0}
    files["params.yaml"] = params()
    files["dvc.lock"] = b"stages:\n  train:\n    outs:\n    - {path: artifacts/train/mixture.safetensors, md5: 0abc}\n"
    return Files({path: raw if isinstance(raw, bytes) else json.dumps(raw).encode() for path, raw in files.items()})


class Page(HTMLParser):
    """All elements of a page with their attributes, and all its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def all(self, *tags: str) -> Iterator[dict[str, str]]:
        return (attributes for tag, attributes in self.elements if tag in tags)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def page_of(record: Files) -> str:
    return render_html(build_content(record))


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return build_content(made_up())


@pytest.fixture(scope="module")
def page(content: ReportContent) -> str:
    return render_html(content)


def test_the_first_screen_holds_verdict_headline_and_claims(content: ReportContent, page: str) -> None:
    text = Page(page).text
    first = text[text.index("Verdict of the checks:") : text.index("Worst case over all attacks")]
    assert "Verdict of the checks: pass" in first
    assert "73.5 %" in first  # 147 of 200
    assert "67.0 to 79.1" in first  # its Wilson interval
    assert "the worst case over 3 attacks (on fewer images: rays 50)" in first
    assert "Clean: 95.0 % [91.0, 97.3]." in first
    assert "mixture better than adversarial in the worst case contradicted" in first
    assert "the evidence against baseline/trades seeds 0, 1, 2" in first
    assert [finding.status for finding in content.headline.claims] == ["contradicted", "supported", "not supported"]


def test_a_claim_that_was_not_judged_comes_last() -> None:
    record = made_up()
    found = json.loads(record.content["metrics/findings.json"])
    found["claims"]["one"]["status"] = "not judged"
    statuses = [each.status for each in build_content(record.replaced("metrics/findings.json", found)).headline.claims]
    assert statuses == ["supported", "not supported", "not judged"]


def test_without_results_of_claims_the_report_says_so() -> None:
    record = made_up().without("metrics/findings.json").without("metrics/aggregate.json")
    text = Page(page_of(record)).text
    assert "No results of claims" in text
    assert "they need at least three seeds" in text


def withheld() -> Files:
    """A snapshot whose mixture failed a check, as `advmoe.evaluation.serialise` writes it."""
    record, path = made_up(), "metrics/evaluate/mixture.json"
    mixture = json.loads(record.content[path])
    accuracy = {kind: each if kind == "clean" else None for kind, each in mixture["accuracy"].items()}
    reasons = ["gradients: a third of them is zero"]
    values: dict[str, Any] = {"accuracy": accuracy, "verdict": "fail", "withheld": reasons, "per_class": {}}
    values |= {"grid": {}, "median_minimal_epsilon": None}
    return record.changed(path, **values).without("metrics/findings.json")


def test_a_failed_check_withholds_the_headline_everywhere() -> None:
    content = build_content(withheld())
    assert content.headline.number == ""
    page, text = render_html(content), render_markdown(content)
    for shown in (Page(page).text, text):
        assert "gradients: a third of them is zero" in shown
        assert "73.5" not in shown
        assert "1.2 [" not in shown  # the paired differences would disclose it
    assert "Withheld: mixture." in page
    assert "mixture: 90.0 % at 0.05" not in page  # plots/evaluate has the curves of withheld models too
    assert "standard: 90.0 % at 0.05" in page
    assert "mixture 0.200" not in page
    oracle = page[page.index("oracle routing (upper bound)") :]
    assert "90.0" not in oracle[: oracle.index("</tr>")]


def test_the_names_of_models_attacks_and_checks_are_explained(page: str) -> None:
    text = Page(page).text
    assert "trades one resnet18, adversarial training on PGD" in text  # made up: all entries are the adversarial one
    assert "uniform average, no gate the experts of this mixture with equal weights" in text
    assert "fgsm one step of size epsilon along the sign of the gradient" in text
    assert "convergence Many steps are at least as strong as one step" in text


def test_every_attack_and_check_is_explained() -> None:
    assert set(glossary.ATTACKS) == set(KINDS)
    assert list(glossary.CHECKS) == list(verdict.TITLES)


def test_every_baseline_of_every_profile_is_explained() -> None:
    files = {file.name: read_yaml(file) for file in (ROOT / "params.yaml", *(ROOT / "profiles").glob("*.yaml"))}
    adversaries = {name: each for content in files.values() for name, each in content.get("adversaries", {}).items()}
    resolved = {file: in_current_form({**content, "adversaries": adversaries}, file) for file, content in files.items()}
    for file, content in resolved.items():
        for name in content.get("baseline") or {}:
            assert glossary.network(f"baseline/{name}", content), (file, name)
    full = resolved["digits-full.yaml"]
    said = glossary.network("baseline/equal-passes", full)
    assert said == "one resnet18, adversarial training on PGD, trained with the same FLOPs as the whole mixture"
    assert glossary.network("somebody-elses", full) == ""
    taught = {"baseline": {"distilled": {"kind": "distilled", "backbone": "cnn"}}}
    assert glossary.network("baseline/distilled", taught).startswith("one cnn distilled from the mixture")


def test_every_baseline_is_shown_with_its_interval(page: str) -> None:
    text = Page(page).text
    for name, right in (("standard", 131), ("adversarial", 132), ("trades", 133)):
        assert name in text
        assert f"{Proportion.from_counts(right, 200)}".replace(", ", ",\N{NO-BREAK SPACE}") in html.unescape(page)
    assert "+1.2 [-1.8, +4.2]" in text  # mixture minus it


SECTIONS = {  # missing files, and the text that says so
    "metrics/evaluate": "No results of an evaluation",
    "metrics/verdict.json": "Checks: no results",
    "plots/evaluate": "Accuracies against epsilon: no results",
    "metrics/train/": "No alarms in the training of 5 networks",
    "metrics/pretrain": "No alarms in the training of 4 networks",
    "metrics/evaluate/mixture.json": "No results of an evaluation",
    "plots/": "Accuracies against epsilon: no results",
    "metrics/poison-runs": "Data poisoning: no results",
    "metrics/extract-runs": "Model extraction: no results",
    "metrics/membership": "Membership inference: no results",
    "metrics/prepare.json": "Data set: no results",
    "params.yaml": "Comparison with the paper: no results",
    "dvc.lock": "dvc.lock is missing",
    "artifacts": "not recorded",
    "metrics/": "Training: no results",
    "": "Cost: no results",
}


@pytest.mark.parametrize("absent", SECTIONS)
def test_missing_results_are_stated_and_raise_nothing(absent: str, content: ReportContent) -> None:
    record = made_up().without(absent)
    if absent == "metrics/":
        record = record.without("plots/")
    found = build_content(record)
    page = Page(render_html(found))
    assert SECTIONS[absent] in page.text
    assert [part.name for part in found.sections] == [part.name for part in content.sections]
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", page.text)
    assert render_markdown(found)


VERSIONED = {
    "metrics/evaluate.json": 2,
    "metrics/evaluate/mixture.json": 2,
    "metrics/poison-runs/badnets.json": 1,
    "metrics/extract-runs/knockoff.json": 1,
    "metrics/membership/all.json": 1,
    "metrics/findings.json": 1,
    "metrics/aggregate.json": 1,
}


@pytest.mark.parametrize("path", VERSIONED)
def test_another_schema_is_refused_with_file_and_both_versions(path: str) -> None:
    with pytest.raises(UserError) as refused:
        build_content(made_up().changed(path, schema_version=99))
    assert str(refused.value).startswith(f"{path}: has schema 99, but this report reads schema {VERSIONED[path]}")


@pytest.mark.parametrize("path", ["metrics/evaluate.json", "params.yaml", "dvc.lock"])
def test_a_broken_file_is_refused_by_its_name(path: str) -> None:
    with pytest.raises(UserError, match=re.escape(path)):
        build_content(made_up().replaced(path, b"{ : ["))


def evil() -> Files:
    """Markup wherever a name can stand."""
    record = made_up()
    swaps = {"trades": EVIL, "pgd-1": EVIL, "badnets": EVIL, "iterations": EVIL, "knockoff": EVIL}
    quoted = {old: json.dumps(new)[1:-1] for old, new in swaps.items()}
    changed: dict[str, bytes] = {}
    for path, raw in record.content.items():
        text = raw.decode(errors="surrogateescape")
        for old, new in swaps.items():
            in_csv = new.replace('"', '""') if path.endswith(".csv") else quoted[old]
            text = re.sub(rf"\b{old}\b", lambda _, new=in_csv: new, text)  # type: ignore[misc]
        if path.endswith(".csv"):
            text = re.sub(r"([^,\n]*<script>[^,\n]*)", r'"\1"', text)
        names = path.replace("badnets", EVIL).replace("knockoff", EVIL)
        changed[names] = text.encode(errors="surrogateescape")
    return Files(changed)


def test_names_with_markup_are_only_ever_text() -> None:
    content = build_content(evil())
    found = render_html(content)
    page = Page(found)
    assert not list(page.all("script"))
    assert page.text.count(EVIL) > 20
    assert "alert(1)" in "".join(re.findall(r"<svg.*?</svg>", found, flags=re.DOTALL))
    assert "<script" not in found
    text = render_markdown(content)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#124;&amp;" in text


def test_a_dollar_or_a_brace_in_a_name_is_no_mathematics() -> None:
    found = interval_plot("x", "t", "d", [IntervalPoint(r"$\frac{1$", 1, 0, 2)], axis="a", meaning={})
    assert r"$\frac{1$" in found.svg


def cost_figure(record: Files) -> str:
    """Returns the text alternative of the figure of accuracy against cost."""
    drawn = re.findall(r'<desc id="cost-figure-description">(.*?)</desc>', render_html(build_content(record)))
    return html.unescape(drawn[0]) if drawn else ""


def test_cost_figure_shows_every_checked_network() -> None:
    said = cost_figure(made_up())
    assert "mixture 95.0 and 73.5 at 91 trillion FLOP" in said
    for place, name in enumerate(BASELINES):
        assert f"{name} 95.0 and {(131 + place) / 2:.1f} at 91 trillion FLOP" in said


def test_cost_figure_leaves_out_what_is_withheld() -> None:
    said = cost_figure(withheld())
    assert "mixture" not in said
    assert "standard 95.0" in said
    without_costs = made_up().without("metrics/baseline").without("metrics/train")
    assert cost_figure(without_costs) == ""


def test_a_long_line_is_thinned_with_its_error_bars_and_keeps_its_end() -> None:
    count = 2 * MAX_POINTS + 2
    xs = tuple(float(place) for place in range(count))
    axes = Drawing().subplots()
    _draw_line(axes, Line("long", xs, xs, 0, bounds=(xs, xs)))
    drawn = np.asarray(axes.lines[0].get_xdata()).tolist()
    assert (len(drawn), drawn[0], drawn[-1]) == (MAX_POINTS + 2, 0, count - 1)
    assert len(axes.collections[0].get_paths()) == len(drawn)


def test_areas_of_bubbles_are_proportional_to_their_sizes() -> None:
    sizes = (9e12, 4e12, 1e12, 1.0)
    clean, robust = Proportion.from_counts(50, 100), Proportion.from_counts(30, 100)
    rows = [Bubble(f"network {size}", clean, robust, size, place) for place, size in enumerate(sizes)]
    found = bubble_chart("x", "t", "d", rows, axes_labels=("a", "b"), unit="FLOP").svg
    collections = re.findall(r'<g id="x-PathCollection.*?</g>', found, flags=re.DOTALL)
    widths = []
    for collection in collections:
        (path,) = re.findall(r'<path id="[^"]*" d="([^"]*)"', collection)
        assert "C" in path  # a circle: equal frames of other signs have other areas
        xs = [float(x) for x, _ in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]
        widths.append(max(xs) - min(xs))
    large, middle, small, least = widths
    assert (large / small, middle / small) == pytest.approx((3, 2), rel=0.01)
    assert 4 < large / least < 10  # the smallest has a minimum area


def test_rows_of_markdown_have_as_many_cells_as_their_heading() -> None:
    text = render_markdown(build_content(evil()))
    tables = re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)
    assert len(tables) > 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_page_makes_no_requests(page: str) -> None:
    found = Page(page)
    for attributes in found.all("a"):
        assert attributes["href"].startswith(("#", "https://arxiv.org/"))
    for tag, attributes in found.elements:
        loads = {
            key: attributes[key] for key in ("src", "srcset", "href", "action", "data", "poster") if key in attributes
        }
        for value in loads.values():
            assert tag == "a" or value.startswith(("data:", "#")), (tag, value)
    assert not list(found.all("script", "iframe", "object", "embed", "base"))
    assert not re.search(r"@import|url\((?!#)", page)


def test_ids_are_unique_and_every_reference_resolves(page: str) -> None:
    found = Page(page)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {attributes["href"][1:] for attributes in found.all("a", "use") if attributes["href"].startswith("#")}
    wanted |= {each for _, attributes in found.elements for each in attributes.get("aria-labelledby", "").split()}
    wanted |= set(re.findall(r"url\(#(.*?)\)", page))
    assert wanted <= set(ids)
    assert len(wanted) > 40


def test_figures_and_tables_are_accessible(page: str) -> None:
    found = Page(page)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) > 8
    for drawing in drawings:
        assert 'role="img"' in drawing
        assert re.search(r"<title [^>]*>[^<]+</title><desc [^>]*>[^<]{30,}</desc>", drawing)
    assert all(attributes["alt"] for attributes in found.all("img"))
    assert all(attributes["scope"] in {"col", "row"} for attributes in found.all("th"))
    assert len(list(found.all("table"))) == page.count("<caption>")


def test_figures_are_drawn_in_the_colours_of_the_page(page: str) -> None:
    assert "#0102" not in page  # a sentinel
    assert "currentColor" in page
    for name in ("baselines", "robustness", "minimal", "asr-badnets", "fidelity-knockoff", "membership"):
        drawing = re.search(rf'<svg[^>]*aria-labelledby="{name}-title.*?</svg>', page, flags=re.DOTALL)
        assert drawing, name
        assert "var(--series-0)" in drawing.group(), name  # the mixture's


def test_a_baseline_has_one_colour_in_all_figures(page: str) -> None:
    found = {}
    for name in ("baselines", "asr-badnets"):
        drawing = re.search(rf'<svg[^>]*aria-labelledby="{name}-title.*?</svg>', page, flags=re.DOTALL)
        assert drawing
        found[name] = set(re.findall(r"--series-\d", drawing.group()))
    assert found["baselines"] == {f"--series-{place}" for place in range(4)}
    assert found["asr-badnets"] == {"--series-0", "--series-2"}  # adversarial is the second baseline there too


def test_equal_snapshots_give_equal_pages(page: str) -> None:
    assert page_of(made_up()) == page


def test_experiments_that_params_does_not_list_are_left_out(page: str) -> None:
    assert "badnets: %" in page
    assert "of-an-old-profile" not in page


def test_costs_come_from_metrics_and_times_from_the_sidecar(page: str) -> None:
    text = Page(page).text
    assert "mixture 1.23 million 2.5 billion 10 9 7.9 thousand 32 trillion 91 trillion 72 min 512 MiB" in text
    assert "trades 1.23 million" in text
    assert "not recorded" in text  # the baselines have no sidecar


def test_alarms_of_training_are_highlighted() -> None:
    record = made_up().changed("metrics/train/mixture.json", alarms=["the gate has collapsed"])
    page = page_of(record)
    assert '<p class="alert">Alarm: train mixture: the gate has collapsed</p>' in page


def test_the_comparison_with_the_paper_follows_the_parameters() -> None:
    record = made_up()
    content = json.loads(record.content["params.yaml"])
    assert "width 16 instead of 64, other experts" in Page(page_of(record)).text
    content["model"]["width"] = 64
    content["experts"]["pgd-1"]["adversary"]["steps"] = [10, 20, 30, 40, 50]
    content["prepare"]["source"] = {"kind": "svhn"}
    text = Page(page_of(record.replaced("params.yaml", content))).text
    assert "width 16" not in text.partition("Settings of the paper")[2].partition("gate")[0]
    assert "steps drawn per batch: 10, 20, 30, 40, 50 10, 20, 30, 40, 50 none" in text
    assert "CIFAR-10 and SVHN svhn none" in text


def test_another_joint_training_is_another_recipe() -> None:
    record = made_up()
    content = json.loads(record.content["params.yaml"])

    def joint_row() -> str:
        text = Page(page_of(record.replaced("params.yaml", content))).text
        return text.partition("on randomly drawn attacks, clean included")[2].partition("schedule")[0].strip()

    paper = content["train"]["adversary"]
    assert joint_row().endswith("not specified in the paper")
    content["train"] |= {"own_loss": 0.5, "awp": 0.005}
    assert joint_row().endswith(
        "the experts' own losses, weight 0.5; weights perturbed by 0.005 of their norm another recipe"
    )
    content["train"] |= {"own_loss": 0.0, "awp": 0.0, "adversary": paper | {"weights": [0, 1, 1]}}
    assert joint_row().endswith("another recipe")
    content["train"]["adversary"] = {"kind": "trades", "steps": [5], "step_size": 0.25, "beta": 6.0}
    assert joint_row() == "trades in every batch another recipe"
    content["train"] |= {"adversary": paper, "recipe": "dwf"}
    assert joint_row().endswith("not specified in the paper")
    content["train"]["recipe"] = {"kind": "adp", "alpha": 2.0, "beta": 0.5}
    assert joint_row().endswith("the loss of adp (alpha 2, beta 0.5) another recipe")


def test_versions_and_hashes_are_shown(page: str) -> None:
    assert "The artifact of the mixture, which records the PyTorch version, is missing." in Page(page).text
    facts: dict[str, Any] = {"about": {}, "params": {}, "inputs": {}, "metrics": {}}
    header = Header(kind="classifier", seed=0, torch="2.9.0", sha256="f00d", **facts)
    text = Page(render_html(build_content(made_up(), header=header))).text
    assert f"This page was written by advmoe {__version__}" in text
    assert "created with PyTorch 2.9.0; sha256 of its tensors f00d" in text


def test_several_rates_make_a_curve() -> None:
    record, path = made_up(), "metrics/poison-runs/badnets.json"
    study = json.loads(record.content[path])
    study["runs"] += [run | {"rate": 0.02, "asr": share(90, 180)} for run in study["runs"]]
    page = page_of(record.replaced(path, study))
    assert "mixture: 50.0 % at 2, 94.4 % at 10" in page


def test_extraction_is_shown_with_its_control(page: str) -> None:
    text = Page(page).text
    assert "knockoff: % on 200 test images; surrogate: same; one seed" in text
    assert "mixture probabilities 1600 90.0 [85.1, 93.4] 92.5 [88.0, 95.4] (-11.0 [-14.0, -8.0])" in text
    assert "mixture, probabilities, 1600 queries 92.5 [88, 95.4]" in text  # the text alternative of the figure
    assert "control: no queries" in text


def test_several_budgets_make_a_curve_with_a_constant_control() -> None:
    record, path = made_up(), "metrics/extract-runs/knockoff.json"
    study = json.loads(record.content[path])
    study["runs"] += [study["runs"][1] | {"budget": 400, "fidelity": share(100)}]
    text = Page(page_of(record.replaced(path, study))).text
    assert "mixture, control: 92.5 % at 400, 92.5 % at 1600" in text
    assert "mixture, probabilities: 50.0 % at 400, 92.5 % at 1600" in text


def test_several_seeds_are_a_mean_with_its_range() -> None:
    record, path = made_up(), "metrics/poison-runs/badnets.json"
    study = json.loads(record.content[path])
    study["runs"] += [run | {"seed": 1, "asr": share(90, 180)} for run in study["runs"]]
    text = Page(page_of(record.replaced(path, study))).text
    assert "2 runs, mean (lowest to highest)" in text
    assert "72.2 (50.0 to 94.4)" in text


def test_both_files_are_written(tmp_path: Path) -> None:
    written = write_report(made_up(), tmp_path / "out", 6, root=tmp_path)
    assert [path.name for path in written] == ["report.html", "report.md"]
    page = written[0].read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "No adversarial examples" in page
    assert written[1].read_text().startswith("# Robustness report")


def test_an_error_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_report(made_up().changed("metrics/evaluate.json", schema_version=1), tmp_path / "out", 6, root=tmp_path)
    assert not (tmp_path / "out").exists()


def colours(theme: str) -> dict[str, str]:
    """The variables of the style sheet; the first block is light, the second dark."""
    css = (ROOT / "advmoe/reporting/report/templates/palette.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)[:2]
    found = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", light))
    return found | (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", dark)) if theme == "dark" else {})


def channels(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2.2, relative luminance."""

    def luminance(rgb: list[float]) -> float:
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_sufficient_in_both_themes(theme: str) -> None:
    found = {name: channels(colour) for name, colour in colours(theme).items()}
    for name in ("text", "quiet", "link", "good", "mixed", "bad", *(f"series-{place}" for place in range(7))):
        for ground in ("surface", "panel"):
            assert contrast(found[name], found[ground]) >= 4.5, (name, ground)
    css = (ROOT / "advmoe/reporting/report/templates/style.css").read_text()
    most = int(re.findall(r"var\(--heat\) \* (\d+)%", css)[0]) / 100
    heat = [most * a + (1 - most) * b for a, b in zip(found["heat-colour"], found["surface"], strict=True)]
    assert contrast(found["text"], heat) >= 4.5


def test_a_comparison_is_rendered_as_a_page() -> None:
    empty = ComparisonTable("verdicts", ("a",), (), "No changes.")
    moved = ComparisonTable("accuracy", ("model", "moved"), ((EVIL, "yes"),), "nothing")
    found = render_comparison(Comparison(EVIL, "after", empty, moved, empty, empty, (EVIL,)))
    page = Page(found)
    assert "<script" not in found
    assert page.text.count(EVIL) >= 4
    assert page.text.count("No changes.") == 3
    assert len(list(page.all("table"))) == 1
