"""Small tables to try things on; `make.py` made them."""
