"""Which keys train.py and evaluate.py have, which values they take, and what is said of them."""
