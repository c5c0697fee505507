"""The living thing: pages, tracks, layers, and the Hugging Face cache made of them."""
