"""Does a model give a sequence the same logits in every batch, cache and way of decoding? A table that shows it.

    python -m evaluation.exactness --output runs/exactness

`models.py` builds small random models of transformers and of this package, `cases.py` and `decoding.py` hold the
questions, `page.py` writes the answers.
"""
