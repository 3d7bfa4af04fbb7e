"""The live page: a small server on this machine, the jobs it starts, and what keeps others out.

app.py        which address answers what
security.py   who may ask: Host, Origin, token, sizes, headers
results.py    the results document and what is read lazily beside it
watch.py      notices new measurements
forms.py      forms of jobs and the command lines they stand for; `cli/forms.py` makes them of its options
jobs.py       runs those as processes that outlive the server; processes.py finds them again
serve.py      binds a port and runs until Ctrl-C
"""
