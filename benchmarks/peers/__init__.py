"""Other engines beside ours: each in a process of its own, asked in turn.

    python -m benchmarks.peers --work DIR [--only NAME,NAME]

installs them into `DIR`. An engine is a file in `engines/`; `base.py` says what it has to define. Files there import
nothing but numpy and this package before they are asked to work, so that the parent, which has none of the
libraries, can read what they offer.
"""
