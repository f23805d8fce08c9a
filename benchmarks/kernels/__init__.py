"""Matrix products: ours by themselves (`own.py`), and beside those of other engines (`beside.py`, `verdict.py`)."""
