"""params.yaml as a whole. Only the command line imports this: a stage that did would depend on every other one."""

from collections.abc import Collection
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from advmoe.classifiers import Backbone
from advmoe.data.catalogue import Prepare
from advmoe.evaluation import results
from advmoe.evaluation.harness import CLEAN, WORST
from advmoe.evaluation.suite import Evaluate
from advmoe.params import PARAMS_FILE, Epsilon, Seed, Settings, read_yaml, validate
from advmoe.report.settings import ReportSection
from advmoe.threats.extraction.settings import ExtractSection
from advmoe.threats.extraction.victims import EXPERT
from advmoe.threats.membership.settings import MembershipSection
from advmoe.threats.poisoning.catalogue import proxies
from advmoe.threats.poisoning.settings import PoisonSection
from advmoe.threats.retraining import JOINT_ONLY, MIXTURE, retrainable
from advmoe.training.comparators import Comparator, Distilled
from advmoe.training.joint import JointRecipe
from advmoe.training.single import SingleRecipe, Student

DISTILLED = "distilled"  # the Makefile knows it, too

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Params(Settings):
    """Every section of params.yaml, and what must hold between them."""

    seed: Seed
    epsilon: Epsilon
    launcher: Annotated[str, StringConstraints(min_length=1)]
    model: Backbone
    prepare: Prepare
    pretrain: SingleRecipe
    experts: Annotated[dict[Name, Student], Field(min_length=1)]
    train: JointRecipe
    baseline: Annotated[dict[Name, Comparator], Field(min_length=1)]
    evaluate: Evaluate
    poison: PoisonSection
    extract: ExtractSection
    membership: MembershipSection
    report: ReportSection

    @model_validator(mode="after")
    def _names_agree(self) -> "Params":
        _subset("train.experts", self.train.experts, "experts", self.experts)
        _subset("evaluate.baselines", self.evaluate.baselines, "baseline", self.baseline)
        for name, comparator in self.baseline.items():
            if isinstance(comparator, Distilled) and not name.startswith(DISTILLED):
                raise ValueError(
                    f"baseline.{name}: the name of a distilled network begins with '{DISTILLED}', by which `make repro`"
                    " knows that the mixture comes first"
                )
        plain = tuple(retrainable(self.baseline))
        for name, study in self.poison.attacks.items():
            key = f"poison.attacks.{name}"
            _known(f"{key}.victims", study.victims, "victims are", (MIXTURE, JOINT_ONLY, *plain))
            _known(f"{key}.attack.proxy", proxies(study.attack), "a proxy is trained as", plain)
        for name, theft in self.extract.attacks.items():
            victims = (MIXTURE, *self.baseline, *(f"{EXPERT}{expert}" for expert in self.experts))
            _known(f"extract.attacks.{name}.victims", theft.victims, "victims are", victims)
        _known("membership.victims", tuple(self.membership.victims), "victims are", (MIXTURE, *plain))
        self._claims_are_about_what_is_evaluated()
        return self

    def _claims_are_about_what_is_evaluated(self) -> None:
        models = results.names(self.train.experts, self.evaluate.baselines)
        columns = (CLEAN, WORST, *self.evaluate.full())
        for name, claim in self.report.claims.items():
            key = f"report.claims.{name}"
            _known(f"{key}.model", (claim.model,), "evaluated are", models)
            _known(f"{key}.over", (claim.over,), "evaluated are", models)
            _known(f"{key}.under", (claim.under,), "there are", columns)


def _subset(key: str, names: tuple[str, ...], section: str, known: Collection[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{key} must list at least one name, each once")
    _known(key, names, f"{section} has only", tuple(known))


def _known(key: str, names: tuple[str, ...], what: str, known: tuple[str, ...]) -> None:
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ValueError(f"{key} lists '{strangers[0]}', but {what} {', '.join(known)}")


def load_params() -> Params:
    """Read and validate all of params.yaml. Raises UserError with one sentence."""
    return validate(read_yaml(PARAMS_FILE), Params, str(PARAMS_FILE))
