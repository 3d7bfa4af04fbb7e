"""An OpenAI-compatible HTTP server in front of the engines: `dither serve`.

server.py    a socket, a thread, an end in good order: `dither.serve`
app.py       which request goes where; who may ask (`access.py`); the drain
requests.py  what OpenAI's bodies may hold, checked before an engine sees them; `messages.py`, `grammars.py`
models.py    the files as models with names, and the memory each will need
pool.py      which models are in memory, who waits for one
relay.py     an engine's answer on its way to a client that may be slow, or gone
fold.py      the same in one piece, for clients that want no stream
connection.py  what comes before a request: heads that take their time, bytes that are no HTTP
logprobs.py  log-probabilities of completions, in their own form
errors.py    every refusal in OpenAI's form
metrics.py   what Prometheus reads
"""
