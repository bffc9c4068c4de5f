"""How good predictions are: scores of examples, means and intervals.

May import numpy and rouge-score; nothing of the package.
"""
