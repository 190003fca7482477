"""The offline test of a bundle: images with what they are, judged and measured, as JSON, HTML and pictures."""
