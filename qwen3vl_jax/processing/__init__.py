"""From conversations with pictures and videos to the arrays that the model reads; no torch."""
