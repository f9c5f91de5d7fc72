"""membership: which training images does each network give away?

Reads `membership`, `seed`, `epsilon`, all that training reads (`model`, `pretrain`, `experts`, `train`, `baseline`: its
shadow models are trained as the victims were), the data set and the victims. Writes metrics/membership.json and
metrics/membership/all.json.
"""

from advmoe import paths
from advmoe.params import load_section
from advmoe.threats.membership import study
from advmoe.threats.membership.settings import MembershipSection
from advmoe.threats.membership.study import Case, Places
from advmoe.threats.retraining import Recipes

STAGE = "membership"


def run() -> None:
    """Audit the victims that params.yaml names."""
    case = Case(load_section(STAGE, MembershipSection), Recipes.read())
    study.conduct(case, Places(paths.METRICS / f"{STAGE}.json", paths.metrics(STAGE, "all")))
