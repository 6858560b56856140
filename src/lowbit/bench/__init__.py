"""Measures how fast models run on this machine, beside other programs, and describes the machine.

machine.py:      processor, kernels, threads, versions, GPUs and extras.
shapes.py:       shapes of models and formats of layers, as --shape and --format name them.
random_model.py: a Llama of random weights.
subject.py:      the model that is measured, random or from a folder.
linears.py:      times of all linears of one token.
measure.py:      times of a model and of its peer, in turns.
llama_cpp.py:    llama.cpp as a peer.
"""
