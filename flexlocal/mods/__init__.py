"""What is done to a score before the softmax, and to a weight after it; each in a file of its own.

A file holds the rule for kernels, which ask for one score at a time, and for the eager path, which
holds the scores of whole tiles; value and derivative stand together.
"""
