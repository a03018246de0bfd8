"""Masks made visible: as text, PNG, HTML and numbers, from a rule and never from a dense mask.

``flexlocal.masks`` offers the public names (``inspect``, ``MaskPicture``, ``BlockMap``,
``Description``, ``heat_map``, ``bias_map``) and loads this package when one of them is first used.

``picture`` and ``block_map`` each turn a rule into a ``drawing``, which ``text``, ``png`` and
``html`` show. ``counting`` counts what rows see, ``description`` and ``query`` say it in numbers
and words. ``heat`` draws weights and biases, ``gallery`` the pictures of the folder's page.
"""
