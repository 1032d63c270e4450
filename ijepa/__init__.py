"""I-JEPA on small images: train an encoder, freeze it, and compare its embeddings with another's.

One line of data runs through the package, one module per arrow::

    images -> encoders -> embeddings -> metrics, agreement, uncertainty -> comparison -> report
    images -> masking, model -> training -> checkpoint -> encoders

Modules import only from those further up that line; ``errors`` is open to all.
"""
