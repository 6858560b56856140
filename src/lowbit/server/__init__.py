"""Serves one model over HTTP, as the OpenAI API describes it.

requests.py:  what clients may ask for, and how it is checked.
worker.py:    the thread that generates for all clients in turn.
answers.py:   the JSON objects and events that clients get.
app.py:       the addresses, and errors as JSON.
run.py:       listens on a port until it is interrupted.

transformers has a server of its own (`transformers serve`). It is not used, because it draws the
random numbers of all clients from one global generator, answers a request that it cannot read with
status 500, ignores the fields that it does not know, and loads any model that a client names.
"""
