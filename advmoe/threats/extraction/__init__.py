"""Model extraction: attacks that train a surrogate on the victim's answers to queries, their metrics and a detector.

Membership inference, the privacy of training images, is in `advmoe.threats.membership`; victims are trained elsewhere.
A new attack is one file with a settings class and a function, and one line each in the union and the table of
`registry.py`.
"""
