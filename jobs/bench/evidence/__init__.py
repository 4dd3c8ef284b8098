"""What takes many seeds or thousands of steps to show about training, on one GPU.

`case.py` says what a case is given and what it finds, `corpus.py` has the text, `training.py` the loop; each other
module is a case.
"""
