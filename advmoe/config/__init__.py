"""params.yaml as a whole: its schema, profiles, validation of the project, and the forecast of its cost.

Settings of one stage are defined next to the code that uses them, their base class in `advmoe.core.settings`.
Stages never import this package. A new section of params.yaml is a field of `Params` in `schema.py`.
"""
