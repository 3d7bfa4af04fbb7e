"""What both servers of this program (`serving/`, `dashboard/`) do alike on the way to a request.

access.py      whose request it is: loopback, Host, Origin, bearer keys
body.py        bodies that end at a limit, and in time
connection.py  heads that end in time, and nothing that may be read in two ways
headers.py     what a browser is told about pages of ours
listening.py   a socket that listens, and uvicorn set up on it

Everything here works on Starlette's types; what is answered to a refused request, each server says itself.
"""
