"""Quick run of the membership audit: victims from the command line, results written to `runs/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from advmoe.core.settings import load_section, validate
from advmoe.threats.adhoc import run_in_new_folder
from advmoe.threats.experiment import OutputPaths
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.membership.experiment import MembershipExperiment, run_experiment
from advmoe.threats.victim_training import VictimRecipes


@dataclass(frozen=True)
class MembershipRequest:
    """The victims to audit; empty: those of params.yaml."""

    victims: Sequence[str] = ()


def run_request(request: MembershipRequest) -> OutputPaths:
    """Audits the victims and returns where the results are. Raises UserError for an invalid request."""
    section = _override_victims(load_section("membership", MembershipSection), request)
    experiment = MembershipExperiment(section, VictimRecipes.from_params())
    return run_in_new_folder("membership", partial(run_experiment, experiment))


def _override_victims(section: MembershipSection, request: MembershipRequest) -> MembershipSection:
    """Named victims have as many shadow models as in params.yaml, 0 if they are not listed there.

    They are compared with `membership.against` if it is among them, else with the first.
    """
    if not request.victims:
        return section
    victims = {name: section.victims.get(name, 0) for name in request.victims}
    against = section.against if section.against in victims else request.victims[0]
    return validate(section.model_dump() | {"victims": victims, "against": against}, MembershipSection, "membership")
