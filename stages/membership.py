"""membership: the membership audit, an attack on the privacy of each network's training images.

Reads `membership`, `seed`, `epsilon`, the settings of training (`model`, `pretrain`, `experts`, `train`, `baseline`;
shadow models are trained like the victims), the data set and the victims. Writes metrics/membership.json and
metrics/membership/all.json.
"""

from advmoe.core import paths
from advmoe.core.settings import load_section
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.membership.experiment import MembershipExperiment, run_experiment
from advmoe.threats.victim_training import VictimRecipes

STAGE = "membership"


def run() -> None:
    """Audits the victims in params.yaml."""
    experiment = MembershipExperiment(load_section(STAGE, MembershipSection), VictimRecipes.from_params())
    outputs = OutputPaths(
        metrics=paths.METRICS / f"{STAGE}.json",
        runs=paths.metrics(STAGE, "all"),
        models=paths.ARTIFACTS / STAGE,
        plots=paths.PLOTS / STAGE,
    )
    run_experiment(experiment, outputs)
