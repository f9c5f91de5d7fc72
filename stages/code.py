"""code: fingerprints of the code of every stage, which do not depend on comments and docstrings.

Reads advmoe/ and stages/. Writes artifacts/code/STAGE.sha256, one line each.
"""

from advmoe.core import files, paths
from advmoe.runtime.code_fingerprint import stage_fingerprint, stage_names


def run() -> None:
    """Writes one fingerprint per stage; files of removed stages are deleted."""
    fingerprints = {f"{stage}.sha256": f"{stage_fingerprint(stage)}\n" for stage in stage_names() if stage != "code"}
    files.write_folder(paths.CODE, fingerprints)
