"""experts: which pre-trained experts the mixture and other mixtures start from.

Reads `train.experts` and the artifacts of the experts. Writes their content hashes to artifacts/start/KIND.json for
every kind of baseline that starts from them.
"""

from advmoe.core import artifacts, files, paths
from advmoe.core.settings import load_section

KINDS = ("equal-passes", "uniform", "more", "top1", "soe")  # of baselines that start from the pre-trained experts


def run() -> None:
    """Writes the content hashes of the experts."""
    names = load_section("train.experts", tuple[str, ...])
    hashes = {name: artifacts.load(paths.artifact("pretrain", name)).header.sha256 for name in names}
    for kind in KINDS:
        files.write_text(paths.start(kind), files.canonical_json(hashes) + "\n")
