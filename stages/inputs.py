"""inputs: the parameters that each stage reads, one file per stage and entry.

Reads params.yaml. Writes artifacts/inputs/ and artifacts/start/single.json, for baselines that start from no trained
network.
"""

from advmoe.core import files, paths
from advmoe.core.settings import PARAMS_FILE, read_yaml
from advmoe.core.stage_inputs import all_inputs, content_of


def run() -> None:
    """Writes the parameters of every stage; files of removed entries are deleted."""
    inputs = all_inputs(read_yaml(PARAMS_FILE))
    contents = {path.relative_to(paths.INPUTS).as_posix(): content_of(values) for path, values in inputs.items()}
    files.write_folder(paths.INPUTS, contents)
    files.write_text(paths.start("single"), content_of({}))
