"""The model card: front matter that can be read, and nothing in it that the metrics do not say."""

import io
import json
from typing import Any

import pytest
from ruamel.yaml import YAML
from test_report import EVIL, evil, made_up, withheld

from advmoe.core.artifacts import Header
from advmoe.reporting.report.model_card import card


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    found: dict[str, Any] = YAML(typ="safe").load(io.StringIO(matter))
    return found


def test_the_front_matter_holds_the_results() -> None:
    found = front(card(made_up()))
    assert (found["license"], found["pipeline_tag"]) == ("mit", "image-classification")
    assert "datasets" not in found  # the Hub knows no scikit-learn digits
    (result,) = found["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["worst case over all attacks, L-inf 0.1"] == 0.735
    assert values["clean accuracy"] == 0.95


def test_the_hub_reads_it() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the Hub's own reader is not installed")
    data = hub.ModelCard(card(made_up())).data
    assert {each.metric_value for each in data.eval_results} >= {0.735, 0.95}
    assert data.license == "mit"


def test_a_data_set_that_the_hub_knows_is_named() -> None:
    record = made_up()
    content = json.loads(record.content["params.yaml"])
    content["prepare"]["source"] = {"kind": "svhn"}
    assert front(card(record.replaced("params.yaml", content)))["datasets"] == ["ufldl-stanford/svhn"]


def test_it_says_what_speaks_against_the_mixture() -> None:
    text = card(made_up())
    limits = text.partition("## Limitations")[2]
    assert "mixture better than adversarial in the worst case: contradicted" in limits
    assert "94.4" in limits  # the success rate of poisoning
    assert "fidelity" in limits
    assert 'advmoe.load_model("mixture.safetensors")' in text
    assert "2512.20821" in text
    assert "0abc" in text  # from dvc.lock


def test_a_withheld_headline_is_withheld_here_too() -> None:
    text = card(withheld())
    assert "withheld: gradients: a third of them is zero" in text
    assert "0.735" not in text
    assert "73.5" not in text
    (result,) = front(text)["model-index"][0]["results"]
    assert [metric["name"] for metric in result["metrics"]] == ["clean accuracy"]


def test_an_empty_record_makes_a_card_that_claims_nothing() -> None:
    found = front(card(made_up().without("")))
    assert "model-index" not in found


def test_hashes_of_the_artifact_are_told() -> None:
    header = Header(
        kind="classifier",
        about={},
        params={},
        inputs={},
        seed=0,
        torch="2.9.0",
        metrics={},
        sha256="f00d",
        header_sha256="beef",
    )
    text = card(made_up(), header)
    assert all(fact in text for fact in ("f00d", "beef", "2.9.0"))


def test_names_with_markup_stay_names() -> None:
    text = card(evil(), name=EVIL)
    body = text.split("---\n", 2)[2].partition("<details><summary>params.yaml")[0]
    assert "<script" not in body
    assert front(text)["model-index"][0]["name"] == EVIL


def test_nothing_in_params_ends_its_listing_early() -> None:
    record = made_up()
    text = card(record.replaced("params.yaml", record.content["params.yaml"] + b"\n# ````\n# # a heading?\n"))
    listing = text.partition("<details><summary>params.yaml")[2]
    assert listing.count("`````") == 2
