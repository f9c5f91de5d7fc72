"""membership: which training images does each network give away?

Reads `membership`, `seed`, `epsilon`, all that training reads (`model`, `pretrain`, `experts`, `train`, `baseline`: its
shadow models are trained as the victims were), the data set and the victims. Writes metrics/membership.json and
metrics/membership/all.json.
"""

from advmoe.core import paths
from advmoe.core.settings import load_section
from advmoe.threats.membership import experiment
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.membership.experiment import MembershipExperiment, OutputPaths
from advmoe.threats.victim_training import VictimRecipes

STAGE = "membership"


def run() -> None:
    """Audit the victims that params.yaml names."""
    case = MembershipExperiment(load_section(STAGE, MembershipSection), VictimRecipes.read())
    experiment.run_experiment(case, OutputPaths(paths.METRICS / f"{STAGE}.json", paths.metrics(STAGE, "all")))
