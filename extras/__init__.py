"""One file a subject; each can be removed without breaking `train.py` and `sample.py`."""
