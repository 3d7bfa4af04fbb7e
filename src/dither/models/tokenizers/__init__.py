"""What a GGUF needs to know of a Hugging Face tokenizer, one file for each part of it."""
