"""The model card: valid front matter, and numbers from the metrics only."""

import io
import json
from typing import Any

import pytest
from ruamel.yaml import YAML
from test_report import EVIL, evil, made_up, withheld

from advmoe.core.artifacts import Header
from advmoe.reporting.report.model_card import render_model_card


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    found: dict[str, Any] = YAML(typ="safe").load(io.StringIO(matter))
    return found


def test_the_front_matter_holds_the_results() -> None:
    found = front(render_model_card(made_up()))
    assert (found["license"], found["pipeline_tag"]) == ("mit", "image-classification")
    assert "datasets" not in found  # the Hub knows no scikit-learn digits
    (result,) = found["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["worst case over all attacks, L-inf 0.1"] == 0.735
    assert values["clean accuracy"] == 0.95


def test_huggingface_hub_can_parse_it() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the Hub's own reader is not installed")
    data = hub.ModelCard(render_model_card(made_up())).data
    assert {each.metric_value for each in data.eval_results} >= {0.735, 0.95}
    assert data.license == "mit"


def test_a_data_set_that_the_hub_knows_is_named() -> None:
    record = made_up()
    content = json.loads(record.content["params.yaml"])
    content["prepare"]["source"] = {"kind": "svhn"}
    assert front(render_model_card(record.replaced("params.yaml", content)))["datasets"] == ["ufldl-stanford/svhn"]


def test_it_lists_the_limitations() -> None:
    text = render_model_card(made_up())
    limits = text.partition("## Limitations")[2]
    assert "mixture better than adversarial in the worst case: contradicted" in limits
    assert "94.4" in limits  # the success rate of poisoning
    assert "fidelity" in limits
    assert 'advmoe.load_model("mixture.safetensors")' in text
    assert "2512.20821" in text
    assert "0abc" in text  # from dvc.lock


def test_a_withheld_headline_is_withheld_here_too() -> None:
    text = render_model_card(withheld())
    assert "withheld: gradients: a third of them is zero" in text
    assert "0.735" not in text
    assert "73.5" not in text
    (result,) = front(text)["model-index"][0]["results"]
    assert [metric["name"] for metric in result["metrics"]] == ["clean accuracy"]


def test_an_empty_snapshot_gives_a_card_without_results() -> None:
    found = front(render_model_card(made_up().without("")))
    assert "model-index" not in found


def test_hashes_of_the_artifact_are_shown() -> None:
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
    text = render_model_card(made_up(), header)
    assert all(fact in text for fact in ("f00d", "beef", "2.9.0"))


def test_names_with_markup_stay_names() -> None:
    text = render_model_card(evil(), name=EVIL)
    body = text.split("---\n", 2)[2].partition("<details><summary>params.yaml")[0]
    assert "<script" not in body
    assert front(text)["model-index"][0]["name"] == EVIL


def test_nothing_in_params_ends_its_listing_early() -> None:
    record = made_up()
    text = render_model_card(
        record.replaced("params.yaml", record.content["params.yaml"] + b"\n# ````\n# # a heading?\n")
    )
    listing = text.partition("<details><summary>params.yaml")[2]
    assert listing.count("`````") == 2
