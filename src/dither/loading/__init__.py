"""A transformers model quantized while it is loaded: no file is written, and it is never whole in memory.

Loading a model and quantizing it afterwards needs room for the original.  Here the network is built without
memory (torch's meta device), and each matrix of a decoder block is read, quantized and put in its place
before the next one is read: what is needed is the quantized model and a little more.

    methods.py    what "nf4", "int8", "hqq" … are: a codec, a solver, whether bitsandbytes has it
    linear.py     a linear layer of packed codes, multiplied by de-quantizing it on the way
    sinks.py      where rows go as they are read, and the layer they become: ours, bitsandbytes', or plain
    network.py    the network filled, tensor by tensor

Everything here needs torch and transformers; `dither.load` says so where they are missing.
"""
