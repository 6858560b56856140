"""Serves one model over HTTP, as the OpenAI API describes it.

requests.py:  what clients may ask for, and how it is checked.
worker.py:    generates for all clients in turn.
batching.py:  generates for all clients in one batch, with transformers.
draws.py:     the random numbers of a batch.
answers.py:   the JSON objects and events that clients get.
app.py:       the addresses, and errors as JSON.
run.py:       listens on a port until it is interrupted.

transformers has a server of its own (`transformers serve`), of which only the continuous batching
is used here. The rest gives all clients the temperature of the first and random numbers of one
global generator, answers a request that it cannot read with status 500, ignores fields that it does
not know, and loads any model that a client names.
"""
