"""Sources of images, one per module: a settings class with a method `read` that returns `SourceImages`.

Not here: splits and statistics (`advmoe.data.dataset`).
To add a source: write one module and add its settings class to `Source` in `advmoe/data/registry.py`.
"""
