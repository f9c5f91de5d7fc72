"""`python -m advmoe`: the form that dvc.yaml uses, because it runs the checkout it is called in."""

from advmoe.cli import main

main()
