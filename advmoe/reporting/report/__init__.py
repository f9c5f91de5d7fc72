"""The report as one self-contained HTML page and as Markdown, the model card, and the comparison of two runs.

Every number is read from a file of the run; nothing is computed on a model except the gallery of examples.
To add a section: one module with a function `Sources -> Section`, called in `content.py`.
"""
