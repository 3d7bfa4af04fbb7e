"""What runs a model: llama.cpp and transformers, each behind the same `Engine`, and vLLM's command line.

protocol.py      what the server asks of an engine; settings.py says how a model is run
llamacpp.py      llama.cpp in this process (`llama_start.py` sets it up); vocabulary.py is its tokenizer alone
processes.py     llama.cpp in a child (`worker.py`), spoken to through http_client.py
transformers.py  folders that llama.cpp does not read
vllm.py          the command that serves a folder with vLLM
"""
