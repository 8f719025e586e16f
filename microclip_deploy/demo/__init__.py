"""The embedded benchmark: letters with diacritics, rendered and pretrained without any download.

82 classes that differ by one small mark, a tiny CLIP pretrained on clean prints of them
(`model/`), and a shifted target domain to adapt to without labels. Read in this order:
`glyphs` (classes and texts), `render` (one image), `folders` (PNG folders as a user would have
them), and `bench.demo_model` (how the shipped model was made).
"""
