"""What the report and the dashboard show, as data: no web, no torch, no model that runs.

document.py     the results document that the page reads       tiles.py      a window into a tensor
discover.py     measurements and files found in folders        palette.py    the numbers one block may take
answers.py      recorded answers beside a file                 picture.py    a picture through a quantizer
"""
