"""A small Qwen3-VL of our own: rendered scenes, questions about them, and how it is trained.

Data flow: `scenes` (what is drawn) -> `render` (pixels) and `questions` (wording and answer)
-> `batches` (token and pixel arrays) -> `recipe` (model size, curriculum) -> `evaluation`.
"""
