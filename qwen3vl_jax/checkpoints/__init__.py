"""Weights on disk: Hugging Face directories, our store, Orbax, and the ways between them."""
