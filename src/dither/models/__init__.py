"""Checkpoints, opened and run: where tensors come from, what a family calls them, its network block by block.

source.py        whatever a person names, opened as a `Model`
checkpoint.py    a Hugging Face folder; stored.py, dtypes.py, fp8.py, packed/ are its tensors
gguf_source.py   a GGUF
hub/             a repository, fetched or judged from its headers
json_object.py   strangers' JSON, read with care
arch/            families: how a checkpoint becomes a GGUF, and back
tokenizers/      the same for tokenizers
outline.py       a model to be judged, without weights
blocks/          its network, one block in memory at a time
"""

from dither.system.discovery import room_path

__path__ = room_path(__path__, __name__)
