"""A small Qwen3-VL of our own: rendered scenes, questions about them, and the recipe that trains it.

Data flow: `scenes` (what is drawn) -> `render` (pixels) and `questions` (wording and answer)
-> `batches` (token and pixel arrays) -> `recipe` (model size, curriculum) -> `evaluation`.
"""
