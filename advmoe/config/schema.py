"""params.yaml as a whole. Only the command line imports this: a stage that did would depend on every other one."""

from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from advmoe.core import paths
from advmoe.core.references import resolve_adversaries
from advmoe.core.settings import PARAMS_FILE, Epsilon, Seed, Settings, read_yaml, validate
from advmoe.data.registry import PrepareSettings
from advmoe.evaluation import summary
from advmoe.evaluation.config import EvaluateSection
from advmoe.models.classifiers import BackboneSettings
from advmoe.reporting.config import ReportSection
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.threats.extraction.config import ExtractSection
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.poisoning.config import PoisonSection
from advmoe.threats.poisoning.registry import proxy_baselines
from advmoe.threats.victim_training import JOINT_ONLY, MIXTURE, retrainable_baselines
from advmoe.training.baselines.specs import Baseline, DistilledNetwork
from advmoe.training.batch_attacks import Adversary
from advmoe.training.joint import JointConfig
from advmoe.training.single import NetworkSpec, SingleConfig

DISTILLED = "distilled"  # the Makefile uses this name, too

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Params(Settings):
    """All sections of params.yaml; validates that they agree with each other."""

    seed: Seed
    epsilon: Epsilon
    launcher: Annotated[str, StringConstraints(min_length=1)]
    model: BackboneSettings
    prepare: PrepareSettings
    pretrain: SingleConfig
    adversaries: dict[Name, Adversary]
    experts: Annotated[dict[Name, NetworkSpec], Field(min_length=1)]
    train: JointConfig
    baseline: Annotated[dict[Name, Baseline], Field(min_length=1)]
    evaluate: EvaluateSection
    poison: PoisonSection
    extract: ExtractSection
    membership: MembershipSection
    report: ReportSection

    @model_validator(mode="before")
    @classmethod
    def _resolve_adversaries(cls, value: object) -> object:
        return resolve_adversaries(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _names_agree(self) -> "Params":
        _subset("train.experts", self.train.experts, "experts", self.experts)
        _subset("evaluate.baselines", self.evaluate.baselines, "baseline", self.baseline)
        for name, comparator in self.baseline.items():
            if isinstance(comparator, DistilledNetwork) and not name.startswith(DISTILLED):
                raise ValueError(
                    f"baseline.{name}: the name of a distilled network must begin with '{DISTILLED}', by which"
                    " `make repro` trains it after the mixture"
                )
        plain = tuple(retrainable_baselines(self.baseline))
        for name, study in self.poison.attacks.items():
            key = f"poison.attacks.{name}"
            _known(f"{key}.victims", study.victims, "victims are", (MIXTURE, JOINT_ONLY, *plain))
            _known(f"{key}.attack.proxy", proxy_baselines(study.attack), "a proxy is trained as", plain)
        for name, theft in self.extract.attacks.items():
            victims = (MIXTURE, *self.baseline, *(f"{paths.EXPERT_PREFIX}{expert}" for expert in self.experts))
            _known(f"extract.attacks.{name}.victims", theft.victims, "victims are", victims)
        _known("membership.victims", tuple(self.membership.victims), "victims are", (MIXTURE, *plain))
        self._claims_are_about_what_is_evaluated()
        return self

    def _claims_are_about_what_is_evaluated(self) -> None:
        models = summary.model_names(self.train.experts, self.evaluate.baselines)
        columns = (CLEAN, WORST, *self.evaluate.all_attacks())
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
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{key} lists '{unknown[0]}', but {what} {', '.join(known)}")


def load_params() -> Params:
    """Reads and validates all of params.yaml. Raises UserError for the first problem."""
    return validate(read_yaml(PARAMS_FILE), Params, str(PARAMS_FILE))
