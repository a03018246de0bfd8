"""What is done to a score before the softmax, and to a weight after it; each in a file of its own.

Each is written twice: for kernels, which compute one score at a time, and for the eager path, which
computes the scores of whole tiles. Value and derivative stand together.
"""
