"""Files, settings, artifacts, errors and console output: used by all other packages.

Nothing here computes with networks (advmoe/models) or depends on the device (advmoe/runtime), and nothing here imports
from another package of advmoe. To add a helper, put it into the module of its subject; raise UserError for mistakes of
the user.
"""
