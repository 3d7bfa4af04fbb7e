"""A conversation in the terminal, imported when one begins.

talk.py     lines are read and obeyed or answered        beside.py    two answers side by side
reply.py    one answer, or both models' answers, as they come
"""
